// SPDX-License-Identifier: Apache-2.0
// A penalty on autograd's tape, whichever backend computed it: its gradients are there with the loss, and backward deals them out,
// hundreds of them in a step.
#pragma once
#include <ATen/ops/as_strided_native.h>

#include <string>

#include "../plain.h"
#include "tape.h"

namespace fe::recorded {

// What a penalty was computed from, for its second derivatives. These are no outputs, so that no cycle keeps a graph alive, and outlive the
// step anyway: a saved variable for each would cost more than all of the rest.
struct PenaltyOperands {
  std::string op;
  variable_list fishers, tensors;  // fishers: of the op; tensors: every A, every B, every s that there is
  std::vector<int64_t> slots;
  std::vector<double> scale_factors;
  double ewc_lambda;
  std::vector<bool> needs;

  size_t adapters() const { return scale_factors.size(); }
  // Whether the gradients of tensor i are wanted, as those of all A, all B or all s are.
  bool needed(size_t i) const { return needs[slots[i] / adapters()]; }

  // Versions only grow, so that their sum tells whether one of the tensors has been written.
  int64_t versions() const {
    int64_t sum = 0;
    for (const variable_list* list : {&fishers, &tensors})
      for (const at::Tensor& t : *list)
        if (!t.is_inference()) sum += int64_t(t.unsafeGetTensorImpl()->version_counter().current_version());
    return sum;
  }

  static void forget(void* operands) { delete static_cast<PenaltyOperands*>(operands); }

  // An empty tensor that owns them: one saved variable, which everything that handles graphs knows how to keep.
  static at::Tensor kept(PenaltyOperands operands) {
    c10::DataPtr owner(nullptr, new PenaltyOperands(std::move(operands)), &forget, at::kCPU);
    return at::detail::make_tensor<at::TensorImpl>(c10::Storage(c10::Storage::use_byte_size_t(), 0, std::move(owner)),
                                                   c10::DispatchKeySet(c10::DispatchKey::CPU), caffe2::TypeMeta::Make<uint8_t>());
  }
  static const PenaltyOperands& of(const at::Tensor& owner) {
    const auto* operands = owner.storage().data_ptr().cast_context<PenaltyOperands>(&forget);
    TORCH_CHECK(operands, "a penalty: hooks on saved tensors replaced what its second derivatives are computed from");
    return *operands;
  }
};

// The gradient from element `start` of `flat` on, in shape and dtype of its input. A view without the dispatcher, where there is nothing for
// it to see: hundreds are dealt out in a step.
inline at::Tensor part(const at::Tensor& flat, at::IntArrayRef shape, int64_t start, at::ScalarType dtype) {
  const int64_t strides[2] = {shape.size() == 2 ? shape[1] : 1, 1};
  const at::IntArrayRef steps(strides, shape.size());
  const at::Tensor view =
      is_plain(flat) ? at::native::as_strided_tensorimpl(flat, shape, steps, start) : flat.as_strided(shape, steps, start);
  return flat.scalar_type() == dtype ? view : view.to(dtype);
}

struct EWCPenalty : torch::autograd::Function<EWCPenalty> {
  // Puts a penalty on the tape whose gradients are `flat`, one after another, of the kinds that the operands need. What Function::apply does,
  // without the descriptions that it makes of every input: they take as long as all of the rest.
  static at::Tensor record(PenaltyOperands operands, const at::Tensor& penalty, const at::Tensor& flat) {
    const auto node = make_node<torch::autograd::CppNode<EWCPenalty>>();
    node->is_variable_input_.assign(operands.tensors.size(), true);
    node->set_ctx_grad_fn(node);
    node->set_next_edges(torch::autograd::collect_next_edges(operands.tensors));
    node->ctx_.saved_data["sizes"] = sizes(operands);
    node->ctx_.saved_data["versions"] = operands.versions();
    node->ctx_.save_for_backward({flat, PenaltyOperands::kept(std::move(operands))});
    at::Tensor result = penalty.variable_data();  // no view of an input: those refuse changes in place
    torch::autograd::create_gradient_edge(result, node);
    node->output_info_.emplace_back(result);
    node->save_variables_to_ctx();
    return result;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    const WithoutAutocast plain;
    const variable_list saved = ctx->get_saved_variables();
    const bool followed = is_followed(outputs);
    const variable_list found = followed ? differentiated(ctx, saved[1], outputs[0]) : variable_list();
    const at::Tensor scaled = followed ? at::Tensor() : saved[0] * outputs[0];
    const std::vector<int64_t> sizes = ctx->saved_data["sizes"].toIntVector();
    variable_list gradients(sizes[0]);
    int64_t start = 0;
    size_t next = 0;
    for (size_t at = 1; at < sizes.size(); ++next) {
      const size_t input = size_t(sizes[at]), dims = size_t(sizes[at + 2]);
      const at::IntArrayRef shape(sizes.data() + at + 3, dims);
      if (ctx->needs_input_grad(input))
        gradients[input] = followed ? found[next] : part(scaled, shape, start, at::ScalarType(sizes[at + 1]));
      start += c10::multiply_integers(shape);
      at += 3 + dims;
    }
    return gradients;
  }

