// The extension module fused_ewclora._C: one function per op, under the op's name.
#include <torch/csrc/utils/pybind.h>

#include "../autograd/ewc_penalty.h"
#include "../autograd/lora_linear.h"
#include "../penalty/terms.h"
#include "tensors.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "CPU kernels of fused_ewclora; called through fused_ewclora.ops";
  using Unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("lora_linear", &fe::lora_linear, Unlocked());
  m.def("lora_linear_backward", &fe::lora_linear_backward, Unlocked());
  m.def("lora_linear_recorded", &fe::recorded::LoRALinear<&fe::lora_linear, &fe::lora_linear_backward>::call, Unlocked());
  m.def("ewc_penalty", &fe::ewc_penalty, Unlocked());
  m.def("ewc_penalty_recorded", &fe::recorded::EWCPenalty::call, Unlocked());
  m.def("are_plain", &fe::penalty::are_plain);
  m.def("is_merge", &fe::penalty::is_merge);
  using fe::penalty::Terms;
  pybind11::class_<Terms, std::shared_ptr<Terms>>(m, "PenaltyTerms", "The checked arguments of a penalty in the common form.")
      .def_static("of", &Terms::of)
      .def_readonly("rank", &Terms::rank)
      .def_readonly("numbers", &Terms::numbers)
      .def_property_readonly("needs", [](const Terms& terms) { return terms.operands.needs; })
      .def("record", &Terms::record, Unlocked())
      .def("add_gradients", &Terms::add_gradients, Unlocked());
  m.def("fisher_accumulate_", &fe::fisher_accumulate, Unlocked());
  m.def("merge_", &fe::merge, Unlocked());
  m.def("soft_threshold_", &fe::soft_threshold, Unlocked());
  m.def("instruction_set", [] { return std::string(fe::kernels().name); }, "Name of the instruction set that the kernels use here.");
}
