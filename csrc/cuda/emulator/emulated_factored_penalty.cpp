// SPDX-License-Identifier: Apache-2.0
// The kernels of factored_penalty.cu, compiled for the emulator.
#include "../factored_penalty.cu"
