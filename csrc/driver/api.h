// SPDX-License-Identifier: Apache-2.0
// What is used of the CUDA driver API, declared here so that the CPU extension builds without CUDA's headers. Names, values and layouts are those
// of cuda.h, which keeps them stable from version to version; tests/backends/triton compare them with the cuda.h that comes with Triton.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fe::driver {

using CUresult = int;  // 0: success
using CUdevice = int;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;

constexpr int CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97;
constexpr int CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES = 1;
constexpr int CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;
constexpr int CU_FUNC_CACHE_PREFER_SHARED = 1;
constexpr int CU_TENSOR_MAP_INTERLEAVE_NONE = 0;
constexpr int CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2;

struct CUlaunchAttribute {
  int id;
  char pad[4];
  char value[64];
};

struct CUlaunchConfig {
  unsigned gridDimX, gridDimY, gridDimZ;
  unsigned blockDimX, blockDimY, blockDimZ;
  unsigned sharedMemBytes;
  CUstream hStream;
  CUlaunchAttribute* attrs;
  unsigned numAttrs;
};

struct alignas(64) CUtensorMap {
  uint64_t opaque[16];
};

// (name, arguments) of every function that is loaded; all return CUresult.
#define FE_DRIVER_FUNCTIONS(_)                                                                                                          \
  _(cuDriverGetVersion, (int* version))                                                                                                 \
  _(cuGetErrorString, (CUresult error, const char** text))                                                                              \
  _(cuCtxGetCurrent, (CUcontext * context))                                                                                             \
  _(cuCtxSetCurrent, (CUcontext context))                                                                                               \
  _(cuDevicePrimaryCtxRetain, (CUcontext * context, CUdevice device))                                                                   \
  _(cuDeviceGetAttribute, (int* value, int attribute, CUdevice device))                                                                 \
  _(cuModuleLoadData, (CUmodule * module, const void* image))                                                                           \
  _(cuModuleGetFunction, (CUfunction * function, CUmodule module, const char* name))                                                    \
  _(cuFuncGetAttribute, (int* value, int attribute, CUfunction function))                                                               \
  _(cuFuncSetAttribute, (CUfunction function, int attribute, int value))                                                                \
  _(cuFuncSetCacheConfig, (CUfunction function, int config))                                                                            \
  _(cuLaunchKernelEx, (const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra))                             \
  _(cuStreamIsCapturing, (CUstream stream, int* status))                                                                                \
  _(cuTensorMapEncodeTiled, (CUtensorMap * map, int type, uint32_t rank, void* address, const uint64_t* sizes, const uint64_t* strides, \
                             const uint32_t* box, const uint32_t* steps, int interleave, int swizzle, int promotion, int fill))         \
  _(cuTensorMapReplaceAddress, (CUtensorMap * map, void* address))

struct Functions {
  int version = 0;  // 13010: of CUDA 13.1
#define FE_DECLARE(name, arguments) CUresult(*name) arguments = nullptr;
  FE_DRIVER_FUNCTIONS(FE_DECLARE)
#undef FE_DECLARE
};

}  // namespace fe::driver
