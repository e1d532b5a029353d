#include "../merge.cu"
