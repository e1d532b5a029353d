// SPDX-License-Identifier: Apache-2.0
// LoRA linear on the CPU: packs the factors, runs the row passes on all threads, and has BLAS add the base product.
#include "few_rows.h"
#include "packed.h"

namespace fe {
namespace {

// Floats, padded to whole vectors, as a tensor like `like`: a panel of one rank.
at::Tensor rounded(float* values, const at::Tensor& like) {
  at::Tensor t = at::empty(like.sizes(), like.options());
  kernels().unpack_panel({values, 1, 0}, 1, t.numel(), {t.data_ptr(), 0, dtype_of(t)});
  return t;
}

std::vector<int64_t> with_last(const at::Tensor& like, int64_t last) {
  std::vector<int64_t> sizes = like.sizes().vec();
  sizes.back() = last;
  return sizes;
}

// A 16-bit factor of a BLAS product without gaps between its rows. On processors with AMX, PyTorch's product reads on past the ends of rows
// and multiplies what it finds by zero: NaN where that is NaN or Inf, whoever it belongs to.
at::Tensor for_blas(const at::Tensor& t) {
  return t.scalar_type() == at::kFloat || t.is_non_overlapping_and_dense() ? t : t.contiguous();
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> lora_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                               const Tensors& lora_as, const Tensors& lora_bs, const OptionalTensors& scales,
                                               const std::vector<double>& factors, const std::vector<int64_t>& rows, double dropout_p,
                                               const std::optional<at::Tensor>& seed) {
  arguments::lora_linear(DEVICE, x, weight, bias, lora_as, lora_bs, scales, factors, rows, dropout_p, seed);
  if (empty::linear(x, weight)) return empty::lora_linear(x, weight, bias, lora_as);
  const at::AutoDispatchBelowADInplaceOrView kernels_alone;
  Packed packed(weight, lora_as, lora_bs, scales, factors, rows, dropout_p, seed);
  const at::Tensor x2 = as_rows(x);
  if (packed.suits_tiles(x2.size(0), lora_as, lora_bs)) packed.shape.product = tile_product;
  at::Tensor y = at::empty(with_last(x, weight.size(0)), x.options());
  at::Tensor z = at::empty({x2.size(0), packed.shape.total_rank}, at::kFloat);
  at::Tensor y2 = y.view({x2.size(0), weight.size(0)});
  if (few_rows::suits(x2, packed.shape)) {
    few_rows::forward(packed, x2, weight, bias, lora_as, lora_bs, y2, z);
    return {y, z};
  }
  const int64_t m = x2.size(0), parts = packed.parts(m), scratch = kernels().lora_scratch(packed.shape, most_of(m, parts));
  const at::Tensor memory = floats(packed.a_floats + packed.b_floats + parts * scratch);
  float* panels = memory.data_ptr<float>();
  packed.pack(lora_as, lora_bs, /*backward=*/false, panels);
  LoraForward p;
  p.shape = packed.shape;
  p.x = matrix(x2);
  p.y = matrix(y2);
  const at::Tensor dense_bias = bias ? bias->contiguous() : at::Tensor();
  p.bias = bias ? dense_bias.data_ptr() : nullptr;
  p.z = z.data_ptr<float>();
  float* buffers = panels + packed.a_floats + packed.b_floats;
  over_parts(parts, m, [&](int64_t part, int64_t begin, int64_t end) {
    kernels().lora_forward(p, begin, end, buffers + part * scratch);
    if (p.shape.product) at::native::cpublas::brgemm_release();
  });
  y2.addmm_(for_blas(x2), for_blas(weight).t());
  return {y, z};
}

namespace {

// Which gradients are asked for.
struct Needs {
  bool x, weight, bias;
  std::vector<bool> as, bs, scales;
  bool any_a, any_b, any_s;

