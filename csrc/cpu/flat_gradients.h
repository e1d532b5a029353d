// SPDX-License-Identifier: Apache-2.0
// Gradients of a penalty in one flat tensor: every dA, every dB, every ds.
#pragma once
#include "tensors.h"

namespace fe {

// Where each adapter's gradients begin, of the kinds that are wanted.
struct FlatGradients {
  std::vector<int64_t> a, b, s;
  int64_t length = 0;
  bool need_a, need_b, need_s;

  FlatGradients(const Tensors& lora_as, const Tensors& lora_bs, const OptionalTensors& scales, const std::vector<bool>& needs)
      : need_a(needs[0]), need_b(needs[1]), need_s(needs[2]) {
    const auto next = [&](int64_t count) { return std::exchange(length, length + count); };
    for (const at::Tensor& t : lora_as) a.push_back(next(need_a ? t.numel() : 0));
    for (const at::Tensor& t : lora_bs) b.push_back(next(need_b ? t.numel() : 0));
    for (const auto& t : scales) s.push_back(next(need_s && t ? t->numel() : 0));
  }
};

// ds of one scale, a number or `rank` of them, from those of its ranks and the factor beside it.
inline void write_scale_gradient(const at::Tensor& scale, double factor, const float* ds, int64_t rank, float* to) {
  if (scale.dim() == 0) *to = 0.f;
  for (int64_t k = 0; k < rank; ++k) {
    if (scale.dim() == 0)
      *to += ds[k] * float(factor);
    else
      to[k] = ds[k] * float(factor);
  }
}

}  // namespace fe
