// SPDX-License-Identifier: Apache-2.0
#include "plan.h"

#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/as_strided.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/SmallVector.h>
#include <dlfcn.h>
#include <torch/csrc/Exceptions.h>

#include <atomic>
#include <bit>
#include <map>
#include <mutex>

namespace fe::plans {
namespace {

constexpr size_t MOST_PLANS = 1024;  // of a host; then it begins anew
constexpr size_t MOST_RECENT = 64;
constexpr int64_t ALIGNMENT = 16;  // bytes: Triton compiles other code for pointers that are not so aligned

std::atomic<int64_t> launched{0};

void describe(Key& key, const at::Tensor& t, bool by_address) {
  if (!t.defined()) {
    key.push_back(-1);
    return;
  }
  const int64_t address = int64_t(reinterpret_cast<uintptr_t>(t.const_data_ptr()));
  key.push_back(int64_t(t.scalar_type()) << 40 | int64_t(t.device().type()) << 32 | int64_t(t.device().index() + 1) << 16 | t.dim());
  key.push_back(by_address ? address : address % ALIGNMENT);
  for (const int64_t size : t.sizes()) key.push_back(size);
  for (const int64_t stride : t.strides()) key.push_back(stride);
}

at::Device device_of(const Arguments& arguments) {
  for (const at::Tensor& t : arguments.tensors)
    if (t.defined()) return t.device();
  return at::kCPU;
}

Key key_of(const Arguments& arguments, bool by_address, driver::CUstream stream) {
  Key key;
  key.reserve(16 + arguments.decisions.size() + 8 * arguments.tensors.size());
  key.push_back(int64_t(reinterpret_cast<uintptr_t>(stream)));
  key.push_back(int64_t(at::globalContext().float32MatmulPrecision()));
  key.push_back(int64_t(arguments.tensors.size()));
  key.insert(key.end(), arguments.decisions.begin(), arguments.decisions.end());
  for (const at::Tensor& t : arguments.tensors) describe(key, t, by_address);
  return key;
}

// The buffers of one call.
struct Buffers {
  c10::SmallVector<at::Tensor, 24> tensors;
  c10::SmallVector<char*, 24> starts;

  void add(at::Tensor t) {
    starts.push_back(t.defined() ? static_cast<char*>(t.mutable_data_ptr()) : nullptr);
    tensors.push_back(std::move(t));
  }
  char* at(const Place& place) const { return starts[place.buffer] + place.offset; }
  at::Tensor view(const View& view) const {
    if (view.buffer < 0) return {};
    const at::Tensor& base = tensors[view.buffer];
    return view.whole ? base : at::as_strided(base, view.sizes, view.strides, base.storage_offset() + view.offset);
  }
};

void run(const Allocation& step, Buffers& buffers, const at::TensorOptions& options) {
  buffers.add(at::empty_strided(step.sizes, step.strides, options.dtype(step.dtype)));
}

void run(const Call& step, Buffers& buffers, const at::TensorOptions&) {
  torch::jit::Stack stack = step.arguments;
  for (const Call::Tensor& t : step.tensors) {
    if (t.element < 0) {
      stack[t.argument] = buffers.view(t.view);
    } else {
      c10::IValue& list = stack[t.argument];
      if (t.element == 0) list = c10::IValue(c10::List<at::Tensor>(list.toTensorList().copy()));
      list.toTensorList().set(t.element, buffers.view(t.view));
    }
  }
  step.operation.callBoxed(&stack);
  if (!step.makes) return;
  for (c10::IValue& value : stack)
    if (value.isTensor()) buffers.add(std::move(value).toTensor());
}

struct Launcher {
  const driver::Functions& cuda;
  driver::CUstream stream;
  driver::CUdevice device;
  const std::vector<double>& numbers;

