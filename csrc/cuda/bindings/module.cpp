// SPDX-License-Identifier: Apache-2.0
// The extension module fused_ewclora._C_cuda: one function per op, under the op's name.
#include <torch/csrc/utils/pybind.h>

#include "../../autograd/lora_linear.h"
#include "ewc_penalty.h"
#include "tensors.h"
#ifdef FE_EMULATED
#include "../emulator/handing.h"
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "CUDA kernels of fused_ewclora; called through fused_ewclora.ops";
  using Unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("lora_linear", &fe::cuda::lora_linear, Unlocked());
  m.def("lora_linear_backward", &fe::cuda::lora_linear_backward, Unlocked());
  m.def("linear_backend", &fe::recorded::LinearFunctions<&fe::cuda::lora_linear, &fe::cuda::lora_linear_backward>::address);
  m.def("fisher_accumulate_", &fe::cuda::fisher_accumulate, Unlocked());
  m.def("fisher_sums_", &fe::cuda::fisher_sums, Unlocked());
  m.def("merge_", &fe::cuda::merge, Unlocked());
  m.def("soft_threshold_", &fe::cuda::soft_threshold, Unlocked());
  fe::cuda::bind_ewc_penalty(m);
#ifdef FE_EMULATED
  fe::cuda::emulator::bind_handing(m);
#endif
}
