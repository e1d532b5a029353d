// Compiled for the CPU.
#include "../ewc_penalty.cu"
