// SPDX-License-Identifier: Apache-2.0
// cudaError_t and cudaStream_t for hosts, from CUDA or from the emulator.
#pragma once
#ifdef FE_EMULATED
#include "emulator/runtime.h"
#else
#include <cuda_runtime_api.h>
#endif
