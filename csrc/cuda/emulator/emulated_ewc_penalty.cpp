// SPDX-License-Identifier: Apache-2.0
// Compiled for the CPU.
#include "../ewc_penalty.cu"