  Needs(const std::vector<bool>& needs, size_t adapters) : x(needs[0]), weight(needs[1]), bias(needs[2]) {
    const auto first = needs.begin() + 3;
    as.assign(first, first + adapters);
    bs.assign(first + adapters, first + 2 * adapters);
    scales.assign(first + 2 * adapters, first + 3 * adapters);
    const auto any = [](const std::vector<bool>& of) { return std::find(of.begin(), of.end(), true) != of.end(); };
    any_a = any(as), any_b = any(bs), any_s = any(scales);
  }
};

// The gradient of a scale from that of its ranks, without the factor.
at::Tensor gradient_of_scale(const at::Tensor& ranks, const at::Tensor& scale, double factor) {
  at::Tensor ds = ranks * factor;
  if (scale.dim() == 0) ds = ds.sum();
  return ds.to(scale.scalar_type());
}

// What a backward takes and returns, on rows.
struct Rows {
  const at::Tensor &dy, &x, &weight;
  const std::optional<at::Tensor>&bias, &z;
  const Tensors &lora_as, &lora_bs;
  const OptionalTensors& scales;
  const std::vector<double>& factors;
};

// With `dx` [M, d_in] as the gradient of x, where it is asked for.
Tensors backward_of_few_rows(Packed& packed, const Needs& needs, const Rows& rows, at::Tensor dx) {
  const auto& [dy, x, weight, bias, z, lora_as, lora_bs, scales, factors] = rows;
  const size_t adapters = lora_as.size();
  const auto ranks_of = [&](const at::Tensor& t, size_t i) { return few_rows::part(t, 1, packed.rank_begin[i], lora_as[i].size(0)); };
  Tensors out;
  at::Tensor products, u;
  if (needs.x || needs.any_a || needs.any_s) products = few_rows::projected(packed, dy, lora_bs);
  if (needs.x || needs.any_a) u = few_rows::scaled(products, packed.scale);
  if (needs.x) {
    at::mm_out(dx, dy, weight);
    for (size_t i = 0; i < adapters; ++i) dx.addmm_(ranks_of(u, i), lora_as[i]);
  }
  if (needs.weight) out.push_back(dy.t().mm(x));
  if (needs.bias) out.push_back(dy.sum(0));
  for (size_t i = 0; i < adapters; ++i)
    if (needs.as[i]) out.push_back(ranks_of(u, i).t().mm(x));
  if (needs.any_b) {
    const at::Tensor zs = few_rows::scaled(*z, packed.scale);
    for (size_t i = 0; i < adapters; ++i)
      if (needs.bs[i]) out.push_back(few_rows::gradient_of_b(packed, dy, zs, lora_bs[i], i));
  }
  for (size_t i = 0; i < adapters; ++i)
    if (needs.scales[i]) out.push_back(gradient_of_scale((ranks_of(products, i) * ranks_of(*z, i)).sum(0), *scales[i], factors[i]));
  return out;
}

Tensors backward_by_row_passes(Packed& packed, const Needs& needs, const Rows& rows, at::Tensor dx) {
  const auto& [dy, x, weight, bias, z, lora_as, lora_bs, scales, factors] = rows;
  const int64_t m = dy.size(0);
  const size_t adapters = lora_as.size();
  if (packed.suits_tiles(m, lora_as, lora_bs)) packed.shape.product = tile_product;
  const LoraShape& s = packed.shape;
  LoraBackward p;
  p.dy = matrix(dy);
  p.need_dx = needs.x, p.need_bias = needs.bias;
  p.need_a = needs.any_a, p.need_b = needs.any_b, p.need_s = needs.any_s;
  if (p.need_a) p.x = matrix(x);
  if (z) p.z = z->data_ptr<float>();
  if (p.need_dx) p.dx = matrix(dx);

  // Every part has gradients of A, B, s and the bias of its own; they are summed in order, so the bits do not depend on scheduling.
  const int64_t parts = packed.parts(m), scratch = kernels().lora_scratch(s, most_of(m, parts));
  const int64_t of_a = p.need_a ? packed.a_floats : 0, of_b = p.need_b ? packed.b_floats : 0;
  const int64_t of_s = p.need_s ? padded(s.total_rank) : 0, grads = of_a + of_b + of_s + (p.need_bias ? padded(s.d_out) : 0);
  const at::Tensor memory = floats(packed.a_floats + packed.b_floats + parts * (scratch + grads));
  packed.pack(lora_as, lora_bs, /*backward=*/true, memory.data_ptr<float>());
  p.shape = s;
  float* partial = memory.data_ptr<float>() + packed.a_floats + packed.b_floats;
  float* buffers = partial + parts * grads;
  const auto bind = [&](LoraBackward& q, float* at) {
    q.grad_a = at;
    q.grad_b = q.grad_a + of_a;
    q.grad_s = q.grad_b + of_b;
    q.grad_bias = q.grad_s + of_s;
  };
  over_parts(parts, m, [&](int64_t part, int64_t begin, int64_t end) {
    LoraBackward q = p;
    bind(q, partial + part * grads);
    kernels().lora_backward(q, begin, end, buffers + part * scratch);
    if (q.shape.product) at::native::cpublas::brgemm_release();
  });
  sum_parts(partial, parts, grads);
  bind(p, partial);

  Tensors out;
  if (needs.x) dx.addmm_(for_blas(dy), for_blas(weight));
  if (needs.weight) out.push_back(for_blas(dy).t().mm(for_blas(x)));
  if (needs.bias) out.push_back(rounded(p.grad_bias, *bias));
  for (size_t i = 0; i < adapters; ++i)
    if (needs.as[i]) out.push_back(packed.unpacked_a(p.grad_a, lora_as[i], i));
  for (size_t i = 0; i < adapters; ++i)
    if (needs.bs[i]) out.push_back(packed.unpacked_b(p.grad_b, lora_bs[i], i));
  for (size_t i = 0; i < adapters; ++i) {
    if (!needs.scales[i]) continue;
    const at::Tensor ranks = at::from_blob(p.grad_s + s.rank_begin[i], {lora_as[i].size(0)}, at::kFloat);
    out.push_back(gradient_of_scale(ranks, *scales[i], factors[i]));
  }
  return out;
}

}  // namespace

Tensors lora_linear_backward(const at::Tensor& dy, const std::optional<at::Tensor>& x, const at::Tensor& weight,
                             const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& z, const Tensors& lora_as,
                             const Tensors& lora_bs, const OptionalTensors& scales, const std::vector<double>& factors,
                             const std::vector<int64_t>& rows, double dropout_p, const std::optional<at::Tensor>& seed,
                             const std::vector<bool>& needs) {
  arguments::lora_linear_backward(DEVICE, dy, x, weight, bias, z, lora_as, lora_bs, scales, factors, rows, dropout_p, seed, needs);
  if (empty::linear(dy, weight)) return empty::lora_linear_backward(dy, weight, bias, lora_as, lora_bs, scales, needs);
  const at::AutoDispatchBelowADInplaceOrView kernels_alone;
  Packed packed(weight, lora_as, lora_bs, scales, factors, rows, dropout_p, seed);
  const at::Tensor dy2 = as_rows(dy), x2 = x ? as_rows(*x) : at::Tensor();
  const Needs asked(needs, lora_as.size());
  at::Tensor dx, dx2;
  if (asked.x) {
    dx = at::empty(with_last(dy, weight.size(1)), dy.options());
    dx2 = dx.view({dy2.size(0), weight.size(1)});
  }
  const auto backward = few_rows::suits(dy2, packed.shape) ? backward_of_few_rows : backward_by_row_passes;
  Tensors out = backward(packed, asked, {dy2, x2, weight, bias, z, lora_as, lora_bs, scales, factors}, dx2);
  if (asked.x) out.insert(out.begin(), dx);
  return out;
}

}  // namespace fe
