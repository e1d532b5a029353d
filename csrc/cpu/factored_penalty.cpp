// SPDX-License-Identifier: Apache-2.0
// Penalty of all adapters of a model whose Fishers are row and column sums, several adapters at a time.
#include "flat_gradients.h"

namespace fe {
namespace {

struct Adapter {
  at::Tensor a, b, rows, columns;  // fp32; kept alive for the pointers in `kernel`
  std::vector<float> scale, grad_s;
  FactoredAdapter kernel;
};

constexpr double LEAST_COST = 1 << 18;  // products per thread below which starting one costs more than it saves

}  // namespace

std::tuple<at::Tensor, at::Tensor> factored_penalty(const Tensors& fishers, const Tensors& lora_as, const Tensors& lora_bs,
                                                    const OptionalTensors& scales, const std::vector<double>& factors, double ewc_lambda,
                                                    const std::vector<bool>& needs) {
  arguments::factored_penalty(DEVICE, fishers, lora_as, lora_bs, scales, factors, needs);
  const FlatGradients flat(lora_as, lora_bs, scales, needs);
  at::Tensor grads = floats(flat.length);
  float* const results = grads.data_ptr<float>();
  const int64_t count = int64_t(lora_as.size());
  std::vector<Adapter> adapters(count);
  int64_t scratch = 0;
  double cost = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    Adapter& a = adapters[i];
    a.a = as_float(lora_as[i]), a.b = as_float(lora_bs[i]);
    a.rows = as_float(fishers[i]), a.columns = as_float(fishers[count + i]);
    FactoredAdapter& k = a.kernel;
    k.rows = a.rows.data_ptr<float>(), k.columns = a.columns.data_ptr<float>();
    k.d_out = a.b.size(0), k.d_in = a.a.size(1), k.rank = a.a.size(0);
    k.a = a.a.data_ptr<float>(), k.b = a.b.data_ptr<float>();
    a.scale = scale_of(scales[i], factors[i], k.rank);
    k.scale = a.scale.data();
    k.lambda = float(ewc_lambda);
    if (needs[0]) k.grad_a = results + flat.a[i];
    if (needs[1]) k.grad_b = results + flat.b[i];
    if (needs[2] && scales[i]) {
      a.grad_s.resize(k.rank);
      k.grad_s = a.grad_s.data();
    }
    scratch = std::max(scratch, kernels().factored_scratch(k.rank, k.d_out, k.d_in));
    cost += double(k.d_out + k.d_in) * double(k.rank) * double(k.rank);
  }
  const int64_t parts = std::clamp<int64_t>(int64_t(cost / LEAST_COST), 1, std::min<int64_t>(at::get_num_threads(), count));
  at::Tensor memory = floats(parts * scratch);
  std::vector<double> loss(count);
  over_parts(parts, count, [&](int64_t part, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) loss[i] = kernels().factored(adapters[i].kernel, memory.data_ptr<float>() + part * scratch);
  });
  double value = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    value += loss[i];
    const Adapter& a = adapters[i];
    if (a.kernel.grad_s) write_scale_gradient(*scales[i], factors[i], a.grad_s.data(), a.kernel.rank, results + flat.s[i]);
  }
  return {at::scalar_tensor(float(value), at::kFloat), grads};
}

}  // namespace fe
