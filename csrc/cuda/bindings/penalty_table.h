// A prepared call of the EWC penalty: the table of adapters and the items of work in device memory.
#pragma once
#include <map>
#include <vector>

#include "../ewc_penalty.h"
#include "tensors.h"

namespace fe::cuda {

// The tensors of a call; `scales` may hold undefined tensors.
struct PenaltyArguments {
  Tensors fishers, lora_as, lora_bs, scales;
  std::vector<double> factors;
  std::vector<bool> needs;  // A, B, s
};

// Everything about a call that does not depend on values. Owns the table in device memory, which stays valid while the tensors it was made
// from stay where they are; it holds none of them. One that is made inside the capture of a CUDA graph is for that graph alone.
class PenaltyTable {
 public:
  explicit PenaltyTable(const PenaltyArguments& arguments);

  // Loss (0-d) and flat gradients in fp32, launched on the current stream, with a factor for each adapter.
  std::tuple<at::Tensor, at::Tensor> run(const std::vector<double>& factors, double ewc_lambda);

  int64_t items() const;
  // Whether it is for the graph that was being captured.
  bool once() const { return once_; }

 private:
  // Adapters whose F is read in the same way: one launch.
  struct Group {
    FisherLoads loads;
    int rp;
    std::vector<PenaltyAdapter> adapters;
    std::vector<PenaltyItem> items;
    std::vector<size_t> members;  // which adapters of the call
    at::Tensor table;             // bytes: the adapters, then the items
    int64_t work = 0, counters = 0;

    size_t bytes_of_adapters() const { return adapters.size() * sizeof(PenaltyAdapter); }
  };
  // What the launches of one stream, or of one graph, share: they run one after another. Of each group the adapters with their factors, and
  // counters, which are 0 before and after a launch.
  struct Own {
    std::vector<at::Tensor> adapters, counters;
    std::vector<double> factors;
  };

  void add(const PenaltyArguments& arguments, size_t i);
  void lay_out(Group& group);
  Own make_own() const;
  Own& of_stream(cudaStream_t stream);
  void set_factors(Own& own, const std::vector<double>& factors) const;

  at::TensorOptions options_;
  Precision precision_;
  std::string shape_;
  bool need_a_, need_b_, need_s_, holes_ = false;
  int multiprocessors_;
  int64_t length_ = 0;                            // of the flat gradients
  int64_t next_a_ = 0, next_b_ = 0, next_s_ = 0;  // where those of the next adapter begin
  std::vector<Group> groups_;
  at::Tensor like_;           // without elements, on the device
  bool held_ = false, once_;  // for a graph that was captured; for the one that is being captured
  std::map<cudaStream_t, Own> streams_;
};

}  // namespace fe::cuda
