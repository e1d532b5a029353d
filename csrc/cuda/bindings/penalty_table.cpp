// Cuts the penalty of all adapters into items of work, and keeps the table of both in device memory.
#include "penalty_table.h"

#include <cstring>

#include "kept.h"

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

FisherLoads loads_of(const at::Tensor& fisher, int64_t rank) {
  if (rank > PENALTY_CHUNK || fisher.stride(0) > INT32_MAX) return FisherLoads::elements;
  if (coded(fisher)) return FisherLoads::codes;
  if (!wide(fisher)) return FisherLoads::elements;
  switch (dtype_of(fisher)) {
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

}  // namespace

PenaltyTable::PenaltyTable(const PenaltyArguments& a)
    : options_(checked(a).lora_as[0].options().dtype(at::kFloat).requires_grad(false)),
      precision_(float_precision(Precision::bf16)),
      shape_(std::to_string(a.fishers.size()) + " Fisher matrices, the first " + described(a.fishers[0])),
      need_a_(a.needs[0]),
      need_b_(a.needs[1]),
      need_s_(a.needs[2]),
      multiprocessors_(cuda::multiprocessors(a.lora_as[0])),
      like_(at::empty({0}, options_)),
      once_(kept::capturing(like_)) {
  for (const at::Tensor& lora_a : a.lora_as) next_b_ += need_a_ ? lora_a.numel() : 0;
  next_s_ = next_b_;
  for (const at::Tensor& lora_b : a.lora_bs) next_s_ += need_b_ ? lora_b.numel() : 0;
  length_ = next_s_;
  for (const at::Tensor& scale : a.scales) length_ += need_s_ && scale.defined() ? scale.numel() : 0;
  for (size_t i = 0; i < a.fishers.size(); ++i) add(a, i);
  for (Group& group : groups_) lay_out(group);
}

void PenaltyTable::add(const PenaltyArguments& a, size_t i) {
  const at::Tensor &fisher = a.fishers[i], &lora_a = a.lora_as[i], &lora_b = a.lora_bs[i];
  const bool scaled = a.scales[i].defined();
  const Scale scale = scale_of(scaled ? std::optional(a.scales[i]) : std::nullopt, a.factors[i]);
  const int64_t d_out = lora_b.size(0), d_in = lora_a.size(1), rank = lora_a.size(0);
  TORCH_CHECK_VALUE(d_out <= INT32_MAX / 2 && d_in <= INT32_MAX / 2, "ewc_penalty: fishers[", i, "] of ", described(fisher),
                    " is too large");
  PenaltyAdapter p{};
  p.fisher = fisher.data_ptr(), p.lora_a = lora_a.data_ptr(), p.lora_b = lora_b.data_ptr(), p.scale = scale.data;
  p.fisher_row = fisher.stride(0), p.fisher_column = fisher.stride(1);
  p.a_row = lora_a.stride(0), p.a_column = lora_a.stride(1), p.b_row = lora_b.stride(0), p.b_column = lora_b.stride(1);
  p.scale_stride = scale.stride, p.scale_dtype = scale.dtype, p.factor = scale.factor, p.scalar = scaled && a.scales[i].dim() == 0;
  static_assert(PENALTY_COLUMNS == arguments::CODES_OF_A_SCALE);
  if (coded(fisher))
    p.block_scales = int32_t(ceil_div(d_in, PENALTY_COLUMNS) * PENALTY_COLUMNS);
  else
    p.fisher_dtype = dtype_of(fisher);
  p.a_dtype = dtype_of(lora_a), p.b_dtype = dtype_of(lora_b);
  p.d_out = int32_t(d_out), p.d_in = int32_t(d_in), p.rank = int32_t(rank);
  p.grad_a = next_a_, next_a_ += rank * d_in;
  p.grad_b = next_b_, next_b_ += d_out * rank;
  p.grad_s = need_s_ && scaled ? next_s_ : -1;
  next_s_ += p.grad_s >= 0 ? a.scales[i].numel() : 0;
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
  groups_.push_back({loads, rp, {p}, {}, {i}, {}});
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
  group.work = int64_t(group.items.size()), group.counters = 1;
  const auto take = [](int64_t& total, int64_t size) { return total += size, total - size; };
  for (PenaltyAdapter& p : group.adapters) {
    p.part_a = take(group.work, need_a_ ? int64_t(p.regions) * p.rank * p.d_in : 0);
    p.part_b = take(group.work, need_b_ ? int64_t(p.blocks) * p.d_out * p.rank : 0);
    p.part_s = take(group.work, p.grad_s >= 0 ? int64_t(p.chunks) * p.regions * p.blocks * group.rp : 0);
    p.count_a = int32_t(take(group.counters, p.blocks * p.chunks));
    p.count_b = int32_t(take(group.counters, p.regions * p.chunks));
    p.count_s = int32_t(take(group.counters, 1));
  }
  const size_t first = group.bytes_of_adapters(), second = group.items.size() * sizeof(PenaltyItem);
  std::vector<char> bytes(first + second);
  std::memcpy(bytes.data(), group.adapters.data(), first);
  std::memcpy(bytes.data() + first, group.items.data(), second);
  group.table = (once_ ? kept::by_value : kept::copied)(bytes.data(), bytes.size(), like_);
}

int64_t PenaltyTable::items() const {
  int64_t count = 0;
  for (const Group& group : groups_) count += int64_t(group.items.size());
  return count;
}

PenaltyTable::Own PenaltyTable::make_own() const {
  Own own;
  for (const Group& group : groups_) {
    own.adapters.push_back(group.table.narrow(0, 0, int64_t(group.bytes_of_adapters())).clone());
    own.counters.push_back(at::zeros({group.counters}, options_.dtype(at::kInt)));
  }
  return own;
}

PenaltyTable::Own& PenaltyTable::of_stream(cudaStream_t stream) {
  const auto found = streams_.find(stream);
  if (found != streams_.end()) return found->second;
  Own own;
  kept::outside(like_, [&] { return own = make_own(), at::Tensor(); });
  for (const Group& group : groups_) kept::used(group.table);
  return streams_.emplace(stream, std::move(own)).first->second;
}

// On the current stream, after the launches that read the earlier ones.
void PenaltyTable::set_factors(Own& own, const std::vector<double>& factors) const {
  static_assert(sizeof(PenaltyAdapter) % sizeof(float) == 0 && offsetof(PenaltyAdapter, factor) % sizeof(float) == 0);
  constexpr int64_t PITCH = sizeof(PenaltyAdapter) / sizeof(float), PLACE = offsetof(PenaltyAdapter, factor) / sizeof(float);
  own.factors.clear();
  for (size_t i = 0; i < groups_.size(); ++i) {
    std::vector<double> of_group;
    for (size_t member : groups_[i].members) of_group.push_back(factors[member]);
    kept::write(own.adapters[i].view(at::kFloat).view({-1, PITCH}).select(1, PLACE), of_group);
  }
  own.factors = factors;
}

std::tuple<at::Tensor, at::Tensor> PenaltyTable::run(const std::vector<double>& factors, double ewc_lambda) {
  const c10::DeviceGuard guard(options_.device());
  // Adapters without elements have no item that would write their gradients, or a loss.
  const auto allocate = [&](at::IntArrayRef size) { return holes_ ? at::zeros(size, options_) : at::empty(size, options_); };
  at::Tensor grads = allocate({length_});
  if (groups_.empty()) return {at::zeros({}, options_), grads};
  at::Tensor losses = groups_.size() == 1 ? at::empty({}, options_) : at::empty({int64_t(groups_.size())}, options_);
  const cudaStream_t stream = current_stream(grads);
  const bool capturing = kept::capturing(grads);
  if (capturing && !held_ && !once_) {
    for (const Group& group : groups_) kept::hold(group.table);
    held_ = true;
  }
  // A graph has its own, which its replays set: later calls change those of the stream.
  Own of_graph = capturing || once_ ? make_own() : Own();
  Own& own = capturing || once_ ? of_graph : of_stream(stream);
  if (own.factors != factors) set_factors(own, factors);
  for (size_t i = 0; i < groups_.size(); ++i) {
    const Group& group = groups_[i];
    at::Tensor work = at::empty({group.work}, options_);
    Penalty p{};
    p.adapters = static_cast<const PenaltyAdapter*>(own.adapters[i].data_ptr());
    p.items = reinterpret_cast<const PenaltyItem*>(static_cast<const char*>(group.table.data_ptr()) + group.bytes_of_adapters());
    p.work = work.data_ptr<float>();
    p.counters = static_cast<uint32_t*>(own.counters[i].data_ptr());
    p.loss = losses.data_ptr<float>() + i;
    p.grads = grads.data_ptr<float>();
    p.n_items = int32_t(group.items.size());
    p.lambda = float(ewc_lambda);
    p.need_a = need_a_, p.need_b = need_b_, p.need_s = need_s_;
    check(launch_ewc_penalty(p, group.rp, precision_, group.loads, stream), "ewc_penalty", shape_);
  }
  return {groups_.size() == 1 ? losses : losses.sum(), grads};
}

}  // namespace fe::cuda
