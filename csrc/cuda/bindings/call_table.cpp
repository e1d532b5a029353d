// SPDX-License-Identifier: Apache-2.0
// See call_table.h.
#include "call_table.h"

#include <cstring>

#include "kept.h"

namespace fe::cuda {

CallTable::CallTable(const PenaltyArguments& a)
    : need_a_(a.needs[0]),
      need_b_(a.needs[1]),
      need_s_(a.needs[2]),
      multiprocessors_(cuda::multiprocessors(a.lora_as[0])),
      options_(a.lora_as[0].options().dtype(at::kFloat).requires_grad(false)),
      like_(at::empty({0}, options_)),
      once_(kept::capturing(like_)) {
  for (const at::Tensor& lora_a : a.lora_as) next_b_ += need_a_ ? lora_a.numel() : 0;
  next_s_ = next_b_;
  for (const at::Tensor& lora_b : a.lora_bs) next_s_ += need_b_ ? lora_b.numel() : 0;
  length_ = next_s_;
  for (const at::Tensor& scale : a.scales) length_ += need_s_ && scale.defined() ? scale.numel() : 0;
}

CallTable::Places CallTable::next_places(const PenaltyArguments& a, size_t i) {
  const bool of_scale = need_s_ && a.scales[i].defined();
  const Places places{next_a_, next_b_, of_scale ? next_s_ : -1};
  next_a_ += a.lora_as[i].numel(), next_b_ += a.lora_bs[i].numel();
  next_s_ += of_scale ? a.scales[i].numel() : 0;
  return places;
}

void CallTable::keep(Kept kept, const void* adapters, const void* items, size_t bytes_of_items) {
  std::vector<char> bytes(kept.adapters + bytes_of_items);
  std::memcpy(bytes.data(), adapters, kept.adapters);
  std::memcpy(bytes.data() + kept.adapters, items, bytes_of_items);
  kept.table = (once_ ? kept::by_value : kept::copied)(bytes.data(), bytes.size(), like_);
  launches_.push_back(std::move(kept));
}

CallTable::Own CallTable::make_own() const {
  Own own;
  for (const Kept& launch : launches_) {
    own.adapters.push_back(launch.table.narrow(0, 0, int64_t(launch.adapters)).clone());
    own.counters.push_back(at::zeros({launch.counters}, options_.dtype(at::kInt)));
  }
  return own;
}

CallTable::Own& CallTable::of_stream(cudaStream_t stream) {
  const auto found = streams_.find(stream);
  if (found != streams_.end()) return found->second;
  Own own;
  kept::outside(like_, [&] { return own = make_own(), at::Tensor(); });
  for (const Kept& launch : launches_) kept::used(launch.table);
  return streams_.emplace(stream, std::move(own)).first->second;
}

// On the current stream, after the launches that read the earlier ones.
void CallTable::set_factors(Own& own, const std::vector<double>& factors) const {
  own.factors.clear();
  for (size_t i = 0; i < launches_.size(); ++i) {
    const Kept& launch = launches_[i];
    std::vector<double> of_launch;
    for (size_t member : launch.members) of_launch.push_back(factors[member]);
    const int64_t pitch = int64_t(launch.pitch / sizeof(float)), place = int64_t(launch.factor / sizeof(float));
    kept::write(own.adapters[i].view(at::kFloat).view({-1, pitch}).select(1, place), of_launch);
  }
  own.factors = factors;
}

std::tuple<at::Tensor, at::Tensor> CallTable::run(const std::vector<double>& factors, double ewc_lambda) {
  const c10::DeviceGuard guard(options_.device());
  const auto allocate = [&](at::IntArrayRef size) { return holes_ ? at::zeros(size, options_) : at::empty(size, options_); };
  at::Tensor grads = allocate({length_});
  if (launches_.empty()) return {at::zeros({}, options_), grads};
  at::Tensor losses = launches_.size() == 1 ? at::empty({}, options_) : at::empty({int64_t(launches_.size())}, options_);
  const cudaStream_t stream = current_stream(grads);
  const bool capturing = kept::capturing(grads);
  if (capturing && !held_ && !once_) {
    for (const Kept& launch : launches_) kept::hold(launch.table);
    held_ = true;
  }
  // A graph has its own, which its replays set: later calls change those of the stream.
  Own of_graph = capturing || once_ ? make_own() : Own();
  Own& own = capturing || once_ ? of_graph : of_stream(stream);
  if (own.factors != factors) set_factors(own, factors);
  for (size_t i = 0; i < launches_.size(); ++i) {
    const Kept& launch = launches_[i];
    const at::Tensor work = at::empty({launch.work}, options_);
    const Memory memory{own.adapters[i].data_ptr(),   static_cast<const char*>(launch.table.data_ptr()) + launch.adapters,
                        work.data_ptr<float>(),       static_cast<uint32_t*>(own.counters[i].data_ptr()),
                        losses.data_ptr<float>() + i, grads.data_ptr<float>()};
    check(start(i, memory, float(ewc_lambda), stream), op_, what_);
  }
  return {launches_.size() == 1 ? losses : losses.sum(), grads};
}

}  // namespace fe::cuda
