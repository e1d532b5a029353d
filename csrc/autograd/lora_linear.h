// SPDX-License-Identifier: Apache-2.0
// The LoRA linear on autograd's tape, for backends whose forward and backward are C++ functions: a training step of small layers then
// spends its time in them and not in Python.
#pragma once
#include <ATen/core/ivalue.h>

#include "tape.h"

namespace fe::recorded {

// The arguments that forward and backward share; x is undefined where a backward has no need of it.
struct LinearCall {
  at::Tensor x, weight, bias;
  std::vector<at::Tensor> lora_as, lora_bs;
  Optionals scales;
  std::vector<double> scale_factors;
  std::vector<int64_t> rows;
  double dropout_p = 0.0;
  at::Tensor seed;
};

// Who computes it. Backends live until the end of the process: what is on the tape points to them.
struct LinearBackend {
  virtual ~LinearBackend() = default;
  // y, z, and whatever the backward of this call can use again.
  virtual variable_list forward(const LinearCall& call) const = 0;
  // The gradients that are asked for, in the order of `needs`: x, weight, bias, every A, every B, every s.
  virtual variable_list backward(const at::Tensor& dy, const at::Tensor& z, const LinearCall& call, const std::vector<bool>& needs,
                                 at::TensorList again) const = 0;
};

// A backend of two functions that take and return what the ops do.
template <auto Forward, auto Backward>
struct LinearFunctions final : LinearBackend {
  variable_list forward(const LinearCall& c) const override {
    auto [y, z] =
        Forward(c.x, c.weight, given(c.bias), c.lora_as, c.lora_bs, c.scales, c.scale_factors, c.rows, c.dropout_p, given(c.seed));
    return {std::move(y), std::move(z)};
  }
  variable_list backward(const at::Tensor& dy, const at::Tensor& z, const LinearCall& c, const std::vector<bool>& needs,
                         at::TensorList) const override {
    return Backward(dy, given(c.x), c.weight, given(c.bias), given(z), c.lora_as, c.lora_bs, c.scales, c.scale_factors, c.rows, c.dropout_p,
                    given(c.seed), needs);
  }
  static const LinearBackend& get() {
    static const LinearFunctions functions;
    return functions;
  }
  // For another extension, whose node calls it.
  static uintptr_t address() { return reinterpret_cast<uintptr_t>(&get()); }
};

// What collects the Fisher of a layer (`Captured` in ops/lora_linear.py): told of x in the forward, and of x and dy in each backward. None where
// nothing does.
struct Captured : torch::CustomClassHolder {
  explicit Captured(PyObject* object) : object(object) { Py_INCREF(object); }
  ~Captured() override {
    if (!Py_IsInitialized()) return;
    const pybind11::gil_scoped_acquire locked;
    Py_DECREF(object);
  }
  PyObject* object;
};

inline void tell(PyObject* captured, const at::Tensor& x) {
  const pybind11::gil_scoped_acquire locked;
  pybind11::handle(captured).attr("forward")(x);
}

struct LoRALinear : torch::autograd::Function<LoRALinear> {
  // Inputs: x, weight, bias, every A, every B, every s, the seed; undefined where there is none.
  enum Input : size_t { X, WEIGHT, BIAS, LORA_AS };

  static variable_list inputs_of(const LinearCall& call) {
    variable_list inputs{call.x, call.weight, call.bias};
    inputs.reserve(4 + 3 * call.lora_as.size() + 3);  // what is saved behind them has room, too
    inputs.insert(inputs.end(), call.lora_as.begin(), call.lora_as.end());
    inputs.insert(inputs.end(), call.lora_bs.begin(), call.lora_bs.end());
    for (const auto& s : call.scales) inputs.push_back(s.value_or(at::Tensor()));
    inputs.push_back(call.seed);
    return inputs;
  }

