// The LoRA linear on autograd's tape, for backends whose forward and backward are C++ functions: a training step of small layers then
// spends its time in them and not in Python. The two take and return what the ops do.
#pragma once
#include "tape.h"

namespace fe::recorded {

// Inputs, and in front of z what is saved.
enum LinearInput : size_t { X, WEIGHT, BIAS, SEED, ADAPTERS };

struct Adapters {
  std::vector<at::Tensor> lora_as, lora_bs;
  Optionals scales;

  // Of A, B, s, A, B, s, … after the other inputs.
  explicit Adapters(const variable_list& inputs) {
    for (size_t i = ADAPTERS; i + 2 < inputs.size(); i += 3) {
      lora_as.push_back(inputs[i]);
      lora_bs.push_back(inputs[i + 1]);
      scales.push_back(given(inputs[i + 2]));
    }
  }
};

template <auto Forward, auto Backward>
struct LoRALinear : torch::autograd::Function<LoRALinear<Forward, Backward>> {
  static at::Tensor forward(AutogradContext* ctx, at::TensorList tensors, const std::vector<int64_t>& slots, int64_t count,
                            const std::vector<double>& factors, const std::vector<int64_t>& rows, double dropout_p) {
    const WithoutAutocast plain;
    variable_list inputs = spread(tensors, slots, count);
    const Adapters adapters(inputs);
    auto [y, z] = Forward(inputs[X], inputs[WEIGHT], given(inputs[BIAS]), adapters.lora_as, adapters.lora_bs, adapters.scales, factors,
                          rows, dropout_p, given(inputs[SEED]));
    auto trained = [&](size_t i) { return inputs[i].defined() && inputs[i].requires_grad(); };
    bool keep_x = trained(WEIGHT), keep_z = false;
    for (size_t i = ADAPTERS; i + 2 < inputs.size(); i += 3) {
      keep_x = keep_x || trained(i);
      keep_z = keep_z || trained(i + 1) || trained(i + 2);
    }
    // A layer that needs only dx (everything of its own frozen) keeps neither x nor z.
    if (!keep_x) inputs[X].reset();
    inputs.push_back(keep_z ? z : at::Tensor());
    ctx->save_for_backward(std::move(inputs));
    ctx->saved_data["slots"] = slots;
    ctx->saved_data["factors"] = factors;
    ctx->saved_data["rows"] = rows;
    ctx->saved_data["dropout_p"] = dropout_p;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    const bool graph_is_made = at::GradMode::is_enabled();
    const at::AutoGradMode off(false);
    const WithoutAutocast plain;
    variable_list inputs = ctx->get_saved_variables();
    const at::Tensor z = inputs.back();
    inputs.pop_back();
    const std::vector<int64_t> slots = ctx->saved_data["slots"].toIntVector();
    std::vector<bool> needs = wanted(ctx, slots, int64_t(inputs.size()));
    needs.erase(needs.begin() + SEED);  // the op has no gradient for it
    const Adapters adapters(inputs);
    std::vector<at::Tensor> found =
        Backward(outputs[0], given(inputs[X]), inputs[WEIGHT], given(inputs[BIAS]), given(z), adapters.lora_as, adapters.lora_bs,
                 adapters.scales, ctx->saved_data["factors"].toDoubleVector(), ctx->saved_data["rows"].toIntVector(),
                 ctx->saved_data["dropout_p"].toDouble(), given(inputs[SEED]), needs);
    variable_list gradients(slots.size() + 5);  // the numbers have none
    size_t next = 0;
    for (size_t i = 0; i < slots.size(); ++i) {
      const size_t slot = size_t(slots[i]);
      if (slot != SEED && needs[slot < SEED ? slot : slot - 1]) gradients[i] = std::move(found[next++]);
    }
    return once(std::move(gradients), "lora_linear", graph_is_made);
  }

  // What Python calls: y of one call. `adapters` is flat: A, B, scale tensor or None, per adapter.
  static at::Tensor call(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                         const std::optional<at::Tensor>& seed, const Optionals& adapters, const std::vector<double>& factors,
                         const std::vector<int64_t>& rows, double dropout_p) {
    Inputs inputs;
    inputs.add(x);
    inputs.add(weight);
    inputs.add(bias);
    inputs.add(seed);
    for (const auto& adapter : adapters) inputs.add(adapter);
    return LoRALinear::apply(at::TensorList(inputs.tensors), inputs.slots, inputs.count, factors, rows, dropout_p);
  }
};

}  // namespace fe::recorded
