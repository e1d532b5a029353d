// SPDX-License-Identifier: Apache-2.0
// What a prepared call of a penalty keeps in device memory: a table of its adapters and of the items of work, for each launch.
#pragma once
#include <map>
#include <vector>

#include "tensors.h"

namespace fe::cuda {

// The tensors of a call; `scales` may hold undefined tensors.
struct PenaltyArguments {
  Tensors fishers, lora_as, lora_bs, scales;
  std::vector<double> factors;
  std::vector<bool> needs;  // A, B, s
};

// Everything about a call that does not depend on values. Owns the tables in device memory, which stay valid while the tensors they were made
// from stay where they are; it holds none of them. One that is made inside the capture of a CUDA graph is for that graph alone.
class CallTable {
 public:
  virtual ~CallTable() = default;

  // Loss (0-d) and flat gradients in fp32, launched on the current stream, with a factor for each adapter.
  std::tuple<at::Tensor, at::Tensor> run(const std::vector<double>& factors, double ewc_lambda);

  // Whether it is for the graph that was being captured.
  bool once() const { return once_; }

 protected:
  explicit CallTable(const PenaltyArguments& checked);

  // Where an adapter's gradients begin in the flat ones; s < 0: not asked for. Adapters are asked about in order.
  struct Places {
    int64_t a, b, s;
  };
  Places next_places(const PenaltyArguments& arguments, size_t i);

  // Keeps what one launch reads: adapters, which have a member `factor`, and items. `members`: which adapters of the call these are; `work`
  // and `counters`: how many floats and counters a launch needs.
  template <class Adapter, class Item>
  void keep(const std::vector<Adapter>& adapters, const std::vector<Item>& items, std::vector<size_t> members, int64_t work,
            int64_t counters) {
    static_assert(sizeof(Adapter) % sizeof(float) == 0 && offsetof(Adapter, factor) % sizeof(float) == 0);
    Kept kept{std::move(members), {}, adapters.size() * sizeof(Adapter), sizeof(Adapter), offsetof(Adapter, factor), work, counters};
    keep(std::move(kept), adapters.data(), items.data(), items.size() * sizeof(Item));
  }

  // The memory of one launch.
  struct Memory {
    const void *adapters, *items;
    float* work;
    uint32_t* counters;
    float *loss, *grads;
  };
  // The launch of what was kept as number `index`.
  virtual cudaError_t start(size_t index, const Memory& memory, float ewc_lambda, cudaStream_t stream) const = 0;

  bool need_a_, need_b_, need_s_, holes_ = false;  // holes: gradients that no launch writes
  int multiprocessors_;
  const char* op_ = nullptr;  // for errors, with what it runs on
  std::string what_;

 private:
  struct Kept {
    std::vector<size_t> members;
    at::Tensor table;  // bytes: the adapters, then the items
    size_t adapters;   // bytes of all
    size_t pitch, factor;
    int64_t work, counters;
  };
  // What the launches of one stream, or of one graph, share: they run one after another. Of each launch the adapters with their factors, and
  // counters, which are 0 before and after it.
  struct Own {
    std::vector<at::Tensor> adapters, counters;
    std::vector<double> factors;
  };

  void keep(Kept kept, const void* adapters, const void* items, size_t bytes_of_items);
  Own make_own() const;
  Own& of_stream(cudaStream_t stream);
  void set_factors(Own& own, const std::vector<double>& factors) const;

  at::TensorOptions options_;
  int64_t next_a_ = 0, next_b_ = 0, next_s_ = 0;  // where the gradients of the next adapter begin
  int64_t length_;                                // of the flat gradients
  std::vector<Kept> launches_;
  at::Tensor like_;           // without elements, on the device
  bool held_ = false, once_;  // for a graph that was captured; for the one that is being captured
  std::map<cudaStream_t, Own> streams_;
};

}  // namespace fe::cuda
