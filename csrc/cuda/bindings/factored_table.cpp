// SPDX-License-Identifier: Apache-2.0
// Cuts the penalty of factored Fishers of all adapters into items of work.
#include "factored_table.h"

namespace fe::cuda {
namespace {

constexpr int64_t BLOCKS = 2;  // that run on a multiprocessor at a time

const PenaltyArguments& checked(const PenaltyArguments& a) {
  arguments::factored_penalty(DEVICE, a.fishers, a.lora_as, a.lora_bs, a.scales, a.factors, a.needs);
  return a;
}

// `factor` as [size, rank].
FactoredSide side(const at::Tensor& factor, const at::Tensor& sums) {
  FactoredSide s{};
  s.factor = factor.data_ptr(), s.dtype = dtype_of(factor);
  s.along = factor.stride(0), s.rank = factor.stride(1);
  s.sums = sums.data_ptr<float>(), s.sum = sums.stride(0);
  s.size = int32_t(factor.size(0));
  return s;
}

}  // namespace

FactoredTable::FactoredTable(const PenaltyArguments& a) : CallTable(checked(a)) {
  op_ = "factored_penalty", what_ = std::to_string(a.lora_as.size()) + " adapters, the first A " + described(a.lora_as[0]);
  for (size_t i = 0; i < a.lora_as.size(); ++i) add(a, i);
  if (!adapters_.empty()) lay_out();
}

void FactoredTable::add(const PenaltyArguments& a, size_t i) {
  const at::Tensor &lora_a = a.lora_as[i], &lora_b = a.lora_bs[i];
  const int64_t d_out = lora_b.size(0), d_in = lora_a.size(1), rank = lora_a.size(0);
  TORCH_CHECK_VALUE(d_out <= INT32_MAX / 2 && d_in <= INT32_MAX / 2 && rank <= INT32_MAX / 2, "factored_penalty: lora_as[", i, "] of ",
                    described(lora_a), " is too large");
  const Places places = next_places(a, i);
  if (d_out == 0 || d_in == 0) {  // no item would write its gradients
    holes_ = true;
    return;
  }
  const bool scaled = a.scales[i].defined();
  const Scale scale = scale_of(scaled ? std::optional(a.scales[i]) : std::nullopt, a.factors[i]);
  FactoredAdapter p{};
  p.sides[0] = side(lora_b, a.fishers[i]), p.sides[1] = side(lora_a.t(), a.fishers[a.lora_as.size() + i]);
  p.sides[0].grad = places.b, p.sides[0].grad_along = rank, p.sides[0].grad_rank = 1;
  p.sides[1].grad = places.a, p.sides[1].grad_along = 1, p.sides[1].grad_rank = d_in;
  p.scale = scale.data, p.scale_stride = scale.stride, p.scale_dtype = scale.dtype, p.factor = scale.factor;
  p.scalar = scaled && a.scales[i].dim() == 0, p.grad_s = places.s;
  p.rank = int32_t(rank);
  rp_ = std::max(rp_, rank <= 16 ? 16 : rank <= 32 ? 32 : 64);
  adapters_.push_back(p);
  members_.push_back(i);
}

void FactoredTable::lay_out() {
  const int64_t step = factored_step(rp_);
  int64_t indices = 0, work = 0, counters = 2;
  for (const FactoredAdapter& p : adapters_) indices += int64_t(p.sides[0].size) + p.sides[1].size;
  const int64_t length = ceil_div(ceil_div(indices, BLOCKS * multiprocessors_), step) * step;
  const auto take = [](int64_t& total, int64_t size) { return total += size, total - size; };
  const bool needed[2] = {need_b_, need_a_};
  std::vector<FactoredItem> products, gradients;
  for (size_t i = 0; i < adapters_.size(); ++i) {
    FactoredAdapter& p = adapters_[i];
    const int32_t tiles = int32_t(ceil_div(p.rank, rp_));
    p.pairs = tiles * (tiles + 1) / 2;
    p.products = take(work, 2 * int64_t(p.rank) * p.rank), p.total = take(work, 1), p.value = take(work, 1);
    p.count = int32_t(take(counters, 1)), p.ready = int32_t(take(counters, 1)), p.done = int32_t(take(counters, 1));
    for (int32_t of = 0; of < 2; ++of) {
      FactoredSide& s = p.sides[of];
      s.length = int32_t(std::min(length, ceil_div(s.size, step) * step)), s.chunks = int32_t(ceil_div(s.size, s.length));
      s.part = take(work, int64_t(p.pairs) * s.chunks * factored_part(rp_)), s.count = int32_t(take(counters, p.pairs));
      int32_t pair = 0;
      for (int32_t first = 0; first < tiles; ++first)
        for (int32_t second = first; second < tiles; ++second, ++pair)
          for (int32_t chunk = 0; chunk < s.chunks; ++chunk)
            products.push_back({int32_t(i), of, 0, chunk, first * rp_, second * rp_, pair});
      const int32_t chunks = needed[of] ? int32_t(ceil_div(s.size, factored_rows(rp_))) : 0;
      for (int32_t tile = 0; tile < tiles; ++tile)
        for (int32_t chunk = 0; chunk < chunks; ++chunk) gradients.push_back({int32_t(i), of, 1, chunk, tile * rp_, 0, 0});
      p.gradients += tiles * chunks;
    }
  }
  products.insert(products.end(), gradients.begin(), gradients.end());
  items_ = int32_t(products.size());
  keep(adapters_, products, members_, work, counters);
}

cudaError_t FactoredTable::start(size_t, const Memory& memory, float ewc_lambda, cudaStream_t stream) const {
  FactoredPenalty p{};
  p.adapters = static_cast<const FactoredAdapter*>(memory.adapters), p.items = static_cast<const FactoredItem*>(memory.items);
  p.work = memory.work, p.counters = memory.counters, p.loss = memory.loss, p.grads = memory.grads;
  p.n_adapters = int32_t(adapters_.size()), p.n_items = items_;
  p.lambda = ewc_lambda;
  return launch_factored_penalty(p, rp_, stream);
}

}  // namespace fe::cuda