  // The number of inputs, and per gradient which of them it belongs to, dtype, dimensions and sizes.
  static std::vector<int64_t> sizes(const PenaltyOperands& operands) {
    std::vector<int64_t> found{int64_t(operands.tensors.size())};
    found.reserve(1 + 5 * operands.tensors.size());
    for (size_t i = 0; i < operands.slots.size(); ++i) {
      if (!operands.needed(i)) continue;
      const at::Tensor& t = operands.tensors[i];
      found.insert(found.end(), {int64_t(i), int64_t(t.scalar_type()), t.dim()});
      found.insert(found.end(), t.sizes().begin(), t.sizes().end());
    }
    return found;
  }

  // The gradients as tensors with a graph, in the order of `flat`.
  static variable_list differentiated(AutogradContext* ctx, const at::Tensor& owner, const at::Tensor& gradient) {
    const PenaltyOperands& operands = PenaltyOperands::of(owner);
    TORCH_CHECK(ctx->saved_data["versions"].toInt() == operands.versions(), operands.op,
                ": a Fisher, adapter or scale has been modified by an inplace operation since the penalty was computed, so that "
                "its second derivatives cannot be; compute the penalty again");
    const size_t adapters = operands.adapters();
    const variable_list all = spread(operands.tensors, operands.slots, int64_t(3 * adapters));
    const auto of_kind = [&](size_t kind) { return at::TensorList(all).slice(kind * adapters, adapters).vec(); };
    Optionals scales;
    for (const at::Tensor& s : of_kind(2)) scales.push_back(given(s));
    return differentiable(function_of(operands.op), gradient, operands.fishers, of_kind(0), of_kind(1), scales, operands.scale_factors,
                          operands.ewc_lambda, operands.needs);
  }

  // In fused_ewclora/reference/differentiable.py.
  static const char* function_of(const std::string& op) {
    return op == "ewc_penalty" ? "ewc_penalty_backward" : op == "l1_penalty" ? "l1_penalty_backward" : "kronecker_penalty_backward";
  }

  // What Python calls: the penalty, differentiable in the tensors of its adapters.
  static at::Tensor call(const std::string& op, const variable_list& fishers, const variable_list& lora_as, const variable_list& lora_bs,
                         const Optionals& scales, const std::vector<double>& scale_factors, double ewc_lambda,
                         const std::vector<bool>& needs, const at::Tensor& penalty, const at::Tensor& flat) {
    Inputs inputs;
    inputs.add(lora_as, lora_bs, scales);
    return record({op, fishers, std::move(inputs.tensors), std::move(inputs.slots), scale_factors, ewc_lambda, needs}, penalty, flat);
  }
};

}  // namespace fe::recorded
