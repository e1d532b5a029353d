// SPDX-License-Identifier: Apache-2.0
// What hosts use of the CUDA runtime, for builds that run on the CPU.
#pragma once
#include <cstddef>

namespace fe::cuda {

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;

// What went wrong in the last launch that failed; threads of a block do the same thing over and over, so the first failure is kept.
const char* cudaGetErrorString(cudaError_t status);

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

}  // namespace fe::cuda
