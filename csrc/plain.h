// SPDX-License-Identifier: Apache-2.0
// Which tensors are just what they say: memory with sizes and strides, as kernels read it past the dispatcher.
#pragma once
#include <ATen/ATen.h>

namespace fe {

// Whether the dispatcher would do no more for `t` than to call a kernel of its device: it is no wrapper of a subclass or of a transform, has
// no shape alone, is not sparse, and has no sign or conjugation that is still to be applied to what its memory holds.
inline bool is_plain(const at::Tensor& t) {
  constexpr c10::DispatchKeySet usual = c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset;
  constexpr uint64_t functions = ~c10::full_backend_mask;
  return ((t.key_set() - usual).raw_repr() & functions) == c10::DispatchKeySet(c10::DispatchKey::Dense).raw_repr() && !t.is_meta();
}

}  // namespace fe