  void operator()(const Launch& step, const Buffers& buffers) const {
    const driver::CUfunction function = loaded(step);
    c10::SmallVector<uint64_t, 64> values(step.values.begin(), step.values.end());
    for (const Launch::Pointer& p : step.pointers) values[p.value] = reinterpret_cast<uint64_t>(buffers.at(p.place));
    for (const Launch::Number& n : step.numbers) values[n.value] = std::bit_cast<uint32_t>(float(numbers[n.number]));
    c10::SmallVector<driver::CUtensorMap, 3> maps(step.maps.size());
    for (size_t i = 0; i < maps.size(); ++i) encode(step.maps[i], buffers, step, maps[i]);
    c10::SmallVector<void*, 64> parameters;
    for (const int place : step.order)
      parameters.push_back(place >= 0 ? static_cast<void*>(&values[place]) : static_cast<void*>(&maps[-1 - place]));
    driver::CUlaunchConfig config{
        step.grid[0], step.grid[1], step.grid[2], step.threads, 1, 1, unsigned(step.kernel->shared()), stream, nullptr, 0};
    const auto result = cuda.cuLaunchKernelEx(&config, function, parameters.data(), nullptr);
    if (result != 0) driver::check(result, step.about);
    launched.fetch_add(1, std::memory_order_relaxed);
  }

  driver::CUfunction loaded(const Launch& step) const {
    try {
      return step.kernel->on(device);
    } catch (const driver::Failure& failure) {
      throw driver::Failure(step.about + ": " + failure.what());
    }
  }

