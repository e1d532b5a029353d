// The EWC penalty on autograd's tape, whichever backend computed it: its gradients are there with the loss, and backward deals them out,
// hundreds of them in a step.
#pragma once
#include "tape.h"

namespace fe::recorded {

// Versions only grow, so that their sum tells whether one of the tensors has been written.
inline int64_t versions(const variable_list& tensors) {
  int64_t sum = 0;
  for (const at::Tensor& t : tensors)
    if (!t.is_inference()) sum += int64_t(t.unsafeGetTensorImpl()->version_counter().current_version());
  return sum;
}

struct EWCPenalty : torch::autograd::Function<EWCPenalty> {
  // Inputs: every A, every B, every s. flat: their gradients, of the kinds that `needs` asks for, in one tensor.
  static at::Tensor forward(AutogradContext* ctx, at::TensorList tensors, const std::vector<int64_t>& slots, const variable_list& fishers,
                            const std::vector<double>& scale_factors, double ewc_lambda, const std::vector<bool>& needs,
                            const at::Tensor& penalty, const at::Tensor& flat) {
    const int64_t adapters = int64_t(fishers.size());
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
    // For second derivatives. These are no outputs, so that no cycle keeps a graph alive, and outlive the step anyway: saved variables,
    // one each, would cost more than all of the rest.
    variable_list operands = fishers;
    operands.insert(operands.end(), tensors.begin(), tensors.end());
    ctx->saved_data["versions"] = versions(operands);
    ctx->saved_data["operands"] = std::move(operands);
    ctx->saved_data["slots"] = slots;
    ctx->saved_data["scale_factors"] = scale_factors;
    ctx->saved_data["ewc_lambda"] = ewc_lambda;
    ctx->saved_data["needs"] = std::vector<int64_t>(needs.begin(), needs.end());
    return penalty.variable_data();  // no view of an input: those refuse changes in place
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    const WithoutAutocast plain;
    const at::Tensor flat = ctx->get_saved_variables()[0];
    const bool followed = is_followed(outputs);
    const variable_list found = followed ? differentiated(ctx, outputs[0]) : variable_list();
    const at::Tensor scaled = followed ? at::Tensor() : flat * outputs[0];
    const std::vector<int64_t> sizes = ctx->saved_data["sizes"].toIntVector();
    variable_list gradients(ctx->saved_data["tensors"].toInt() + 7);  // what is no A, B or s has none
    int64_t start = 0;
    size_t next = 0;
    for (size_t at = 0; at < sizes.size(); ++next) {
      const size_t input = size_t(sizes[at]), dims = size_t(sizes[at + 2]);
      const at::IntArrayRef shape(sizes.data() + at + 3, dims);
      const int64_t strides[2] = {dims == 2 ? shape[1] : 1, 1};
      if (ctx->needs_input_grad(input))
        gradients[input] =
            followed ? found[next] : scaled.as_strided(shape, at::IntArrayRef(strides, dims), start).to(at::ScalarType(sizes[at + 1]));
      start += c10::multiply_integers(shape);
      at += 3 + dims;
    }
    return gradients;
  }

  // The gradients as tensors with a graph, in the order of `flat`.
  static variable_list differentiated(AutogradContext* ctx, const at::Tensor& gradient) {
    const variable_list operands = ctx->saved_data["operands"].toTensorVector();
    TORCH_CHECK(ctx->saved_data["versions"].toInt() == versions(operands),
                "ewc_penalty: a Fisher, adapter or scale has been modified by an inplace operation since the penalty was computed, so that "
                "its second derivatives cannot be; compute the penalty again");
    const std::vector<double> scale_factors = ctx->saved_data["scale_factors"].toDoubleVector();
    const size_t adapters = scale_factors.size();
    const auto inputs = at::TensorList(operands).slice(adapters);
    const variable_list all = spread(inputs, ctx->saved_data["slots"].toIntVector(), int64_t(3 * adapters));
    const auto of_kind = [&](size_t kind) { return at::TensorList(all).slice(kind * adapters, adapters).vec(); };
    Optionals scales;
    for (const at::Tensor& s : of_kind(2)) scales.push_back(given(s));
    const std::vector<int64_t> needs = ctx->saved_data["needs"].toIntVector();
    return differentiable("ewc_penalty_backward", gradient, at::TensorList(operands).slice(0, adapters).vec(), of_kind(0), of_kind(1),
                          scales, scale_factors, ctx->saved_data["ewc_lambda"].toDouble(), std::vector<bool>(needs.begin(), needs.end()));
  }

  // What Python calls: the penalty, differentiable in the tensors of its adapters.
  static at::Tensor call(const variable_list& fishers, const variable_list& lora_as, const variable_list& lora_bs, const Optionals& scales,
                         const std::vector<double>& scale_factors, double ewc_lambda, const std::vector<bool>& needs,
                         const at::Tensor& penalty, const at::Tensor& flat) {
    Inputs inputs;
    inputs.add(lora_as, lora_bs, scales);
    return EWCPenalty::apply(at::TensorList(inputs.tensors), inputs.slots, fishers, scale_factors, ewc_lambda, needs, penalty, flat);
  }
};

}  // namespace fe::recorded
