// SPDX-License-Identifier: Apache-2.0
// The LoRA linear by plans of the Triton hosts, on autograd's tape.
#pragma once
#include <torch/csrc/utils/pybind.h>

#include "../autograd/lora_linear.h"
#include "plan.h"

namespace fe::plans {

// What keys of the forward and of the backward hold.
Arguments described(const recorded::LinearCall& call);
Arguments described(const at::Tensor& dy, const at::Tensor& z, const recorded::LinearCall& call, const std::vector<bool>& needs,
                    at::TensorList again);

// Two hosts, each with the Python function that is called where no plan fits: (host, arguments, the host's arguments) -> its results.
struct LinearHosts final : recorded::LinearBackend {
  // That of the backend of two hosts, made when it is first asked for.
  static uintptr_t address(Host& forward, pybind11::object forward_missed, Host& backward, pybind11::object backward_missed);

  LinearHosts(Host& forward, pybind11::object forward_missed, Host& backward, pybind11::object backward_missed)
      : forward_(forward),
        backward_(backward),
        forward_missed_(forward_missed.release().ptr()),
        backward_missed_(backward_missed.release().ptr()) {}

  recorded::variable_list forward(const recorded::LinearCall& call) const override;
  recorded::variable_list backward(const at::Tensor& dy, const at::Tensor& z, const recorded::LinearCall& call,
                                   const std::vector<bool>& needs, at::TensorList again) const override;

 private:
  Host &forward_, &backward_;
  PyObject *forward_missed_, *backward_missed_;  // never let go, as backends are not
};

}  // namespace fe::plans
