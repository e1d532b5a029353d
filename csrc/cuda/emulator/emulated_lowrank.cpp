// SPDX-License-Identifier: Apache-2.0
// The kernels of lowrank.cu, compiled for the emulator.
#include "../lowrank.cu"
