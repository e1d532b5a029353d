// SPDX-License-Identifier: Apache-2.0
// The kernels of fisher_sums.cu, compiled for the emulator.
#include "../fisher_sums.cu"
