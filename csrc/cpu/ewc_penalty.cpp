// SPDX-License-Identifier: Apache-2.0
// EWC penalty, or l1 norm, of all adapters of a model in one parallel region.
#include "flat_gradients.h"

namespace fe {
namespace {

struct Adapter {
  at::Tensor a, b, fisher;  // kept alive for the pointers in `kernel`
  float* grad_a = nullptr;
  std::vector<float> scale;
  int64_t first_rank = 0;
  double cost = 0.0;  // of all earlier adapters
  PenaltyAdapter kernel;
};

double row_cost(const PenaltyAdapter& k) {
  return double(k.d_in) * double(k.rank);
}

// A place in the sequence of all rows of all adapters; row < rows of the adapter, or the end.
struct Cut {
  size_t adapter;
  int64_t row;
};

// Where the share of `part` begins when all rows are split into `parts` of about equal cost, at a boundary between strips of rows. `total` is
// not 0, so the last adapter that begins at or before the target has a cost.
Cut cut_at(const std::vector<Adapter>& adapters, double total, int64_t part, int64_t parts) {
  if (part == parts) return {adapters.size(), 0};
  const double target = total * double(part) / double(parts);
  size_t i = adapters.size() - 1;
  while (i > 0 && adapters[i].cost > target) --i;
  const PenaltyAdapter& k = adapters[i].kernel;
  const int64_t unit = kernels().penalty_rows;
  const int64_t row = std::llround((target - adapters[i].cost) / row_cost(k) / double(unit)) * unit;
  return row < k.rows ? Cut{i, row} : Cut{i + 1, 0};
}

// The F of one adapter; the tensor keeps what the matrix points to.
void set_fisher(Adapter& adapter, const at::Tensor& fisher) {
  const bool codes = fisher.scalar_type() == at::kByte;
  adapter.fisher = codes ? fisher : as_rows(fisher);
  adapter.kernel.codes = codes;
  adapter.kernel.fisher = codes ? Matrix{fisher.data_ptr(), fisher.stride(0), Dtype::f32} : matrix(adapter.fisher);
}

// The penalty of checked arguments: an l1 norm without fishers.
std::tuple<at::Tensor, at::Tensor> penalties(const Tensors& fishers, const Tensors& lora_as, const Tensors& lora_bs,
                                             const OptionalTensors& scales, const std::vector<double>& factors, double lambda,
                                             const std::vector<bool>& needs) {
  std::vector<Adapter> adapters(lora_as.size());
  int64_t ranks = 0, scratch = 0, widest = 0;
  double total = 0.0;
  bool holes = false;  // an F without elements: no part computes its gradients
  for (size_t i = 0; i < adapters.size(); ++i) {
    Adapter& a = adapters[i];
    a.a = as_float(lora_as[i]);
    a.b = as_float(lora_bs[i]);
    PenaltyAdapter& k = a.kernel;
    k.rows = a.b.size(0), k.d_in = a.a.size(1), k.rank = a.a.size(0);
    k.l1 = fishers.empty();
    if (!k.l1) set_fisher(a, fishers[i]);
    k.a = a.a.data_ptr<float>(), k.b = a.b.data_ptr<float>();
    a.scale = scale_of(scales[i], factors[i], k.rank);
    const bool unit = std::all_of(a.scale.begin(), a.scale.end(), [](float s) { return s == 1.f; });
    k.scale = unit ? nullptr : a.scale.data();
    k.lambda = float(lambda);
    k.need_a = needs[0], k.need_b = needs[1], k.need_s = needs[2] && scales[i];
    a.first_rank = ranks, ranks += k.rank;
    a.cost = total, total += row_cost(k) * k.rows;
    holes = holes || k.rows * k.d_in == 0;
    scratch = std::max(scratch, kernels().penalty_scratch(k.rank, k.d_in));
    widest = std::max(widest, k.rank * k.d_in);
  }

  const FlatGradients flat(lora_as, lora_bs, scales, needs);
  at::Tensor grads = holes ? at::zeros({flat.length}, at::kFloat) : floats(flat.length);
  if (total == 0.0) return {at::zeros({}, at::kFloat), grads};
  for (size_t i = 0; i < adapters.size(); ++i) {
    adapters[i].grad_a = grads.data_ptr<float>() + flat.a[i];
    if (needs[1]) adapters[i].kernel.grad_b = grads.data_ptr<float>() + flat.b[i];
  }

  // A part may begin inside one adapter only, its first: that one's dA goes to the part's spill, every other straight to the output.
  const int64_t parts = std::clamp<int64_t>(int64_t(total / 65536), 1, at::get_num_threads());
  std::vector<double> loss(parts, 0.0);
  std::vector<int64_t> spilled(parts, -1);
  at::Tensor grad_s = at::zeros({parts * ranks}, at::kFloat), memory = floats(parts * scratch);
  at::Tensor spill = floats(needs[0] && parts > 1 ? parts * widest : 0);
  over_parts(parts, parts, [&](int64_t part, int64_t, int64_t) {
    const Cut first = cut_at(adapters, total, part, parts), last = cut_at(adapters, total, part + 1, parts);
    for (size_t i = first.adapter; i < adapters.size() && i <= last.adapter; ++i) {
      Adapter& a = adapters[i];
      const int64_t begin = i == first.adapter ? first.row : 0, end = i == last.adapter ? last.row : a.kernel.rows;
      if (begin >= end || a.kernel.d_in == 0) continue;
      float* grad_a = !needs[0] ? nullptr : begin == 0 ? a.grad_a : spill.data_ptr<float>() + part * widest;
      if (begin > 0) spilled[part] = int64_t(i);
      loss[part] += kernels().penalty(a.kernel, begin, end, grad_a, grad_s.data_ptr<float>() + part * ranks + a.first_rank,
                                      memory.data_ptr<float>() + part * scratch);
    }
  });
  double value = loss[0];
  for (int64_t part = 1; part < parts; ++part) {
    value += loss[part];
    if (!needs[0] || spilled[part] < 0) continue;
    Adapter& a = adapters[spilled[part]];
    const float* from = spill.data_ptr<float>() + part * widest;
    for (int64_t j = 0; j < a.kernel.rank * a.kernel.d_in; ++j) a.grad_a[j] += from[j];
  }
  sum_parts(grad_s.data_ptr<float>(), parts, ranks);

  for (size_t i = 0; i < adapters.size(); ++i) {
    const Adapter& a = adapters[i];
    if (!a.kernel.need_s) continue;
    write_scale_gradient(*scales[i], factors[i], grad_s.data_ptr<float>() + a.first_rank, a.kernel.rank,
                         grads.data_ptr<float>() + flat.s[i]);
  }
  return {at::scalar_tensor(float(value), at::kFloat), grads};  // Inf beyond fp32, which a conversion by PyTorch would refuse
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> ewc_penalty(const Tensors& fishers, const Tensors& lora_as, const Tensors& lora_bs,
                                               const OptionalTensors& scales, const std::vector<double>& factors, double ewc_lambda,
                                               const std::vector<bool>& needs) {
  arguments::ewc_penalty(DEVICE, fishers, lora_as, lora_bs, scales, factors, needs);
  return penalties(fishers, lora_as, lora_bs, scales, factors, ewc_lambda, needs);
}

std::tuple<at::Tensor, at::Tensor> l1_penalty(const Tensors& fishers, const Tensors& lora_as, const Tensors& lora_bs,
                                              const OptionalTensors& scales, const std::vector<double>& factors, double l1_lambda,
                                              const std::vector<bool>& needs) {
  arguments::l1_penalty(DEVICE, fishers, lora_as, lora_bs, scales, factors, needs);
  return penalties(fishers, lora_as, lora_bs, scales, factors, l1_lambda, needs);
}

}  // namespace fe
