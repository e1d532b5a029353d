// SPDX-License-Identifier: Apache-2.0
#include "lora_linear.h"

#include <bit>
#include <map>

namespace fe::plans {
namespace {

namespace py = pybind11;
using recorded::given;
using recorded::LinearCall;
using recorded::variable_list;

void add_common(Arguments& made, const LinearCall& call) {
  const size_t adapters = call.lora_as.size();
  made.decisions.reserve(4 + adapters + call.rows.size());
  made.decisions.push_back(int64_t(adapters));
  for (const double factor : call.scale_factors) made.decisions.push_back(std::bit_cast<int64_t>(factor));
  made.decisions.push_back(int64_t(call.rows.size()));
  made.decisions.insert(made.decisions.end(), call.rows.begin(), call.rows.end());
  made.decisions.push_back(std::bit_cast<int64_t>(call.dropout_p));
  made.tensors.insert(made.tensors.end(), call.lora_as.begin(), call.lora_as.end());
  made.tensors.insert(made.tensors.end(), call.lora_bs.begin(), call.lora_bs.end());
  for (const auto& s : call.scales) made.tensors.push_back(s.value_or(at::Tensor()));
  made.tensors.push_back(call.seed);
}

}  // namespace

Arguments described(const LinearCall& call) {
  Arguments made;
  made.tensors.reserve(4 + 3 * call.lora_as.size());
  made.tensors = {call.x, call.weight, call.bias};
  add_common(made, call);
  return made;
}

Arguments described(const at::Tensor& dy, const at::Tensor& z, const LinearCall& call, const std::vector<bool>& needs,
                    at::TensorList again) {
  Arguments made;
  made.tensors.reserve(8 + 3 * call.lora_as.size());
  made.tensors = {dy, call.x, call.weight, call.bias, z};
  add_common(made, call);
  made.tensors.insert(made.tensors.end(), again.begin(), again.end());
  made.decisions.push_back(int64_t(again.size()));
  int64_t bits = 1, place = 0;
  for (const bool need : needs) {
    bits |= int64_t(need) << ++place;
    if (place < 62) continue;
    made.decisions.push_back(bits);
    bits = 1, place = 0;
  }
  made.decisions.push_back(bits);
  return made;
}

uintptr_t LinearHosts::address(Host& forward, py::object forward_missed, Host& backward, py::object backward_missed) {
  static auto* all = new std::map<std::pair<Host*, Host*>, std::unique_ptr<LinearHosts>>;  // under the GIL
  auto& found = (*all)[{&forward, &backward}];
  if (!found) found = std::make_unique<LinearHosts>(forward, std::move(forward_missed), backward, std::move(backward_missed));
  return reinterpret_cast<uintptr_t>(static_cast<const recorded::LinearBackend*>(found.get()));
}

variable_list LinearHosts::forward(const LinearCall& c) const {
  Arguments arguments = described(c);
  if (auto found = forward_.replay(arguments)) return std::move(*found);
  const py::gil_scoped_acquire locked;
  const auto missed = py::reinterpret_borrow<py::object>(forward_missed_);
  return missed(py::cast(forward_, py::return_value_policy::reference), py::cast(std::move(arguments)), c.x, c.weight, given(c.bias),
                c.lora_as, c.lora_bs, c.scales, c.scale_factors, c.rows, c.dropout_p, given(c.seed))
      .cast<variable_list>();
}

variable_list LinearHosts::backward(const at::Tensor& dy, const at::Tensor& z, const LinearCall& c, const std::vector<bool>& needs,
                                    at::TensorList again) const {
  Arguments arguments = described(dy, z, c, needs, again);
  if (auto found = backward_.replay(arguments)) return std::move(*found);
  const py::gil_scoped_acquire locked;
  const auto missed = py::reinterpret_borrow<py::object>(backward_missed_);
  return missed(py::cast(backward_, py::return_value_policy::reference), py::cast(std::move(arguments)), dy, given(c.x), c.weight,
                given(c.bias), given(z), c.lora_as, c.lora_bs, c.scales, c.scale_factors, c.rows, c.dropout_p, given(c.seed), needs,
                again.vec())
      .cast<variable_list>();
}

}  // namespace fe::plans
