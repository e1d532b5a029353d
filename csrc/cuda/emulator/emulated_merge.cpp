// SPDX-License-Identifier: Apache-2.0
// The kernels of merge.cu, compiled for the emulator.
#include "../merge.cu"
