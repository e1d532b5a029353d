// SPDX-License-Identifier: Apache-2.0
// Functions of the CUDA driver beyond those of api.h, which Triton's own launcher calls, as cuda.h has them.
#pragma once
#include "api.h"

namespace fe::driver {

using CUdeviceptr = unsigned long long;

constexpr int CU_DEVICE_ATTRIBUTE_WARP_SIZE = 10;
constexpr int CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK = 12;
constexpr int CU_DEVICE_ATTRIBUTE_CLOCK_RATE = 13;
constexpr int CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16;
constexpr int CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE = 36;
constexpr int CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH = 37;
constexpr int CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75;
constexpr int CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76;
constexpr int CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR = 81;
constexpr int CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK = 0;
constexpr int CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES = 3;
constexpr int CU_FUNC_ATTRIBUTE_NUM_REGS = 4;
constexpr int CU_POINTER_ATTRIBUTE_DEVICE_POINTER = 3;

#define FE_DRIVER_EXTRA_FUNCTIONS(_)                                                                                              \
  _(cuInit, (unsigned flags))                                                                                                     \
  _(cuDeviceGet, (CUdevice * device, int ordinal))                                                                                \
  _(cuDeviceGetCount, (int* count))                                                                                               \
  _(cuCtxGetDevice, (CUdevice * device))                                                                                          \
  _(cuCtxGetLimit, (size_t* value, int limit))                                                                                    \
  _(cuCtxSetLimit, (int limit, size_t value))                                                                                     \
  _(cuPointerGetAttribute, (void* data, int attribute, CUdeviceptr pointer))                                                      \
  _(cuLaunchKernel, (CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,  \
                     unsigned block_z, unsigned shared, CUstream stream, void** parameters, void** extra))                        \
  _(cuOccupancyMaxActiveClusters, (int* clusters, CUfunction function, const CUlaunchConfig* config))                             \
  _(cuTensorMapEncodeIm2col,                                                                                                      \
    (CUtensorMap * map, int type, uint32_t rank, void* address, const uint64_t* sizes, const uint64_t* strides, const int* lower, \
     const int* upper, uint32_t channels, uint32_t pixels, const uint32_t* steps, int interleave, int swizzle, int promotion, int fill))

}  // namespace fe::driver
