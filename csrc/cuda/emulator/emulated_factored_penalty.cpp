// The kernels of factored_penalty.cu, compiled for the emulator.
#include "../factored_penalty.cu"