  // y, on the tape: what Function::apply does, without the descriptions that it makes of every input. Where x has a graph and is not kept, z
  // is an output as well: its graph is then the only way to x for derivatives of dB and ds.
  static at::Tensor record(const LinearCall& call, const LinearBackend& backend, PyObject* captured = nullptr) {
    variable_list kept = inputs_of(call), made;
    const auto trained = [](const at::Tensor& t) { return t.defined() && t.requires_grad(); };
    const auto lora_as = kept.begin() + LORA_AS, lora_bs = lora_as + call.lora_as.size();
    const bool keep_x = trained(call.weight) || std::any_of(lora_as, lora_bs, trained) || captured != nullptr;
    const bool keep_z = std::any_of(lora_bs, kept.end(), trained);
    {
      const at::AutoGradMode off(false);
      const WithoutAutocast plain;
      made = backend.forward(call);
    }
    const auto node = make_node<torch::autograd::CppNode<LoRALinear>>();
    const size_t count = kept.size();
    node->is_variable_input_.assign(count, true);
    node->set_ctx_grad_fn(node);
    node->set_next_edges(torch::autograd::collect_next_edges(kept));
    // In one list each: a dictionary of many small things takes longer than what it holds.
    std::vector<int64_t> numbers{int64_t(reinterpret_cast<uintptr_t>(&backend)), int64_t(count)};
    numbers.insert(numbers.end(), call.rows.begin(), call.rows.end());
    std::vector<double> factors(call.scale_factors);
    factors.push_back(call.dropout_p);
    auto& saved = node->ctx_.saved_data;
    saved["numbers"] = std::move(numbers);
    saved["factors"] = std::move(factors);
    if (captured != nullptr) {
      const pybind11::gil_scoped_acquire locked;
      saved["captured"] = c10::IValue::make_capsule(c10::make_intrusive<Captured>(captured));
      tell(captured, call.x);
    }
    at::Tensor y = std::move(made[0]), z = std::move(made[1]);
    torch::autograd::create_gradient_edge(y, node);
    node->output_info_.emplace_back(y);
    // A layer that needs only dx (everything of its own frozen) keeps neither x nor z.
    if (keep_z && !keep_x && call.x.requires_grad()) {
      torch::autograd::create_gradient_edge(z, node);
      node->output_info_.emplace_back(z);
      node->ctx_.set_materialize_grads(false);
      saved["shape"] = y.sizes();
    }
    if (!keep_x) kept[X].reset();
    kept.push_back(keep_z ? std::move(z) : at::Tensor());
    kept.insert(kept.end(), std::make_move_iterator(made.begin() + 2), std::make_move_iterator(made.end()));
    node->ctx_.save_for_backward(std::move(kept));
    node->save_variables_to_ctx();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    const WithoutAutocast plain;
    const variable_list kept = ctx->get_saved_variables();
    const std::vector<int64_t> numbers = ctx->saved_data["numbers"].toIntVector();
    const auto& backend = *reinterpret_cast<const LinearBackend*>(uintptr_t(numbers[0]));
    const size_t count = size_t(numbers[1]);
    LinearCall call{
        kept[X], kept[WEIGHT], kept[BIAS], {}, {}, {}, ctx->saved_data["factors"].toDoubleVector(), {numbers.begin() + 2, numbers.end()}};
    call.dropout_p = call.scale_factors.back();
    call.scale_factors.pop_back();
    const size_t adapters = call.scale_factors.size();
    const auto lora_as = kept.begin() + LORA_AS, lora_bs = lora_as + adapters, scales = lora_bs + adapters;
    call.lora_as.assign(lora_as, lora_bs);
    call.lora_bs.assign(lora_bs, scales);
    for (auto s = scales; s != scales + adapters; ++s) call.scales.push_back(given(*s));
    call.seed = kept[count - 1];
    const at::Tensor& z = kept[count];
    std::vector<bool> needs(count - 1);  // the seed has no gradient
    for (size_t i = 0; i < needs.size(); ++i) needs[i] = ctx->needs_input_grad(i);
    const bool has_dz = outputs.size() > 1 && outputs[1].defined(), followed = has_dz || is_followed(outputs);
    const at::Tensor dy = outputs[0].defined() ? outputs[0] : at::zeros(ctx->saved_data["shape"].toIntVector(), call.weight.options());
    const auto captured = ctx->saved_data.find("captured");
    if (captured != ctx->saved_data.end()) {
      const pybind11::gil_scoped_acquire locked;
      const auto holder = c10::static_intrusive_pointer_cast<Captured>(captured->second.toCapsule());
      pybind11::handle(holder->object).attr("backward")(call.x, dy, followed);
    }
    variable_list found;
    if (followed) {
      const std::optional<at::Tensor> dz = has_dz ? given(outputs[1]) : std::nullopt;
      found = differentiable("lora_linear_backward", dy, dz, given(call.x), call.weight, given(call.bias), given(z), call.lora_as,
                             call.lora_bs, call.scales, call.scale_factors, call.rows, call.dropout_p, given(call.seed), needs);
    } else {
      found = backend.backward(dy, z, call, needs, at::TensorList(kept).slice(count + 1));
    }
    variable_list gradients(count);
    size_t next = 0;
    for (size_t i = 0; i < needs.size(); ++i)
      if (needs[i]) gradients[i] = std::move(found[next++]);
    return gradients;
  }

  // Functions of PyTorch have one; `record` takes its place.
  static variable_list forward(AutogradContext*, const LinearCall&) = delete;
};

}  // namespace fe::recorded
