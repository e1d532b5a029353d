// SPDX-License-Identifier: Apache-2.0
// LoRA linear without rows, without features or without outputs: nothing is left but the bias and its gradient. Passes over rows and columns
// then never see a size of zero, nor the null pointers of tensors without elements.
#pragma once
#include "arguments.h"

namespace fe::empty {

using arguments::OptionalTensors;
using arguments::Tensors;

// Whether x [..., d_in] or dy [..., d_out] beside `weight` is such a case.
inline bool linear(const at::Tensor& rows, const at::Tensor& weight) {
  return rows.numel() == 0 || weight.numel() == 0;
}

inline int64_t rows_of(const at::Tensor& t) {
  return c10::multiply_integers(t.sizes().slice(0, t.dim() - 1));
}

inline at::Tensor zeros_with_last(const at::Tensor& like, int64_t last) {
  std::vector<int64_t> sizes = like.sizes().vec();
  sizes.back() = last;
  return at::zeros(sizes, like.options());
}

// y = bias, and z = 0, on which nothing depends that has elements.
inline std::tuple<at::Tensor, at::Tensor> lora_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                                      const Tensors& lora_as) {
  int64_t ranks = 0;
  for (const at::Tensor& lora_a : lora_as) ranks += lora_a.size(0);
  at::Tensor y = zeros_with_last(x, weight.size(0));
  if (bias) y.copy_(bias->expand_as(y));
  return {y, at::zeros({rows_of(x), ranks}, x.options().dtype(at::kFloat))};
}

inline Tensors lora_linear_backward(const at::Tensor& dy, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                    const Tensors& lora_as, const Tensors& lora_bs, const OptionalTensors& scales,
                                    const std::vector<bool>& needs) {
  Tensors out;
  if (needs[0]) out.push_back(zeros_with_last(dy, weight.size(1)));
  if (needs[1]) out.push_back(at::zeros(weight.sizes(), weight.options()));
  if (needs[2]) out.push_back(dy.reshape({rows_of(dy), weight.size(0)}).sum(0, false, at::kFloat).to(bias->scalar_type()));
  size_t need = 3;
  const auto zeros = [&](const at::Tensor& t) {
    if (needs[need++]) out.push_back(at::zeros(t.sizes(), t.options()));
  };
  for (const at::Tensor& lora_a : lora_as) zeros(lora_a);
  for (const at::Tensor& lora_b : lora_bs) zeros(lora_b);
  for (const auto& scale : scales) zeros(scale.value_or(at::Tensor()));
  return out;
}

}  // namespace fe::empty
