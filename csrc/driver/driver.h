// SPDX-License-Identifier: Apache-2.0
// The CUDA driver, loaded when it is first needed, and kernels in the form in which compilers leave them.
#pragma once
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "api.h"

namespace fe::driver {

// What the driver lacks or refuses, in words.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Loads the driver's functions, whose names begin with `prefix`, from a library; "" is libcuda. Raises a sentence about what is missing.
void load(const std::string& library, const std::string& prefix);

// The functions that were loaded; loads libcuda where nothing was.
const Functions& functions();

// "invalid argument (1)" for messages.
std::string described(CUresult result);

// Raises "what: <the driver's words>" unless `result` is success.
void check(CUresult result, const std::string& what);

constexpr uint32_t MOST_DIMENSIONS = 5;  // of a tensor map

// What a tensor map covers: sizes in elements, innermost first; strides in bytes, without the innermost.
struct TiledTensor {
  void* address;
  uint32_t dimensions;
  uint64_t element_size;
  const uint64_t *sizes, *strides;
};

// A tensor map of boxes of `tensor`, as Triton's launcher encodes it.
CUresult encode(CUtensorMap& map, int type, const TiledTensor& tensor, const uint32_t* box, int swizzle, int fill);

// Whether launches on `stream` are recorded for a CUDA graph now.
bool capturing(CUstream stream);

// A kernel's machine code, loaded on each device when it is first launched there.
class Kernel {
 public:
  Kernel(std::string image, std::string name, int shared) : image_(std::move(image)), name_(std::move(name)), shared_(shared) {}

  // `device` is that of the current context, or of the one to make current where there is none.
  CUfunction on(CUdevice device);

  const std::string& name() const { return name_; }
  int shared() const { return shared_; }

 private:
  CUfunction loaded(CUdevice device) const;

  std::string image_, name_;
  int shared_;  // bytes of dynamic shared memory
  std::mutex lock_;
  std::map<std::pair<CUdevice, const void*>, CUfunction> functions_;  // by device and driver
};

}  // namespace fe::driver
