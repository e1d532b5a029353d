// The kernels of lowrank_walk.cu, compiled for the emulator.
#include "../lowrank_walk.cu"
