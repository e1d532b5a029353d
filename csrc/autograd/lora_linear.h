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
    auto [y, z] = Forward(c.x, c.weight, given(c.bias), c.lora_as, c.lora_bs, c.scales, c.scale_factors, c.rows, c.dropout_p, given(c.seed));
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
  // Inputs: x, weight, bias, every A, every B, every s, the seed.
  enum Input : size_t { X, WEIGHT, BIAS, LORA_AS };

  // Returns y and, where x has a graph and is not kept, z: the graph of z is then the only way to x for derivatives of dB and ds.
  static variable_list forward(AutogradContext* ctx, at::TensorList tensors, const std::vector<int64_t>& slots, int64_t count,
                               const LinearCall& call, const LinearBackend& backend, PyObject* captured) {
    const WithoutAutocast plain;
    variable_list made = backend.forward(call);
    const auto trained = [](const at::Tensor& t) { return t.defined() && t.requires_grad(); };
    const auto any = [&](const auto& list) { return std::any_of(list.begin(), list.end(), trained); };
    const bool trained_scale =
        std::any_of(call.scales.begin(), call.scales.end(), [&](const auto& s) { return s && trained(*s); });
    const bool keep_x = trained(call.weight) || any(call.lora_as) || captured != nullptr, keep_z = any(call.lora_bs) || trained_scale;
    // A layer that needs only dx (everything of its own frozen) keeps neither x nor z.
    const bool connect = keep_z && !keep_x && call.x.requires_grad();
    variable_list kept = spread(tensors, slots, count);
    if (!keep_x) kept[X].reset();
    kept.push_back(keep_z ? made[1] : at::Tensor());
    kept.insert(kept.end(), made.begin() + 2, made.end());
    ctx->save_for_backward(std::move(kept));
    // In one list each: a dictionary of many small things takes longer than what it holds.
    std::vector<int64_t> numbers{int64_t(reinterpret_cast<uintptr_t>(&backend)), count, int64_t(slots.size())};
    numbers.insert(numbers.end(), slots.begin(), slots.end());
    numbers.insert(numbers.end(), call.rows.begin(), call.rows.end());
    std::vector<double> factors(call.scale_factors);
    factors.push_back(call.dropout_p);
    ctx->saved_data["numbers"] = std::move(numbers);
    ctx->saved_data["factors"] = std::move(factors);
    if (captured != nullptr) {
      const pybind11::gil_scoped_acquire locked;
      ctx->saved_data["captured"] = c10::IValue::make_capsule(c10::make_intrusive<Captured>(captured));
      tell(captured, call.x);
    }
    if (!connect) return {made[0]};
    ctx->set_materialize_grads(false);
    ctx->saved_data["shape"] = made[0].sizes();
    return {made[0], made[1]};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    const WithoutAutocast plain;
    const variable_list kept = ctx->get_saved_variables();
    const std::vector<int64_t> numbers = ctx->saved_data["numbers"].toIntVector();
    const auto& backend = *reinterpret_cast<const LinearBackend*>(uintptr_t(numbers[0]));
    const size_t count = size_t(numbers[1]);
    const auto rows = numbers.begin() + 3 + numbers[2];
    const std::vector<int64_t> slots(numbers.begin() + 3, rows);
    LinearCall call{kept[X], kept[WEIGHT], kept[BIAS], {}, {}, {}, ctx->saved_data["factors"].toDoubleVector(), {rows, numbers.end()}};
    call.dropout_p = call.scale_factors.back();
    call.scale_factors.pop_back();
    const size_t adapters = call.scale_factors.size();
    const auto lora_as = kept.begin() + LORA_AS, lora_bs = lora_as + adapters, scales = lora_bs + adapters;
    call.lora_as.assign(lora_as, lora_bs);
    call.lora_bs.assign(lora_bs, scales);
    for (auto s = scales; s != scales + adapters; ++s) call.scales.push_back(given(*s));
    call.seed = kept[count - 1];
    const at::Tensor& z = kept[count];
    std::vector<bool> needs = wanted(ctx, slots, int64_t(count));
    needs.pop_back();  // of the seed, which has no gradient
    const bool has_dz = outputs.size() > 1 && outputs[1].defined();
    const at::Tensor dy = outputs[0].defined() ? outputs[0] : at::zeros(ctx->saved_data["shape"].toIntVector(), call.weight.options());
    variable_list found;
    const bool followed = has_dz || is_followed(outputs);
    const auto captured = ctx->saved_data.find("captured");
    if (captured != ctx->saved_data.end()) {
      const pybind11::gil_scoped_acquire locked;
      const auto holder = c10::static_intrusive_pointer_cast<Captured>(captured->second.toCapsule());
      pybind11::handle(holder->object).attr("backward")(call.x, dy, followed);
    }
    if (followed) {
      const std::optional<at::Tensor> dz = has_dz ? given(outputs[1]) : std::nullopt;
      found = differentiable("lora_linear_backward", dy, dz, given(call.x), call.weight, given(call.bias), given(z), call.lora_as,
                             call.lora_bs, call.scales, call.scale_factors, call.rows, call.dropout_p, given(call.seed), needs);
    } else {
      found = backend.backward(dy, z, call, needs, at::TensorList(kept).slice(count + 1));
    }
    variable_list gradients(slots.size() + 5);  // what is no tensor has none
    size_t next = 0;
    for (size_t i = 0; i < slots.size(); ++i) {
      const size_t slot = size_t(slots[i]);
      if (slot < needs.size() && needs[slot]) gradients[i] = std::move(found[next++]);
    }
    return gradients;
  }

  // y, on the tape.
  static at::Tensor of(const LinearCall& call, const LinearBackend& backend, PyObject* captured = nullptr) {
    Inputs inputs;
    inputs.add(given(call.x));
    inputs.add(given(call.weight));
    inputs.add(given(call.bias));
    inputs.add(call.lora_as, call.lora_bs, call.scales);
    inputs.add(given(call.seed));
    return LoRALinear::apply(at::TensorList(inputs.tensors), inputs.slots, inputs.count, call, backend, captured)[0];
  }
};

}  // namespace fe::recorded
