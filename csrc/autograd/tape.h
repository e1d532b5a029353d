// What every recorded operation shares: inputs of which some are missing, gradients that are not differentiable themselves, and sums that
// autocast leaves alone.
#pragma once
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <string>
#include <vector>

namespace fe::recorded {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Optionals = std::vector<std::optional<at::Tensor>>;

inline std::optional<at::Tensor> given(const at::Tensor& t) {
  return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
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

// Which of the inputs want a gradient.
inline std::vector<bool> wanted(const AutogradContext* ctx, const std::vector<int64_t>& slots, int64_t count) {
  std::vector<bool> needs(count, false);
  for (size_t i = 0; i < slots.size(); ++i) needs[slots[i]] = ctx->needs_input_grad(i);
  return needs;
}

// Stands between a gradient and whoever would differentiate it: second derivatives would silently lack the part that runs through here.
struct Once : torch::autograd::Function<Once> {
  static variable_list forward(AutogradContext* ctx, at::TensorList gradients, const std::string& operation) {
    ctx->saved_data["operation"] = operation;
    variable_list same;
    for (const at::Tensor& gradient : gradients) same.push_back(gradient.variable_data());  // no view: those refuse changes in place
    return same;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    TORCH_CHECK(false, ctx->saved_data["operation"].toStringRef(), ": its gradients cannot be differentiated again");
  }
};

// The gradients as a backward returns them: where a graph of them is made (create_graph=True), one that raises when it is used.
inline variable_list once(variable_list gradients, const std::string& operation, bool graph_is_made) {
  if (!graph_is_made) return gradients;
  const at::AutoGradMode on(true);
  variable_list given;
  for (at::Tensor& gradient : gradients)
    if (gradient.defined()) given.push_back(gradient.detach().requires_grad_());
  const variable_list refused = Once::apply(at::TensorList(given), operation);
  size_t next = 0;
  for (at::Tensor& gradient : gradients)
    if (gradient.defined()) gradient = refused[next++];
  return gradients;
}

// Autocast has chosen the dtypes of the inputs; products inside keep theirs.
struct WithoutAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

}  // namespace fe::recorded
