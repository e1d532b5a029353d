// SPDX-License-Identifier: Apache-2.0
// The arguments of a penalty in the common form, as they come from Python: checked, and taken apart, in one pass. A training step hands over
// hundreds of tensors.
#pragma once
#include <pybind11/pybind11.h>

#include "../autograd/ewc_penalty.h"

namespace fe::penalty {

// Whether the lists or tuples of a merge have the common form: what is written has memory of its own, apart from what is read, and
// everything fits together by the rules of fused_ewclora/ops/checks.py. Where this says no, those rules have to be asked.
bool is_merge(const pybind11::handle& weights, const pybind11::handle& lora_as, const pybind11::handle& lora_bs,
              const pybind11::handle& scales);

struct Terms {
  recorded::PenaltyOperands operands;
  int64_t rank = 0;     // the largest
  bool numbers = true;  // whether every scale is a number

  // The terms of lists or tuples as an op takes them, if everything has the common form, which fits together by the rules of
  // fused_ewclora/ops/checks.py; None where those rules have to be asked, in whose words errors come.
  static std::shared_ptr<Terms> of(const std::string& op, const pybind11::handle& fishers, const pybind11::handle& lora_as,
                                   const pybind11::handle& lora_bs, const pybind11::handle& scales);

  // The penalty on autograd's tape; `flat` has the gradients of the kinds that the operands need.
  at::Tensor record(double ewc_lambda, const at::Tensor& penalty, const at::Tensor& flat);

  // Adds the gradients to `.grad` of what requires them; false where nothing was done, because `.grad` has not the common form.
  bool add_gradients(const at::Tensor& flat) const;
};

}  // namespace fe::penalty
