// SPDX-License-Identifier: Apache-2.0
// What every recorded operation shares: inputs of which some are missing, backwards that are differentiated again, and sums that autocast
// leaves alone.
#pragma once
#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

namespace fe::recorded {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Optionals = std::vector<std::optional<at::Tensor>>;

inline std::optional<at::Tensor> given(const at::Tensor& t) {
  return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
}

// A new node of a graph, as this version of PyTorch holds them.
template <class Made>
auto make_node() {
  using Held = decltype(torch::autograd::Edge::function);
  if constexpr (std::is_same_v<Held, std::shared_ptr<torch::autograd::Node>>)
    return std::make_shared<Made>();
  else
    return c10::make_intrusive<Made>();
}

// Autograd takes tensors that are there. `slots` says which of the inputs they are.
struct Inputs {
  variable_list tensors;
  std::vector<int64_t> slots;
  int64_t count = 0;

  void add(const std::optional<at::Tensor>& t) {
    if (t && t->defined()) {
      tensors.push_back(*t);
      slots.push_back(count);
    }
    ++count;
  }
  // Of adapters, in the order in which the ops have their gradients.
  void add(const std::vector<at::Tensor>& lora_as, const std::vector<at::Tensor>& lora_bs, const Optionals& scales) {
    for (const auto& a : lora_as) add(a);
    for (const auto& b : lora_bs) add(b);
    for (const auto& s : scales) add(s);
  }
};

// All inputs again, undefined where they are missing.
inline variable_list spread(at::TensorList tensors, const std::vector<int64_t>& slots, int64_t count) {
  variable_list all(count);
  for (size_t i = 0; i < slots.size(); ++i) all[slots[i]] = tensors[i];
  return all;
}

// Whether a kernel would lose something of a backward: a graph of it is made (create_graph=True), or its gradients are batched, dual or
// wrapped in another way.
inline bool is_followed(const variable_list& outputs) {
  const auto wrapped = [](const at::Tensor& gradient) {
    return gradient.defined() && (!(gradient.key_set() & at::kTensorSubclassLike).empty() || gradient._fw_grad(/*level=*/0).defined());
  };
  return at::GradMode::is_enabled() || std::any_of(outputs.begin(), outputs.end(), wrapped);
}

// The gradients by a function of reference/differentiable.py, which can be differentiated again.
template <class... Arguments>
variable_list differentiable(const char* function, const Arguments&... arguments) {
  const pybind11::gil_scoped_acquire locked;
  return pybind11::module_::import("fused_ewclora.reference.differentiable").attr(function)(arguments...).template cast<variable_list>();
}

// Autocast has chosen the dtypes of the inputs; products inside keep theirs.
struct WithoutAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

}  // namespace fe::recorded
