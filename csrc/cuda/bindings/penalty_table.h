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
// from stay where they are; it holds none of them.
class PenaltyTable {
 public:
  explicit PenaltyTable(const PenaltyArguments& arguments);

  // Loss (0-d) and flat gradients in fp32, launched on the current stream.
  std::tuple<at::Tensor, at::Tensor> run(double ewc_lambda);

  int64_t items() const;

 private:
  // Adapters whose F is read in the same way: one launch.
  struct Group {
    FisherLoads loads;
    int rp;
    std::vector<PenaltyAdapter> adapters;
    std::vector<PenaltyItem> items;
    at::Tensor table;  // bytes: the adapters, then the items
    int64_t work = 0, counters = 0;
  };

  void add(const PenaltyArguments& arguments, size_t i);
  void lay_out(Group& group);
  uint32_t* counters(size_t group, cudaStream_t stream, at::Tensor& fresh);

  at::TensorOptions options_;
  Precision precision_;
  std::string shape_;
  bool need_a_, need_b_, need_s_, holes_ = false;
  int multiprocessors_;
  int64_t length_ = 0;                            // of the flat gradients
  int64_t next_a_ = 0, next_b_ = 0, next_s_ = 0;  // where those of the next adapter begin
  std::vector<Group> groups_;
  std::map<std::pair<size_t, cudaStream_t>, at::Tensor> counters_;
};

}  // namespace fe::cuda
