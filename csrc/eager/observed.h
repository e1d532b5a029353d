// SPDX-License-Identifier: Apache-2.0
// Which calls nobody observes. Others are for Python (fused_ewclora/ops), which knows what to do with them.
#pragma once
#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/profiler/api.h>

namespace fe::eager {

// The same questions as `_observed` in ops/schemas.py.
inline bool is_observed() {
  return c10::impl::TorchDispatchModeTLS::stack_len() > 0 || at::impl::PythonTorchFunctionTLS::stack_len() > 0 ||
         torch::jit::tracer::isTracing() || c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr || torch::profiler::impl::profilerEnabled();
}

}  // namespace fe::eager
