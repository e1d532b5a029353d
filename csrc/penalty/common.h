// SPDX-License-Identifier: Apache-2.0
// Arguments of calls with hundreds of tensors, read from the lists of Python in one pass.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "../arguments.h"
#include "../plain_objects.h"

namespace fe::penalty {

// A list or a tuple, without a copy.
struct Sequence {
  PyObject* object;

  bool given() const { return PyList_CheckExact(object) || PyTuple_CheckExact(object); }
  Py_ssize_t size() const { return PySequence_Fast_GET_SIZE(object); }
  PyObject* operator[](Py_ssize_t i) const { return PySequence_Fast_GET_ITEM(object, i); }
};

// Whether all are there, with one length that is not 0.
inline bool alike(std::initializer_list<Sequence> all) {
  const auto fits = [&](const Sequence& s) { return s.given() && s.size() > 0 && s.size() == all.begin()->size(); };
  return std::all_of(all.begin(), all.end(), fits);
}

// What every entry has in common with the first adapter.
struct Common {
  c10::ScalarType dtype;
  c10::Device device;
  bool wide = dtype == at::kDouble;

  bool floating() const { return wide || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf; }
  // A Fisher is fp32 or bf16, beside fp64 adapters fp64 or fp32, or codes in 8 bits.
  bool fisher(const at::Tensor& t, int64_t d_out, int64_t d_in) const {
    const auto found = t.scalar_type();
    if (t.dim() != 2 || t.device() != device || t.size(0) != d_out) return false;
    if (found == at::kByte) return t.size(1) == arguments::row_bytes(d_in) && arguments::has_rows_of_codes(t);
    return t.size(1) == d_in && (found == at::kFloat || found == (wide ? at::kDouble : at::kBFloat16));
  }
  // The sums [size], or the factor [size, size], of a structured Fisher: fp32, beside fp64 adapters also fp64.
  bool fisher_factor(const at::Tensor& t, int64_t dims, int64_t size) const {
    const auto found = t.scalar_type();
    if (t.dim() != dims || t.device() != device || !(found == at::kFloat || (wide && found == at::kDouble))) return false;
    return t.size(0) == size && t.size(dims - 1) == size;
  }
  // B and scales have the dtype of A, or are fp32 beside 16 bits.
  bool factor(const at::Tensor& t) const {
    const auto found = t.scalar_type();
    return t.device() == device && (found == dtype || (found == at::kFloat && !wide));
  }
  bool number(double value) const {
    return std::abs(value) <= (wide ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max());
  }
};

// The scale at `object`, null for all of them being 1; false where it is neither a plain tensor that fits nor a number.
inline bool read_scale(PyObject* object, const Common& common, int64_t rank, std::optional<at::Tensor>& scale, double& factor) {
  factor = 1.0;
  if (!object) return true;
  if (PyFloat_CheckExact(object)) {
    factor = PyFloat_AS_DOUBLE(object);
    return common.number(factor);
  }
  const at::Tensor* t = plain_tensor(object);
  if (!t || !common.factor(*t) || !(t->dim() == 0 || (t->dim() == 1 && t->size(0) == rank))) return false;
  scale = *t;
  return true;
}

}  // namespace fe::penalty
