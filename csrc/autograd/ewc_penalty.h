// The EWC penalty on autograd's tape, whichever backend computed it: its gradients are there with the loss, and backward deals them out,
// hundreds of them in a step.
#pragma once
#include "tape.h"

namespace fe::recorded {

// What the penalty was computed from, for its second derivatives. Nothing here is an output, so that no cycle keeps a graph alive, and
// everything outlives the step anyway: saved variables, one each, would cost more than all of the rest.
struct PenaltyOperands : torch::CustomClassHolder {
  std::vector<at::Tensor> fishers, lora_as, lora_bs;
  Optionals scales;
  std::vector<double> scale_factors;
  double ewc_lambda;
  std::vector<bool> needs;
  int64_t versions = 0;

  PenaltyOperands(std::vector<at::Tensor> fishers, std::vector<at::Tensor> lora_as, std::vector<at::Tensor> lora_bs, Optionals scales,
                  std::vector<double> scale_factors, double ewc_lambda, std::vector<bool> needs)
      : fishers(std::move(fishers)),
        lora_as(std::move(lora_as)),
        lora_bs(std::move(lora_bs)),
        scales(std::move(scales)),
        scale_factors(std::move(scale_factors)),
        ewc_lambda(ewc_lambda),
        needs(std::move(needs)),
        versions(current_versions()) {}

  // Versions only grow, so that their sum tells whether one of the tensors has been written.
  int64_t current_versions() const {
    int64_t sum = 0;
    const auto add = [&](const at::Tensor& t) { sum += t.is_inference() ? 0 : int64_t(t._version()); };
    for (const auto* tensors : {&fishers, &lora_as, &lora_bs}) std::for_each(tensors->begin(), tensors->end(), add);
    for (const auto& s : scales)
      if (s) add(*s);
    return sum;
  }
  void check_unchanged() const {
    TORCH_CHECK(versions == current_versions(),
                "ewc_penalty: a Fisher, adapter or scale has been modified by an inplace operation since the penalty was computed, so that "
                "its second derivatives cannot be; compute the penalty again");
  }
};

struct EWCPenalty : torch::autograd::Function<EWCPenalty> {
  // Inputs: every A, every B, every s of `operands`. flat: their gradients, of the kinds that `needs` asks for, in one tensor.
  static at::Tensor forward(AutogradContext* ctx, at::TensorList tensors, const std::vector<int64_t>& slots, const at::Tensor& penalty,
                            const at::Tensor& flat, const c10::intrusive_ptr<PenaltyOperands>& operands) {
    const int64_t adapters = int64_t(operands->lora_as.size());
    std::vector<int64_t> sizes;  // per gradient: which of `tensors` it belongs to, dtype, dimensions and sizes
    for (size_t i = 0; i < slots.size(); ++i) {
      if (!operands->needs[slots[i] / adapters]) continue;
      const at::Tensor& t = tensors[i];
      sizes.insert(sizes.end(), {int64_t(i), int64_t(t.scalar_type()), t.dim()});
      sizes.insert(sizes.end(), t.sizes().begin(), t.sizes().end());
    }
    ctx->save_for_backward({flat});
    ctx->saved_data["sizes"] = sizes;
    ctx->saved_data["tensors"] = int64_t(tensors.size());
    ctx->saved_data["operands"] = c10::IValue::make_capsule(operands);
    return penalty.variable_data();  // no view of an input: those refuse changes in place
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    const WithoutAutocast plain;
    const at::Tensor flat = ctx->get_saved_variables()[0];
    const bool followed = is_followed(outputs);
    const variable_list found = followed ? differentiated(ctx, outputs[0]) : variable_list();
    const at::Tensor scaled = followed ? at::Tensor() : flat * outputs[0];
    const std::vector<int64_t> sizes = ctx->saved_data["sizes"].toIntVector();
    variable_list gradients(ctx->saved_data["tensors"].toInt() + 4);  // slots, the penalty itself, flat and operands have none
    int64_t start = 0;
    size_t next = 0;
    for (size_t at = 0; at < sizes.size(); ++next) {
      const size_t input = size_t(sizes[at]), dims = size_t(sizes[at + 2]);
      const at::IntArrayRef shape(sizes.data() + at + 3, dims);
      const int64_t strides[2] = {dims == 2 ? shape[1] : 1, 1};
      if (ctx->needs_input_grad(input))
        gradients[input] = followed ? found[next]
                                    : scaled.as_strided(shape, at::IntArrayRef(strides, dims), start).to(at::ScalarType(sizes[at + 1]));
      start += c10::multiply_integers(shape);
      at += 3 + dims;
    }
    return gradients;
  }

  // The gradients as tensors with a graph, in the order of `flat`.
  static variable_list differentiated(AutogradContext* ctx, const at::Tensor& gradient) {
    const auto operands = c10::static_intrusive_pointer_cast<PenaltyOperands>(ctx->saved_data["operands"].toCapsule());
    operands->check_unchanged();
    return differentiable("ewc_penalty_backward", gradient, operands->fishers, operands->lora_as, operands->lora_bs, operands->scales,
                          operands->scale_factors, operands->ewc_lambda, operands->needs);
  }

  // What Python calls: the penalty, differentiable in the tensors of its adapters.
  static at::Tensor call(std::vector<at::Tensor> fishers, std::vector<at::Tensor> lora_as, std::vector<at::Tensor> lora_bs,
                         Optionals scales, std::vector<double> scale_factors, double ewc_lambda, std::vector<bool> needs,
                         const at::Tensor& penalty, const at::Tensor& flat) {
    Inputs inputs;
    inputs.add(lora_as, lora_bs, scales);
    const auto operands =
        c10::make_intrusive<PenaltyOperands>(std::move(fishers), std::move(lora_as), std::move(lora_bs), std::move(scales),
                                             std::move(scale_factors), ewc_lambda, std::move(needs));
    return EWCPenalty::apply(at::TensorList(inputs.tensors), inputs.slots, penalty, flat, operands);
  }
};

}  // namespace fe::recorded
