// The EWC penalty on autograd's tape, whichever backend computed it: its gradients are there with the loss, and backward deals them out,
// hundreds of them in a step.
#pragma once
#include "tape.h"

namespace fe::recorded {

struct EWCPenalty : torch::autograd::Function<EWCPenalty> {
  // Inputs: every A, every B, every s of `adapters`. flat: their gradients, of the kinds that `needs` asks for, in one tensor.
  static at::Tensor forward(AutogradContext* ctx, at::TensorList tensors, const std::vector<int64_t>& slots, int64_t adapters,
                            const at::Tensor& penalty, const at::Tensor& flat, const std::vector<bool>& needs) {
    std::vector<int64_t> sizes;  // per gradient: which of `tensors` it belongs to, dtype, dimensions and sizes
    for (size_t i = 0; i < slots.size(); ++i) {
      if (!needs[slots[i] / adapters]) continue;
      const at::Tensor& t = tensors[i];
      sizes.insert(sizes.end(), {int64_t(i), int64_t(t.scalar_type()), t.dim()});
      sizes.insert(sizes.end(), t.sizes().begin(), t.sizes().end());
    }
    ctx->save_for_backward({flat});
    ctx->saved_data["sizes"] = sizes;
    ctx->saved_data["tensors"] = int64_t(tensors.size());
    return penalty.variable_data();  // no view of an input: those refuse changes in place
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    const bool graph_is_made = at::GradMode::is_enabled();
    const at::AutoGradMode off(false);
    const WithoutAutocast plain;
    const at::Tensor scaled = ctx->get_saved_variables()[0] * outputs[0];
    const std::vector<int64_t> sizes = ctx->saved_data["sizes"].toIntVector();
    variable_list gradients(ctx->saved_data["tensors"].toInt() + 5);  // slots, adapters, the penalty itself, flat and needs have none
    int64_t start = 0;
    for (size_t at = 0; at < sizes.size();) {
      const size_t input = size_t(sizes[at]), dims = size_t(sizes[at + 2]);
      const at::IntArrayRef shape(sizes.data() + at + 3, dims);
      const int64_t strides[2] = {dims == 2 ? shape[1] : 1, 1};
      if (ctx->needs_input_grad(input))
        gradients[input] = scaled.as_strided(shape, at::IntArrayRef(strides, dims), start).to(at::ScalarType(sizes[at + 1]));
      start += c10::multiply_integers(shape);
      at += 3 + dims;
    }
    return once(std::move(gradients), "ewc_penalty", graph_is_made);
  }

  // What Python calls: the penalty, differentiable in the tensors of its adapters.
  static at::Tensor call(const std::vector<at::Tensor>& lora_as, const std::vector<at::Tensor>& lora_bs, const Optionals& scales,
                         const at::Tensor& penalty, const at::Tensor& flat, const std::vector<bool>& needs) {
    Inputs inputs;
    inputs.add(lora_as, lora_bs, scales);
    return EWCPenalty::apply(at::TensorList(inputs.tensors), inputs.slots, int64_t(lora_as.size()), penalty, flat, needs);
  }
};

}  // namespace fe::recorded
