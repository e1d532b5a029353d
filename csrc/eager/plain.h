// Which calls are plain: nobody traces, transforms, records or replaces operations, and tensors are nothing but tensors. Other calls are for
// Python (fused_ewclora/ops), which knows what to do with them and has the words for what is wrong.
#pragma once
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/profiler/api.h>

namespace fe::eager {

// The same questions as `_observed` in ops/schemas.py.
inline bool is_observed() {
  return c10::impl::TorchDispatchModeTLS::stack_len() > 0 || at::impl::PythonTorchFunctionTLS::stack_len() > 0 ||
         torch::jit::tracer::isTracing() || c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr || torch::profiler::impl::profilerEnabled();
}

// The tensor that a Python object is, or nullptr: not one, a subclass, or stored in another way than a block of numbers.
inline const at::Tensor* plain(PyObject* object) {
  if (!THPVariable_CheckTypeExact(Py_TYPE(object))) return nullptr;
  const at::Tensor& t = THPVariable_Unpack(object);
  const bool block = t.layout() == at::kStrided && !t.is_nested() && (t.key_set() & at::kTensorSubclassLike).empty() && !t.is_neg() &&
                     !t.is_quantized() && (t.is_cpu() || t.is_cuda());
  return block ? &t : nullptr;
}

}  // namespace fe::eager
