// SPDX-License-Identifier: Apache-2.0
// The eager LoRA linear from its Python arguments to y: checks, choice of the backend, and the node on autograd's tape.
#include "../autograd/lora_linear.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randint.h>

#include <bit>
#include <cmath>
#include <limits>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "../cpu/tensors.h"
#include "../plain_objects.h"
#include "../plans/lora_linear.h"
#include "bindings.h"
#include "observed.h"

namespace fe::eager {
namespace {

namespace py = pybind11;
using recorded::LinearBackend;
using recorded::LinearCall;

// What the choice of a backend depends on: `Call` of backends/candidate.py, and the name that was asked for.
struct Choice {
  std::string asked;
  std::array<int64_t, 9> sizes;

  bool operator==(const Choice&) const = default;
};
struct HashChoice {
  size_t operator()(const Choice& choice) const {
    uint64_t hash = std::hash<std::string>()(choice.asked);
    for (const int64_t size : choice.sizes) hash = (hash ^ uint64_t(size)) * 0xff51afd7ed558ccdu, hash ^= hash >> 32;
    return hash;
  }
};

std::shared_mutex choosing;
std::unordered_map<Choice, const LinearBackend*, HashChoice>& choices() {
  static auto* all = new std::unordered_map<Choice, const LinearBackend*, HashChoice>;
  return *all;
}
PyObject* chooser = nullptr;  // (asked, *arguments of the op) -> address of a backend, or None: Python serves the call

bool is_served(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

// A factor or scale beside x.
bool fits(const at::Tensor& t, const at::Tensor& x) {
  return (t.scalar_type() == x.scalar_type() || t.scalar_type() == at::kFloat) && t.device() == x.device();
}

bool add_scale(PyObject* given, int64_t rank, LinearCall& call) {
  if (PyFloat_CheckExact(given) || PyLong_CheckExact(given)) {
    const double factor = PyFloat_AsDouble(given);
    if (PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
    call.scales.emplace_back();
    call.scale_factors.push_back(factor);
    return std::abs(factor) <= std::numeric_limits<float>::max();
  }
  const at::Tensor* scale = plain_tensor(given);
  if (scale == nullptr || scale->dim() > 1 || (scale->dim() == 1 && scale->size(0) != rank) || !fits(*scale, call.x)) return false;
  call.scales.emplace_back(*scale);
  call.scale_factors.push_back(1.0);
  return true;
}

// The rows of adapter `index`; their number, or -1.
int64_t add_rows(PyObject* given, int64_t index, std::vector<int64_t>& rows) {
  if (!PyTuple_Check(given)) return -1;
  int64_t owned = 0;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(given); ++i) {
    PyObject* range = PyTuple_GET_ITEM(given, i);
    if (!PyTuple_Check(range) || PyTuple_GET_SIZE(range) != 2) return -1;
    PyObject *first = PyTuple_GET_ITEM(range, 0), *last = PyTuple_GET_ITEM(range, 1);
    if (!PyLong_CheckExact(first) || !PyLong_CheckExact(last)) return -1;
    const int64_t start = PyLong_AsLongLong(first), stop = PyLong_AsLongLong(last);
    if (PyErr_Occurred()) {
      PyErr_Clear();
      return -1;
    }
    rows.insert(rows.end(), {index, start, stop});
    owned += stop - start;
  }
  return owned;
}

// Whether ranges lie inside of the d_out rows of the weight, none of them empty and none over another.
bool are_disjoint(const std::vector<int64_t>& rows, int64_t d_out) {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (size_t q = 0; q < rows.size(); q += 3) ranges.emplace_back(rows[q + 1], rows[q + 2]);
  std::sort(ranges.begin(), ranges.end());
  int64_t done = 0;
  for (const auto& [start, stop] : ranges) {
    if (start < done || stop <= start || stop > d_out) return false;
    done = stop;
  }
  return true;
}

bool add_adapters(PyObject* given, LinearCall& call) {
  const bool list = PyList_Check(given);
  if (!list && !PyTuple_Check(given)) return false;
  const Py_ssize_t count = list ? PyList_GET_SIZE(given) : PyTuple_GET_SIZE(given);
  const int64_t d_out = call.weight.size(0), d_in = call.weight.size(1);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* adapter = list ? PyList_GET_ITEM(given, i) : PyTuple_GET_ITEM(given, i);
    if (!PyTuple_Check(adapter) || PyTuple_GET_SIZE(adapter) != 4) return false;
    const at::Tensor *a = plain_tensor(PyTuple_GET_ITEM(adapter, 0)), *b = plain_tensor(PyTuple_GET_ITEM(adapter, 1));
    if (a == nullptr || b == nullptr || a->dim() != 2 || b->dim() != 2) return false;
    const int64_t rank = a->size(0), owned = add_rows(PyTuple_GET_ITEM(adapter, 3), i, call.rows);
    if (rank < 1 || a->size(1) != d_in || b->size(1) != rank || b->size(0) != owned || !fits(*a, call.x) || !fits(*b, call.x)) return false;
    if (!add_scale(PyTuple_GET_ITEM(adapter, 2), rank, call)) return false;
    call.lora_as.push_back(*a);
    call.lora_bs.push_back(*b);
  }
  return count > 0 && are_disjoint(call.rows, d_out);
}

// The call, or nothing where it is for Python.
std::optional<LinearCall> parsed(PyObject* x, PyObject* weight, PyObject* bias, PyObject* adapters) {
  const at::Tensor *x_ = plain_tensor(x), *weight_ = plain_tensor(weight), *bias_ = bias == Py_None ? nullptr : plain_tensor(bias);
  if (x_ == nullptr || weight_ == nullptr || (bias != Py_None && bias_ == nullptr)) return std::nullopt;
  LinearCall call;
  call.x = *x_, call.weight = *weight_;
  if (bias_ != nullptr) call.bias = *bias_;
  const at::DeviceType device = call.x.device().type();
  if (at::autocast::is_autocast_enabled(device)) {  // as torch.nn.functional.linear would have them
    const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
    if (!is_served(call.x.scalar_type()) || !at::isFloatingType(call.weight.scalar_type())) return std::nullopt;
    call.x = call.x.to(dtype), call.weight = call.weight.to(dtype);
    if (bias_ != nullptr) call.bias = call.bias.to(dtype);
  }
  const auto matches = [&](const at::Tensor& t) { return t.scalar_type() == call.x.scalar_type() && t.device() == call.x.device(); };
  if (!is_served(call.x.scalar_type()) || !matches(call.weight) || call.weight.dim() != 2) return std::nullopt;
  if (call.x.dim() < 1 || call.x.size(-1) != call.weight.size(1)) return std::nullopt;
  if (bias_ != nullptr && (!matches(call.bias) || call.bias.dim() != 1 || call.bias.size(0) != call.weight.size(0))) return std::nullopt;
  if (!add_adapters(adapters, call)) return std::nullopt;
  return call;
}

// Whether the call becomes part of a CUDA graph.
bool is_captured(const at::Device& device) {
  if (!device.is_cuda()) return false;
  static const bool known = [] {
    try {
      driver::functions();
      return true;
    } catch (const c10::Error&) {
      return false;  // too old for plans as well: choices count the host's time then
    }
  }();
  return known && driver::capturing(plans::current_stream(device));
}

const LinearBackend* chosen(const LinearCall& call, const std::string& asked) {
  const int64_t d_in = call.weight.size(1), rows = call.x.numel() / std::max<int64_t>(d_in, 1);
  int64_t rank = 0;
  for (const at::Tensor& a : call.lora_as) rank += a.size(0);
  const at::Device device = call.x.device();
  const Choice choice{asked,
                      {int64_t(device.type()), device.index(), int64_t(call.x.scalar_type()), int64_t(std::bit_ceil(uint64_t(rows))), d_in,
                       call.weight.size(0), rank * 2 + (call.dropout_p > 0.0), int64_t(at::globalContext().float32MatmulPrecision()),
                       int64_t(is_captured(device))}};
  {
    const std::shared_lock<std::shared_mutex> guard(choosing);
    const auto found = choices().find(choice);
    if (found != choices().end()) return found->second;
  }
  if (chooser == nullptr) return nullptr;
  const auto choose = py::reinterpret_borrow<py::object>(chooser);
  const py::object backend = choose(asked, call.x, call.weight, recorded::given(call.bias), call.lora_as, call.lora_bs, call.scales,
                                    call.scale_factors, call.rows, call.dropout_p, recorded::given(call.seed));
  const auto* found = backend.is_none() ? nullptr : reinterpret_cast<const LinearBackend*>(backend.cast<uintptr_t>());
  const std::unique_lock<std::shared_mutex> guard(choosing);
  if (choices().size() >= 4096) choices().clear();
  return choices()[choice] = found;
}

bool is_seed(PyObject* seed) {
  if (seed == Py_None) return true;
  if (PyLong_CheckExact(seed)) {
    int overflow = 0;
    PyLong_AsLongLongAndOverflow(seed, &overflow);
    return overflow == 0;
  }
  const at::Tensor* t = plain_tensor(seed);
  return t != nullptr && t->scalar_type() == at::kLong && t->numel() == 1;
}

// One number on the device; drawn from its default generator where none is given.
at::Tensor seed_of(PyObject* seed, const at::Device& device) {
  const at::TensorOptions options = at::TensorOptions().dtype(at::kLong).device(device);
  if (seed == Py_None) return at::randint(0, std::numeric_limits<int64_t>::max(), {}, options);
  if (PyLong_CheckExact(seed)) return at::full({}, PyLong_AsLongLong(seed), options);
  return plain_tensor(seed)->to(device).reshape({});
}

bool any_trained(const LinearCall& call) {
  const auto trained = [](const at::Tensor& t) { return t.defined() && t.requires_grad(); };
  return trained(call.x) || trained(call.weight) || trained(call.bias) || std::any_of(call.lora_as.begin(), call.lora_as.end(), trained) ||
         std::any_of(call.lora_bs.begin(), call.lora_bs.end(), trained) ||
         std::any_of(call.scales.begin(), call.scales.end(), [&](const auto& s) { return s && trained(*s); });
}

// y, or None: the call is for Python.
py::object lora_linear(py::handle x, py::handle weight, py::handle bias, py::handle adapters, py::handle dropout, bool training,
                       py::handle seed, const std::string& asked, py::handle captured) {
  if (is_observed()) return py::none();
  const double dropout_p = PyFloat_CheckExact(dropout.ptr()) ? PyFloat_AS_DOUBLE(dropout.ptr()) : -1.0;
  if (!(0.0 <= dropout_p && dropout_p <= 1.0)) return py::none();
  std::optional<LinearCall> call = parsed(x.ptr(), weight.ptr(), bias.ptr(), adapters.ptr());
  if (!call) return py::none();
  call->dropout_p = training ? dropout_p : 0.0;
  if (call->dropout_p > 0.0 && !is_seed(seed.ptr())) return py::none();
  const LinearBackend* backend = chosen(*call, asked);
  if (backend == nullptr) return py::none();
  if (call->dropout_p > 0.0) call->seed = seed_of(seed.ptr(), call->x.device());
  at::Tensor y;
  {
    const py::gil_scoped_release unlocked;
    if (at::GradMode::is_enabled() && any_trained(*call)) {
      y = recorded::LoRALinear::record(*call, *backend, captured.is_none() ? nullptr : captured.ptr());
    } else {
      const recorded::WithoutAutocast plain;
      y = backend->forward(*call)[0];
      // Calls without gradients count, too: reentrant checkpointing makes them before its backward.
      if (!captured.is_none()) recorded::tell(captured.ptr(), call->x);
    }
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(y)));
}

}  // namespace

void bind(py::module_& m) {
  m.def("linear_backend", &recorded::LinearFunctions<&fe::lora_linear, &fe::lora_linear_backward>::address);
  m.def("eager_lora_linear", &lora_linear);
  m.def("choose_linear_by", [](py::object function) { chooser = function.release().ptr(); });
  m.def("forget_choices", [] {
    const std::unique_lock<std::shared_mutex> guard(choosing);
    choices().clear();
  });
}

}  // namespace fe::eager
