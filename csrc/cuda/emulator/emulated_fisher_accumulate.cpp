#include "../fisher_accumulate.cu"