  void encode(const Launch::Map& map, const Buffers& buffers, const Launch& step, driver::CUtensorMap& out) const {
    const driver::TiledTensor tensor{buffers.at(map.place), uint32_t(map.box.size()), map.element_size, map.sizes.data(),
                                     map.strides.data()};
    const auto result = driver::encode(out, map.type, tensor, map.box.data(), map.swizzle, map.fill);
    if (result != 0) driver::check(result, step.about + ": a tensor map");
  }
};

std::vector<at::Tensor> replayed(const Plan& plan, const Arguments& arguments, driver::CUstream stream) {
  const at::AutoDispatchBelowADInplaceOrView plain;
  const at::Device device = device_of(arguments);
  const c10::DeviceGuard guard(device);
  const Launcher launch{driver::functions(), stream, device.is_cuda() ? device.index() : 0, arguments.numbers};
  const at::TensorOptions options = at::TensorOptions().device(device);
  Buffers buffers;
  for (const at::Tensor& t : arguments.tensors) buffers.add(t);
  for (const at::Tensor& t : plan.kept) buffers.add(t);
  for (const Plan::Step& step : plan.steps) {
    if (const auto* allocation = std::get_if<Allocation>(&step)) {
      run(*allocation, buffers, options);
    } else if (const auto* call = std::get_if<Call>(&step)) {
      run(*call, buffers, options);
    } else {
      launch(std::get<Launch>(step), buffers);
    }
  }
  std::vector<at::Tensor> results;
  results.reserve(plan.results.size());
  for (const View& view : plan.results) results.push_back(buffers.view(view));
  return results;
}

// Raises `BackendError` of errors.py, from whichever thread and through autograd's engine.
[[noreturn]] void raise(const std::string& message) {
  const pybind11::gil_scoped_acquire locked;
  PyErr_SetString(pybind11::module_::import("fused_ewclora.errors").attr("BackendError").ptr(), message.c_str());
  python_error error;
  error.persist();
  throw error;
}

std::mutex naming;
std::map<std::string, std::unique_ptr<Host>>& hosts() {
  static auto* all = new std::map<std::string, std::unique_ptr<Host>>;  // its plans hold tensors: never destroyed
  return *all;
}

}  // namespace

size_t Hash::operator()(const Key& key) const {
  uint64_t hash = 0x9e3779b97f4a7c15u;
  for (const int64_t value : key) {
    hash = (hash ^ uint64_t(value)) * 0xff51afd7ed558ccdu;
    hash ^= hash >> 32;
  }
  return size_t(hash);
}

std::optional<std::vector<at::Tensor>> Host::replay(const Arguments& arguments) {
  if (Bypass::count() > 0 || hooked()) return std::nullopt;
  const driver::CUstream stream = current_stream(device_of(arguments));
  std::shared_ptr<const Plan> plan;
  {
    const std::shared_lock<std::shared_mutex> guard(lock_);
    if (plans_.empty()) return std::nullopt;
    const auto found = plans_.find(key_of(arguments, by_address, stream));
    if (found == plans_.end() || !found->second) return std::nullopt;
    plan = found->second;
  }
  try {
    // What a graph holds on to is allocated otherwise, once for each graph.
    if (driver::capturing(stream)) return std::nullopt;
    return replayed(*plan, arguments, stream);
  } catch (const driver::Failure& failure) {
    raise("backend 'triton', " + name + ": " + failure.what());
  }
}

bool Host::should_record(const Arguments& arguments) {
  if (Bypass::count() > 0) return false;
  const driver::CUstream stream = current_stream(device_of(arguments));
  if (driver::capturing(stream)) return false;
  Key key = key_of(arguments, by_address, stream);
  const std::unique_lock<std::shared_mutex> guard(lock_);
  if (plans_.count(key)) return false;
  for (auto it = recent_.begin(); it != recent_.end(); ++it)
    if (*it == key) {
      recent_.erase(it);
      return true;
    }
  recent_.push_front(std::move(key));
  if (recent_.size() > MOST_RECENT) recent_.pop_back();
  return false;
}

void Host::add(const Arguments& arguments, std::shared_ptr<const Plan> plan) {
  Key key = key_of(arguments, by_address, current_stream(device_of(arguments)));
  const std::unique_lock<std::shared_mutex> guard(lock_);
  if (plans_.size() >= MOST_PLANS) plans_.clear();
  plans_[std::move(key)] = std::move(plan);
}

void Host::clear() {
  decltype(plans_) gone;  // tensors are let go without the lock
  const std::unique_lock<std::shared_mutex> guard(lock_);
  gone.swap(plans_);
  recent_.clear();
}

size_t Host::size() {
  const std::shared_lock<std::shared_mutex> guard(lock_);
  return plans_.size();
}

Host& host(const std::string& name, bool by_address) {
  const std::lock_guard<std::mutex> guard(naming);
  auto& found = hosts()[name];
  if (!found) found = std::make_unique<Host>(name, by_address);
  return *found;
}

void forget() {
  const std::lock_guard<std::mutex> guard(naming);
  for (auto& [name, host] : hosts()) host->clear();
}

int64_t launches() {
  return launched;
}

bool hooked() {
  // Never destroyed: the interpreter may be gone by then.
  static PyObject* runtime = nullptr;
  static PyObject *enter = nullptr, *leave = nullptr, *calls = nullptr;
  const pybind11::gil_scoped_acquire locked;
  if (runtime == nullptr) {
    const pybind11::object knobs = pybind11::module_::import("triton.knobs").attr("runtime");
    enter = PyUnicode_InternFromString("launch_enter_hook");
    leave = PyUnicode_InternFromString("launch_exit_hook");
    calls = PyUnicode_InternFromString("calls");
    runtime = knobs.inc_ref().ptr();
  }
  for (PyObject* name : {enter, leave}) {
    const auto hook = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(runtime, name));
    if (!hook) throw pybind11::error_already_set();
    if (hook.is_none()) continue;
    const auto chain = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(hook.ptr(), calls));
    if (!chain) PyErr_Clear();  // a function that took the place of the chain
    if (!chain || !PyList_Check(chain.ptr()) || PyList_GET_SIZE(chain.ptr()) > 0) return true;
  }
  return false;
}

int& Bypass::count() {
  thread_local int count = 0;
  return count;
}

driver::CUstream current_stream(const at::Device& device) {
  if (!device.is_cuda()) return nullptr;
  // Part of PyTorch's stable C interface, in the library that has its CUDA part.
  using Current = int32_t (*)(int32_t, void**);
  static const auto current = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Current>(dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  if (current == nullptr) throw driver::Failure("this PyTorch has no aoti_torch_get_current_cuda_stream, which tells its current stream");
  void* stream = nullptr;
  if (current(device.index(), &stream) != 0) throw driver::Failure("PyTorch does not tell its current stream");
  return static_cast<driver::CUstream>(stream);
}

}  // namespace fe::plans
