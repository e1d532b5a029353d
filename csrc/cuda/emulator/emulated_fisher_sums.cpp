// The kernels of fisher_sums.cu, compiled for the emulator.
#include "../fisher_sums.cu"
