// The LoRA linear on autograd's tape, for backends whose forward and backward are C++ functions: a training step of small layers then
// spends its time in them and not in Python. The two take and return what the ops do.
#pragma once
#include "tape.h"

namespace fe::recorded {

// Inputs: these, every B, every s and last the seed.
enum LinearInput : size_t { X, WEIGHT, BIAS, LORA_AS };

struct Adapters {
  std::vector<at::Tensor> lora_as, lora_bs;
  Optionals scales;

  Adapters(const variable_list& inputs, size_t count) {
    const auto as = inputs.begin() + LORA_AS, bs = as + count, ss = bs + count;
    lora_as.assign(as, bs);
    lora_bs.assign(bs, ss);
    for (auto s = ss; s != ss + count; ++s) scales.push_back(given(*s));
  }
};

template <auto Forward, auto Backward>
struct LoRALinear : torch::autograd::Function<LoRALinear<Forward, Backward>> {
  // Returns y and, where x has a graph and is not kept, z: the graph of z is then the only way to x for derivatives of dB and ds.
  static variable_list forward(AutogradContext* ctx, at::TensorList tensors, const std::vector<int64_t>& slots, int64_t count,
                               const std::vector<double>& scale_factors, const std::vector<int64_t>& rows, double dropout_p) {
    const WithoutAutocast plain;
    variable_list inputs = spread(tensors, slots, count);
    const Adapters adapters(inputs, scale_factors.size());
    auto [y, z] = Forward(inputs[X], inputs[WEIGHT], given(inputs[BIAS]), adapters.lora_as, adapters.lora_bs, adapters.scales,
                          scale_factors, rows, dropout_p, given(inputs.back()));
    const auto trained = [&](size_t first, size_t last) {
      return std::any_of(inputs.begin() + first, inputs.begin() + last,
                         [](const at::Tensor& t) { return t.defined() && t.requires_grad(); });
    };
    const size_t lora_bs = LORA_AS + scale_factors.size(), seed = inputs.size() - 1;
    const bool keep_x = trained(WEIGHT, BIAS) || trained(LORA_AS, lora_bs), keep_z = trained(lora_bs, seed);
    // A layer that needs only dx (everything of its own frozen) keeps neither x nor z.
    const bool connect = keep_z && !keep_x && inputs[X].requires_grad();
    if (!keep_x) inputs[X].reset();
    inputs.push_back(keep_z ? z : at::Tensor());
    ctx->save_for_backward(std::move(inputs));
    ctx->saved_data["slots"] = slots;
    ctx->saved_data["scale_factors"] = scale_factors;
    ctx->saved_data["rows"] = rows;
    ctx->saved_data["dropout_p"] = dropout_p;
    if (!connect) return {y};
    ctx->set_materialize_grads(false);
    ctx->saved_data["shape"] = y.sizes();
    return {y, z};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    const WithoutAutocast plain;
    variable_list inputs = ctx->get_saved_variables();
    const at::Tensor z = inputs.back();
    inputs.pop_back();
    const std::vector<int64_t> slots = ctx->saved_data["slots"].toIntVector();
    std::vector<bool> needs = wanted(ctx, slots, int64_t(inputs.size()));
    needs.pop_back();  // of the seed, which has no gradient
    const std::vector<double> scale_factors = ctx->saved_data["scale_factors"].toDoubleVector();
    const Adapters adapters(inputs, scale_factors.size());
    const bool has_dz = outputs.size() > 1 && outputs[1].defined();
    const at::Tensor dy = outputs[0].defined() ? outputs[0] : at::zeros(ctx->saved_data["shape"].toIntVector(), inputs[WEIGHT].options());
    const auto call = [&](const auto& function) {
      return function(given(inputs[X]), inputs[WEIGHT], given(inputs[BIAS]), given(z), adapters.lora_as, adapters.lora_bs, adapters.scales,
                      scale_factors, ctx->saved_data["rows"].toIntVector(), ctx->saved_data["dropout_p"].toDouble(), given(inputs.back()),
                      needs);
    };
    variable_list found;
    if (has_dz || is_followed(outputs)) {
      const std::optional<at::Tensor> dz = has_dz ? given(outputs[1]) : std::nullopt;
      found = call([&](const auto&... rest) { return differentiable("lora_linear_backward", dy, dz, rest...); });
    } else {
      found = call([&](const auto&... rest) { return Backward(dy, rest...); });
    }
    variable_list gradients(slots.size() + 5);  // the numbers have none
    size_t next = 0;
    for (size_t i = 0; i < slots.size(); ++i) {
      const size_t slot = size_t(slots[i]);
      if (slot < needs.size() && needs[slot]) gradients[i] = std::move(found[next++]);
    }
    return gradients;
  }

  // What Python calls: y of one call of the op.
  static at::Tensor call(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                         const std::vector<at::Tensor>& lora_as, const std::vector<at::Tensor>& lora_bs, const Optionals& scales,
                         const std::vector<double>& scale_factors, const std::vector<int64_t>& rows, double dropout_p,
                         const std::optional<at::Tensor>& seed) {
    Inputs inputs;
    inputs.add(x);
    inputs.add(weight);
    inputs.add(bias);
    inputs.add(lora_as, lora_bs, scales);
    inputs.add(seed);
    return LoRALinear::apply(at::TensorList(inputs.tensors), inputs.slots, inputs.count, scale_factors, rows, dropout_p)[0];
  }
};

}  // namespace fe::recorded
