// SPDX-License-Identifier: Apache-2.0
#include "driver.h"

#include <c10/util/StringUtil.h>
#include <dlfcn.h>

#include <atomic>

namespace fe::driver {
namespace {

constexpr int LEAST_VERSION = 12000;             // of the driver: tensor maps whose address can be replaced
constexpr int SHARED_WITHOUT_ASKING = 48 << 10;  // bytes of dynamic shared memory

// Drivers up to that of CUDA 13.1 set a bit in maps of small tensors that has to be cleared, as CUTLASS and Triton do.
constexpr int LAST_WITH_SMALL_BIT = 13010;
constexpr uint64_t SMALL = 128 << 10, SMALL_BIT = uint64_t(1) << 21;

template <class... Words>
[[noreturn]] void fail(const Words&... words) {
  throw Failure(c10::str(words...));
}

std::mutex loading;
std::atomic<const Functions*> loaded{nullptr};  // never freed: kernels may be launched until the end of the process

}  // namespace

void load(const std::string& library, const std::string& prefix) {
  const std::string path = library.empty() ? "libcuda.so.1" : library;
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) fail("the CUDA driver cannot be loaded: ", dlerror());
  auto found = std::make_unique<Functions>();
#define FE_FIND(name, arguments)                                                                  \
  found->name = reinterpret_cast<decltype(found->name)>(dlsym(handle, (prefix + #name).c_str())); \
  if (found->name == nullptr) fail("the CUDA driver ", path, " has no function ", #name, ": expected one of CUDA 12.0 or newer");
  FE_DRIVER_FUNCTIONS(FE_FIND)
#undef FE_FIND
  int& version = found->version;
  const CUresult result = found->cuDriverGetVersion(&version);
  if (result != 0) fail("the CUDA driver ", path, " does not tell its version: error ", result);
  if (version < LEAST_VERSION)
    fail("the CUDA driver is of CUDA ", version / 1000, ".", version % 1000 / 10, ": expected one of CUDA 12.0 or newer");
  loaded = found.release();
}

const Functions& functions() {
  if (const Functions* found = loaded) return *found;
  const std::lock_guard<std::mutex> guard(loading);
  if (!loaded) load("", "");
  return *loaded;
}

std::string described(CUresult result) {
  const char* text = nullptr;
  const bool known = functions().cuGetErrorString(result, &text) == 0 && text != nullptr;
  return std::string(known ? text : "unknown error") + " (" + std::to_string(result) + ")";
}

void check(CUresult result, const std::string& what) {
  if (result != 0) fail(what, ": ", described(result));
}

CUresult encode(CUtensorMap& map, int type, const TiledTensor& tensor, const uint32_t* box, int swizzle, int fill) {
  constexpr uint32_t STEPS[MOST_DIMENSIONS] = {1, 1, 1, 1, 1};
  const Functions& cuda = functions();
  const CUresult result =
      cuda.cuTensorMapEncodeTiled(&map, type, tensor.dimensions, tensor.address, tensor.sizes, tensor.strides, box, STEPS,
                                  CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, fill);
  if (result != 0 || cuda.version > LAST_WITH_SMALL_BIT) return result;
  uint64_t last = (tensor.sizes[0] - 1) * tensor.element_size;
  for (uint32_t i = 1; i < tensor.dimensions; ++i) last += (tensor.sizes[i] - 1) * tensor.strides[i - 1];
  if (last + 1 < SMALL) map.opaque[1] &= ~SMALL_BIT;
  return result;
}

bool capturing(CUstream stream) {
  int status = 0;
  check(functions().cuStreamIsCapturing(stream, &status), "cuStreamIsCapturing");
  return status != 0;
}

// Threads that have not used the device have no context, and PyTorch gives them none before it has to.
static void ensure_context(CUdevice device, const std::string& what) {
  const Functions& cuda = functions();
  CUcontext context = nullptr;
  check(cuda.cuCtxGetCurrent(&context), what);
  if (context == nullptr) {
    check(cuda.cuDevicePrimaryCtxRetain(&context, device), what);
    check(cuda.cuCtxSetCurrent(context), what);
  }
}

CUfunction Kernel::on(CUdevice device) {
  ensure_context(device, name_);
  const std::lock_guard<std::mutex> guard(lock_);
  CUfunction& function = functions_[{device, &functions()}];
  if (function == nullptr) function = loaded(device);
  return function;
}

CUfunction Kernel::loaded(CUdevice device) const {
  const Functions& cuda = functions();
  CUmodule module = nullptr;
  CUfunction function = nullptr;
  check(cuda.cuModuleLoadData(&module, image_.data()), name_ + ": its machine code does not load");
  check(cuda.cuModuleGetFunction(&function, module, name_.c_str()), name_ + ": not in its machine code");
  if (shared_ <= SHARED_WITHOUT_ASKING) return function;
  int most = 0, fixed = 0;
  check(cuda.cuDeviceGetAttribute(&most, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device), name_);
  check(cuda.cuFuncGetAttribute(&fixed, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function), name_);
  if (shared_ + fixed > most) fail(name_, ": needs ", shared_ + fixed, " bytes of shared memory, the device has ", most);
  check(cuda.cuFuncSetCacheConfig(function, CU_FUNC_CACHE_PREFER_SHARED), name_);
  check(cuda.cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most - fixed), name_);
  return function;
}

}  // namespace fe::driver
