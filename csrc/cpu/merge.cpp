// SPDX-License-Identifier: Apache-2.0
// Merging adapters into weights, and soft thresholding, one entry after the other.
#include "tensors.h"

namespace fe {

static void merge_one(const at::Tensor& weight, const at::Tensor& lora_a, const at::Tensor& lora_b, const std::optional<at::Tensor>& scale,
                      double factor) {
  if (weight.numel() == 0) return;
  const int64_t rows = weight.size(0), d_in = weight.size(1), rank = lora_a.size(0), lanes = kernels().lanes;
  const std::vector<float> s = scale_of(scale, factor, rank);
  const at::Tensor a = as_rows(lora_a);
  const at::Tensor sb = as_float(lora_b) * at::from_blob(const_cast<float*>(s.data()), {rank}, at::kFloat);
  at::Tensor target = weight.stride(1) == 1 || d_in == 1 ? weight : weight.contiguous();
  at::Tensor panel = floats(rank * ((d_in + lanes - 1) / lanes * lanes));
  kernels().pack_panel(matrix(a), rank, d_in, {panel.data_ptr<float>(), rank, lanes});
  over_parts(parts_for(rows, 16), rows, [&](int64_t, int64_t begin, int64_t end) {
    kernels().merge(matrix(target), d_in, rank, panel.data_ptr<float>(), sb.data_ptr<float>(), begin, end);
  });
  if (!target.is_same(weight)) weight.copy_(target);
}

void merge(const Tensors& weights, const Tensors& lora_as, const Tensors& lora_bs, const OptionalTensors& scales,
           const std::vector<double>& factors) {
  arguments::merge(DEVICE, weights, lora_as, lora_bs, scales, factors);
  for (size_t i = 0; i < weights.size(); ++i) merge_one(weights[i], lora_as[i], lora_bs[i], scales[i], factors[i]);
}

static void soft_threshold_one(const at::Tensor& scale, double kappa) {
  if (scale.numel() == 0) return;
  at::Tensor values = as_float(scale);
  if (values.is_same(scale)) values = values.clone();
  float* s = values.data_ptr<float>();
  const float k = float(kappa);
  for (int64_t i = 0; i < values.numel(); ++i) s[i] = s[i] > k ? s[i] - k : s[i] < -k ? s[i] + k : s[i] == s[i] ? 0.f : s[i];
  scale.copy_(values);
}

void soft_threshold(const Tensors& scales, double kappa) {
  arguments::soft_threshold(DEVICE, scales);
  for (const at::Tensor& scale : scales) soft_threshold_one(scale, kappa);
}

}  // namespace fe
