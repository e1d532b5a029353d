// SPDX-License-Identifier: Apache-2.0
// The kernels of lowrank_walk.cu, compiled for the emulator.
#include "../lowrank_walk.cu"
