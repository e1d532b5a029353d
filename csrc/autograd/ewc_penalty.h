// The EWC penalty on autograd's tape, whichever backend computed it: its gradients are there with the loss, and backward deals them out,
// hundreds of them in a step.
#pragma once
#include "tape.h"

namespace fe::recorded {

// What a penalty was computed from, for its second derivatives. These are no outputs, so that no cycle keeps a graph alive, and outlive the
// step anyway: a saved variable for each would cost more than all of the rest.
struct PenaltyOperands {
  variable_list fishers, tensors;  // tensors: every A, every B, every s that there is
  std::vector<int64_t> slots;
  std::vector<double> scale_factors;
  double ewc_lambda;
  std::vector<bool> needs;

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
    TORCH_CHECK(operands, "ewc_penalty: hooks on saved tensors replaced what its second derivatives are computed from");
    return *operands;
  }
};

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
    PenaltyOperands operands{fishers, tensors.vec(), slots, scale_factors, ewc_lambda, needs};
    ctx->saved_data["versions"] = operands.versions();
    ctx->save_for_backward({flat, PenaltyOperands::kept(std::move(operands))});
    ctx->saved_data["sizes"] = sizes;
    ctx->saved_data["tensors"] = int64_t(tensors.size());
    return penalty.variable_data();  // no view of an input: those refuse changes in place
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    const WithoutAutocast plain;
    const variable_list saved = ctx->get_saved_variables();
    const bool followed = is_followed(outputs);
    const variable_list found = followed ? differentiated(ctx, saved[1], outputs[0]) : variable_list();
    const at::Tensor scaled = followed ? at::Tensor() : saved[0] * outputs[0];
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
  static variable_list differentiated(AutogradContext* ctx, const at::Tensor& owner, const at::Tensor& gradient) {
    const PenaltyOperands& operands = PenaltyOperands::of(owner);
    TORCH_CHECK(ctx->saved_data["versions"].toInt() == operands.versions(),
                "ewc_penalty: a Fisher, adapter or scale has been modified by an inplace operation since the penalty was computed, so that "
                "its second derivatives cannot be; compute the penalty again");
    const size_t adapters = operands.fishers.size();
    const variable_list all = spread(operands.tensors, operands.slots, int64_t(3 * adapters));
    const auto of_kind = [&](size_t kind) { return at::TensorList(all).slice(kind * adapters, adapters).vec(); };
    Optionals scales;
    for (const at::Tensor& s : of_kind(2)) scales.push_back(given(s));
    return differentiable("ewc_penalty_backward", gradient, operands.fishers, of_kind(0), of_kind(1), scales, operands.scale_factors,
                          operands.ewc_lambda, operands.needs);
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
