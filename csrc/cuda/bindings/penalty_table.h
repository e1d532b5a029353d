// SPDX-License-Identifier: Apache-2.0
// A prepared call of the EWC penalty, or of the l1 norm: the table of adapters and the items of work in device memory.
#pragma once
#include "../ewc_penalty.h"
#include "call_table.h"

namespace fe::cuda {

class PenaltyTable : public CallTable {
 public:
  explicit PenaltyTable(const PenaltyArguments& arguments);

  int64_t items() const;

 protected:
  PenaltyTable(const PenaltyArguments& checked, const char* op);

 private:
  // Adapters whose F is read in the same way: one launch.
  struct Group {
    FisherLoads loads;
    int rp;
    std::vector<PenaltyAdapter> adapters;
    std::vector<PenaltyItem> items;
    std::vector<size_t> members;  // which adapters of the call
  };

  void add(const PenaltyArguments& arguments, size_t i);
  void lay_out(Group& group);
  cudaError_t start(size_t index, const Memory& memory, float ewc_lambda, cudaStream_t stream) const override;

  Precision precision_;
  std::vector<Group> groups_;
};

class L1Table : public PenaltyTable {
 public:
  explicit L1Table(const PenaltyArguments& arguments);  // no fishers
};

}  // namespace fe::cuda
