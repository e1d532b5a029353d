// SPDX-License-Identifier: Apache-2.0
// Plans: what a host of fused_ewclora/backends/triton did for one call, to be done again for calls like it without Python. A plan holds every
// allocation, every call of PyTorch and every launch in order, with places in which the tensors of a call are put; it is valid for calls that
// agree in all that a host may decide by, which is what keys hold.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/utils/pybind.h>

#include <list>
#include <memory>
#include <optional>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <variant>
#include <vector>

#include "../driver/driver.h"

namespace fe::plans {

// An address: so many bytes behind the first element of a buffer. Buffers are the tensors of the call, then those that plans keep, then those
// that steps make, in this order.
struct Place {
  int64_t buffer = 0, offset = 0;
};

// A tensor in a buffer.
struct View {
  int64_t buffer = -1;  // -1: no tensor
  bool whole = false;   // the buffer as it is
  int64_t offset = 0;   // elements
  std::vector<int64_t> sizes, strides;
};

struct Allocation {
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype;
};

// A call of a PyTorch operation. Its tensors are put into `arguments`, those of lists one by one; the tensors that it returns are buffers.
struct Call {
  c10::OperatorHandle operation;
  std::vector<c10::IValue> arguments;
  struct Tensor {
    size_t argument;
    int64_t element;  // of a list; -1: the argument itself
    View view;
  };
  std::vector<Tensor> tensors;
  bool makes = false;  // whether what it returns is new
};

// A launch. Every parameter has 8 bytes in `values`, or is a tensor map.
struct Launch {
  std::shared_ptr<driver::Kernel> kernel;
  unsigned grid[3], threads;
  std::vector<uint64_t> values;
  std::vector<int> order;  // of the parameters: a place in `values`, or -1 - a place in `maps`
  struct Pointer {
    size_t value;
    Place place;
  };
  std::vector<Pointer> pointers;
  struct Number {
    size_t value, number;  // fp32, from the numbers of the call
  };
  std::vector<Number> numbers;
  struct Map {
    int type, swizzle, fill;
    uint64_t element_size;
    std::vector<uint64_t> sizes, strides;  // innermost first; strides in bytes, without the innermost
    std::vector<uint32_t> box;
    Place place;
  };
  std::vector<Map> maps;
  std::string about;  // for messages: what was launched, for which shapes
};

struct Plan {
  std::vector<at::Tensor> kept;
  using Step = std::variant<Allocation, Call, Launch>;
  std::vector<Step> steps;
  std::vector<View> results;
  int64_t launches = 0;
};

// The tensors of a call, in the order of the host's arguments, undefined where one is missing; what else decides; and numbers that do not: they
// are arguments of kernels.
struct Arguments {
  std::vector<at::Tensor> tensors;
  std::vector<int64_t> decisions;
  std::vector<double> numbers;
};

using Key = std::vector<int64_t>;
struct Hash {
  size_t operator()(const Key& key) const;
};

// The plans of one host. Addresses are part of keys where hosts put them into tables.
class Host {
 public:
  Host(std::string name, bool by_address) : name(std::move(name)), by_address(by_address) {}

  // What the host would return, or nothing: no plan fits, or launches have to be seen by Python.
  std::optional<std::vector<at::Tensor>> replay(const Arguments& arguments);

  // Whether the host should be watched the next time that it is called with such arguments: on the second call, since one alone is not worth it.
  bool should_record(const Arguments& arguments);
  // A plan that is null says that none can be made.
  void add(const Arguments& arguments, std::shared_ptr<const Plan> plan);
  void clear();
  size_t size();

  const std::string name;
  const bool by_address;

 private:
  std::shared_mutex lock_;
  std::unordered_map<Key, std::shared_ptr<const Plan>, Hash> plans_;
  std::list<Key> recent_;  // seen once
};

// The host of this name; made where there is none.
Host& host(const std::string& name, bool by_address = false);
void forget();

// Launches of this process since it began, for tests and measurements.
int64_t launches();

// Whether plans are replayed in this thread: not while somebody takes launches or overrides configurations.
struct Bypass {
  static int& count();
};

// Whether somebody asked Triton to call them at every launch: then its own launcher launches.
bool hooked();

// How the stream that PyTorch launches on is found; 0 on the CPU, which stands in for a GPU.
driver::CUstream current_stream(const at::Device& device);

}  // namespace fe::plans
