// EWC penalty of all adapters of a model in one parallel region.
#include "tensors.h"

namespace fe {
namespace {

struct Adapter {
  at::Tensor a, b, fisher, grad_a, grad_b;  // fp32; kept alive for the pointers in `kernel`
  std::vector<float> scale;
  int64_t first_rank = 0;
  double cost = 0.0;  // of all earlier adapters
  PenaltyAdapter kernel;
};

// Rows of adapter i that part `part` of `parts` owns, when the whole work is split into parts of equal cost.
std::pair<int64_t, int64_t> rows_of(const Adapter& a, double row_cost, double total, int64_t part, int64_t parts) {
  auto row_at = [&](double cost) {
    const int64_t unit = kernels().penalty_rows;
    const int64_t row = int64_t((cost - a.cost) / row_cost / unit + 0.5) * unit;
    return std::clamp<int64_t>(row, 0, a.kernel.rows);
  };
  const int64_t begin = part == 0 ? 0 : row_at(total * part / parts);
  const int64_t end = part == parts - 1 ? a.kernel.rows : row_at(total * (part + 1) / parts);
  return {begin, end};
}

}  // namespace

std::tuple<at::Tensor, Tensors> ewc_penalty(const Tensors& fishers, const Tensors& lora_as, const Tensors& lora_bs,
                                            const OptionalTensors& scales, const std::vector<double>& factors, double ewc_lambda,
                                            const std::vector<bool>& needs) {
  std::vector<Adapter> adapters(fishers.size());
  int64_t ranks = 0, scratch = 0, widest = 0;
  double total = 0.0;
  auto row_cost = [](const PenaltyAdapter& k) { return double(k.d_in) * double(k.rank); };
  for (size_t i = 0; i < adapters.size(); ++i) {
    Adapter& a = adapters[i];
    a.a = as_float(lora_as[i]);
    a.b = as_float(lora_bs[i]);
    a.fisher = as_rows(fishers[i]);
    PenaltyAdapter& k = a.kernel;
    k.rows = a.b.size(0), k.d_in = a.a.size(1), k.rank = a.a.size(0);
    k.fisher = matrix(a.fisher);
    k.a = a.a.data_ptr<float>(), k.b = a.b.data_ptr<float>();
    a.scale = scale_of(scales[i], factors[i], k.rank);
    const bool unit = std::all_of(a.scale.begin(), a.scale.end(), [](float s) { return s == 1.f; });
    k.scale = unit ? nullptr : a.scale.data();
    k.lambda = float(ewc_lambda);
    k.need_a = needs[0], k.need_b = needs[1], k.need_s = needs[2] && scales[i];
    if (k.need_a) a.grad_a = at::empty_like(a.a);
    if (k.need_b) a.grad_b = at::empty_like(a.b), k.grad_b = a.grad_b.data_ptr<float>();
    a.first_rank = ranks, ranks += k.rank;
    a.cost = total, total += row_cost(k) * k.rows;
    scratch = std::max(scratch, kernels().penalty_scratch(k.rank, k.d_in));
    widest = std::max(widest, k.rank * k.d_in);
  }

  // A part may begin inside one adapter only, its first: that one's dA goes to the part's spill, every other straight to the output.
  const int64_t parts = std::clamp<int64_t>(int64_t(total / 65536), 1, at::get_num_threads());
  std::vector<double> loss(parts, 0.0);
  std::vector<int64_t> spilled(parts, -1);
  at::Tensor grad_s = at::zeros({parts * ranks}, at::kFloat), memory = floats(parts * scratch);
  at::Tensor spill = floats(needs[0] && parts > 1 ? parts * widest : 0);
  over_parts(parts, parts, [&](int64_t part, int64_t, int64_t) {
    for (size_t i = 0; i < adapters.size(); ++i) {
      Adapter& a = adapters[i];
      const auto [begin, end] = rows_of(a, row_cost(a.kernel), total, part, parts);
      if (begin >= end) continue;
      float* grad_a = !needs[0] ? nullptr : begin == 0 ? a.grad_a.data_ptr<float>() : spill.data_ptr<float>() + part * widest;
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
    float* to = a.grad_a.data_ptr<float>();
    const float* from = spill.data_ptr<float>() + part * widest;
    for (int64_t j = 0; j < a.grad_a.numel(); ++j) to[j] += from[j];
  }
  sum_parts(grad_s.data_ptr<float>(), parts, ranks);

  Tensors grads;
  for (size_t i = 0; i < adapters.size(); ++i) {
    Adapter& a = adapters[i];
    if (a.kernel.need_a) grads.push_back(a.grad_a);
    if (a.kernel.need_b) grads.push_back(a.grad_b);
    if (a.kernel.need_s) {
      at::Tensor ds = at::from_blob(grad_s.data_ptr<float>() + a.first_rank, {a.kernel.rank}, at::kFloat) * factors[i];
      grads.push_back(scales[i]->dim() == 0 ? ds.sum() : ds);
    }
  }
  return {at::scalar_tensor(value, at::kFloat), grads};
}

}  // namespace fe
