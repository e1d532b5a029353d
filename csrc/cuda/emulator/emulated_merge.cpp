// The kernels of merge.cu, compiled for the emulator.
#include "../merge.cu"
