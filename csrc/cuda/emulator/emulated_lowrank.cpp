// The kernels of lowrank.cu, compiled for the emulator.
#include "../lowrank.cu"
