// SPDX-License-Identifier: Apache-2.0
// Cuts the penalty, or l1 norm, of all adapters into items of work.
#include "penalty_table.h"

namespace fe::cuda {
namespace {

// What it takes a block to begin and to end, in rows of its region; and into how many waves of blocks a launch is cut at most.
constexpr int64_t ROWS_BESIDE = 32, MOST_WAVES = 8;

int padded(int64_t rank) {
  return rank <= 16 ? 16 : rank <= 32 ? 32 : 64;
}

bool coded(const at::Tensor& fisher) {
  return fisher.scalar_type() == at::kByte;
}

// `fisher` null: of an l1 norm.
FisherLoads loads_of(const at::Tensor* fisher, int64_t rank) {
  const bool chunked = rank > PENALTY_CHUNK;
  if (fisher == nullptr) return chunked ? FisherLoads::none_of_any_rank : FisherLoads::none;
  if (coded(*fisher)) return chunked ? FisherLoads::codes_of_any_rank : FisherLoads::codes;
  if (chunked || !wide(*fisher) || fisher->stride(0) > INT32_MAX) return FisherLoads::elements;
  switch (dtype_of(*fisher)) {
    case Dtype::f32:
      return FisherLoads::f32;
    case Dtype::bf16:
      return FisherLoads::bf16;
    default:
      return FisherLoads::elements;
  }
}

const PenaltyArguments& checked(const PenaltyArguments& a) {
  arguments::ewc_penalty(DEVICE, a.fishers, a.lora_as, a.lora_bs, a.scales, a.factors, a.needs);
  return a;
}

const PenaltyArguments& checked_l1(const PenaltyArguments& a) {
  arguments::l1_penalty(DEVICE, a.fishers, a.lora_as, a.lora_bs, a.scales, a.factors, a.needs);
  return a;
}

// `fisher` null: of an l1 norm.
void set_fisher(PenaltyAdapter& p, const at::Tensor* fisher) {
  static_assert(PENALTY_COLUMNS == arguments::CODES_OF_A_SCALE);
  if (fisher == nullptr) return;
  p.fisher = fisher->data_ptr(), p.fisher_row = fisher->stride(0), p.fisher_column = fisher->stride(1);
  if (coded(*fisher))
    p.block_scales = int32_t(ceil_div(p.d_in, PENALTY_COLUMNS) * PENALTY_COLUMNS);
  else
    p.fisher_dtype = dtype_of(*fisher);
}

}  // namespace

PenaltyTable::PenaltyTable(const PenaltyArguments& a) : PenaltyTable(checked(a), "ewc_penalty") {}

L1Table::L1Table(const PenaltyArguments& a) : PenaltyTable(checked_l1(a), "l1_penalty") {}

PenaltyTable::PenaltyTable(const PenaltyArguments& a, const char* op) : CallTable(a), precision_(float_precision(Precision::bf16)) {
  op_ = op, what_ = std::to_string(a.lora_as.size()) + " adapters, the first A " + described(a.lora_as[0]);
  for (size_t i = 0; i < a.lora_as.size(); ++i) add(a, i);
  for (Group& group : groups_) lay_out(group);
}

void PenaltyTable::add(const PenaltyArguments& a, size_t i) {
  const at::Tensor *fisher = a.fishers.empty() ? nullptr : &a.fishers[i], &lora_a = a.lora_as[i], &lora_b = a.lora_bs[i];
  const bool scaled = a.scales[i].defined();
  const Scale scale = scale_of(scaled ? std::optional(a.scales[i]) : std::nullopt, a.factors[i]);
  const int64_t d_out = lora_b.size(0), d_in = lora_a.size(1), rank = lora_a.size(0);
  TORCH_CHECK_VALUE(d_out <= INT32_MAX / 2 && d_in <= INT32_MAX / 2, op_, ": B A of adapter ", i, " of shape [", d_out, ", ", d_in,
                    "] is too large");
  PenaltyAdapter p{};
  p.lora_a = lora_a.data_ptr(), p.lora_b = lora_b.data_ptr(), p.scale = scale.data;
  p.a_row = lora_a.stride(0), p.a_column = lora_a.stride(1), p.b_row = lora_b.stride(0), p.b_column = lora_b.stride(1);
  p.scale_stride = scale.stride, p.scale_dtype = scale.dtype, p.factor = scale.factor, p.scalar = scaled && a.scales[i].dim() == 0;
  p.a_dtype = dtype_of(lora_a), p.b_dtype = dtype_of(lora_b);
  p.d_out = int32_t(d_out), p.d_in = int32_t(d_in), p.rank = int32_t(rank);
  set_fisher(p, fisher);
  const Places places = next_places(a, i);
  p.grad_a = places.a, p.grad_b = places.b, p.grad_s = places.s;
  if (d_out == 0 || d_in == 0) {  // no item would write its gradients
    holes_ = true;
    return;
  }
  const FisherLoads loads = loads_of(fisher, rank);
  const int rp = loads == FisherLoads::elements ? PENALTY_CHUNK : padded(rank);
  for (Group& group : groups_) {
    if (group.loads != loads) continue;
    group.rp = std::max(group.rp, rp);
    group.adapters.push_back(p);
    group.members.push_back(i);
    return;
  }
  groups_.push_back({loads, rp, {p}, {}, {i}});
}

namespace {

int64_t height_of(const PenaltyAdapter& p, int64_t most) {
  return ceil_div(ceil_div(p.d_out, ceil_div(p.d_out, most)), PENALTY_ROWS) * PENALTY_ROWS;
}

// Rows of a region at most: those with which a launch is predicted to be over first. All blocks of a wave take as long as the tallest, and a
// last wave that fills few multiprocessors takes as long as a full one. `slots`: blocks that run at a time.
int64_t best_height(const std::vector<PenaltyAdapter>& adapters, int rp, int64_t slots) {
  const int64_t width = penalty_width(rp);
  int64_t elements = 0, highest = 1;
  for (const PenaltyAdapter& p : adapters) {
    elements += int64_t(p.d_out) * p.d_in;
    highest = std::max(highest, ceil_div(p.d_out, PENALTY_ROWS));
  }
  const int64_t lowest = std::min(ceil_div(elements, width * slots * MOST_WAVES * PENALTY_ROWS), highest);
  int64_t best = 0, least = INT64_MAX;
  for (int64_t most = lowest * PENALTY_ROWS; most <= highest * PENALTY_ROWS; most += PENALTY_ROWS) {
    int64_t items = 0, tallest = 0;
    for (const PenaltyAdapter& p : adapters) {
      const int64_t height = height_of(p, most);
      items += ceil_div(p.d_out, height) * ceil_div(p.d_in, width) * ceil_div(p.rank, rp);
      tallest = std::max(tallest, height);
    }
    const int64_t rows = ceil_div(items, slots) * (tallest + ROWS_BESIDE);
    if (rows < least) least = rows, best = most;
  }
  return best;
}

}  // namespace

void PenaltyTable::lay_out(Group& group) {
  const int64_t width = penalty_width(group.rp);
  const int64_t most = best_height(group.adapters, group.rp, int64_t(multiprocessors_) * penalty_blocks(precision_, group.rp));
  for (size_t i = 0; i < group.adapters.size(); ++i) {
    PenaltyAdapter& p = group.adapters[i];
    p.height = int32_t(height_of(p, most));
    p.regions = int32_t(ceil_div(p.d_out, p.height)), p.blocks = int32_t(ceil_div(p.d_in, width)),
    p.chunks = int32_t(ceil_div(p.rank, group.rp));
    for (int chunk = 0; chunk < p.chunks; ++chunk)
      for (int region = 0; region < p.regions; ++region)
        for (int block = 0; block < p.blocks; ++block) group.items.push_back({int32_t(i), region, block, chunk});
  }
  int64_t work = int64_t(group.items.size()), counters = 1;
  const auto take = [](int64_t& total, int64_t size) { return total += size, total - size; };
  for (PenaltyAdapter& p : group.adapters) {
    p.part_a = take(work, need_a_ ? int64_t(p.regions) * p.rank * p.d_in : 0);
    p.part_b = take(work, need_b_ ? int64_t(p.blocks) * p.d_out * p.rank : 0);
    p.part_s = take(work, p.grad_s >= 0 ? int64_t(p.chunks) * p.regions * p.blocks * group.rp : 0);
    p.count_a = int32_t(take(counters, p.blocks * p.chunks));
    p.count_b = int32_t(take(counters, p.regions * p.chunks));
    p.count_s = int32_t(take(counters, 1));
  }
  keep(group.adapters, group.items, group.members, work, counters);
}

int64_t PenaltyTable::items() const {
  int64_t count = 0;
  for (const Group& group : groups_) count += int64_t(group.items.size());
  return count;
}

cudaError_t PenaltyTable::start(size_t index, const Memory& memory, float ewc_lambda, cudaStream_t stream) const {
  const Group& group = groups_[index];
  Penalty p{};
  p.adapters = static_cast<const PenaltyAdapter*>(memory.adapters), p.items = static_cast<const PenaltyItem*>(memory.items);
  p.work = memory.work, p.counters = memory.counters, p.loss = memory.loss, p.grads = memory.grads;
  p.n_items = int32_t(group.items.size());
  p.lambda = ewc_lambda;
  p.need_a = need_a_, p.need_b = need_b_, p.need_s = need_s_;
  return launch_ewc_penalty(p, group.rp, precision_, group.loads, stream);
}

}  // namespace fe::cuda
