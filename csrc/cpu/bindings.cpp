// SPDX-License-Identifier: Apache-2.0
// The extension module fused_ewclora._C: one function per op, under the op's name.
#include "../eager/bindings.h"

#include <torch/csrc/utils/pybind.h>

#include "../autograd/ewc_penalty.h"
#include "../penalty/bindings.h"
#include "../plans/bindings.h"
#include "tensors.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "CPU kernels of fused_ewclora; called through fused_ewclora.ops";
  using Unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("lora_linear", &fe::lora_linear, Unlocked());
  m.def("lora_linear_backward", &fe::lora_linear_backward, Unlocked());
  m.def("ewc_penalty", &fe::ewc_penalty, Unlocked());
  m.def("ewc_penalty_recorded", &fe::recorded::EWCPenalty::call, Unlocked());
  m.def("l1_penalty", &fe::l1_penalty, Unlocked());
  m.def("factored_penalty", &fe::factored_penalty, Unlocked());
  m.def("fisher_accumulate_", &fe::fisher_accumulate, Unlocked());
  m.def("fisher_sums_", &fe::fisher_sums, Unlocked());
  m.def("merge_", &fe::merge, Unlocked());
  m.def("soft_threshold_", &fe::soft_threshold, Unlocked());
  fe::plans::bind(m);
  fe::eager::bind(m);
  fe::penalty::bind(m);
  m.def("instruction_set", [] { return std::string(fe::kernels().name); }, "Name of the instruction set that the kernels use here.");
}
