// SPDX-License-Identifier: Apache-2.0
// A prepared call of the penalty of factored Fishers.
#pragma once
#include "../factored_penalty.h"
#include "call_table.h"

namespace fe::cuda {

class FactoredTable : public CallTable {
 public:
  explicit FactoredTable(const PenaltyArguments& arguments);  // fishers: the row sums of all adapters, then their column sums

 private:
  void add(const PenaltyArguments& arguments, size_t i);
  void lay_out();
  cudaError_t start(size_t index, const Memory& memory, float ewc_lambda, cudaStream_t stream) const override;

  int rp_ = 0;
  std::vector<FactoredAdapter> adapters_;
  std::vector<size_t> members_;  // which adapters of the call
  int32_t items_ = 0;
};

}  // namespace fe::cuda
