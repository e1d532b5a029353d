// SPDX-License-Identifier: Apache-2.0
// Python objects that are plain tensors.
#pragma once
#include <torch/csrc/autograd/python_variable.h>

#include "plain.h"

namespace fe {

// The tensor behind an object whose type is Tensor or Parameter itself, if it is plain; else null.
inline const at::Tensor* plain_tensor(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const at::Tensor& t = THPVariable_Unpack(object);
  return t.defined() && is_plain(t) ? &t : nullptr;
}

}  // namespace fe
