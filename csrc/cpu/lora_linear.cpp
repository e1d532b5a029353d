// LoRA linear on the CPU: packs the factors, runs the row passes on all threads, and has BLAS add the base product.
#include "tensors.h"

namespace fe {
namespace {

constexpr int64_t LEAST_ROWS = 24;  // rows per thread below which starting a thread costs more than it saves

// The packed low-rank part of one call; owns what LoraShape points to.
struct Packed {
  std::vector<int64_t> rank_begin{0};
  std::vector<RowRange> ranges;
  std::vector<int64_t> offsets;  // first row of B of each range
  std::vector<float> scale;
  at::Tensor panels;
  int64_t a_floats = 0, b_floats = 0;
  LoraShape shape;

  Packed(const at::Tensor& weight, const Tensors& lora_as, const Tensors& lora_bs, const OptionalTensors& scales,
         const std::vector<double>& factors, const std::vector<int64_t>& rows, double dropout_p, const std::optional<at::Tensor>& seed) {
    const Kernels& k = kernels();
    const int64_t d_in = weight.size(1);
    auto padded = [&](int64_t n) { return (n + k.lanes - 1) / k.lanes * k.lanes; };
    for (size_t i = 0; i < lora_as.size(); ++i) {
      const int64_t rank = lora_as[i].size(0);
      const auto s = scale_of(scales[i], factors[i], rank);
      scale.insert(scale.end(), s.begin(), s.end());
      rank_begin.push_back(rank_begin.back() + rank);
    }
    std::vector<int64_t> used(lora_as.size(), 0);
    for (size_t q = 0; q + 2 < rows.size(); q += 3) {
      const int64_t adapter = rows[q], length = rows[q + 2] - rows[q + 1];
      ranges.push_back({int(adapter), rows[q + 1], rows[q + 2], b_floats});
      offsets.push_back(used[adapter]);
      used[adapter] += length;
      b_floats += lora_as[adapter].size(0) * padded(length);
    }
    a_floats = rank_begin.back() * padded(d_in);
    panels = floats(a_floats + b_floats);
    float* data = panels.data_ptr<float>();
    for (size_t i = 0; i < lora_as.size(); ++i) {
      const at::Tensor a = as_float(lora_as[i]);
      k.pack_panel(a.data_ptr<float>(), a.size(0), d_in, d_in, 1, rank_begin.back(), rank_begin[i], data);
    }
    for (size_t q = 0; q < ranges.size(); ++q) {
      const RowRange& range = ranges[q];
      const at::Tensor b = as_float(lora_bs[range.adapter]);
      const int64_t rank = b.size(1);
      k.pack_panel(b.data_ptr<float>() + offsets[q] * rank, rank, range.stop - range.start, 1, rank, rank, 0,
                   data + a_floats + range.panel);
    }
    shape.d_in = d_in;
    shape.d_out = weight.size(0);
    shape.total_rank = rank_begin.back();
    shape.rank_begin = rank_begin.data();
    shape.ranges = ranges.data();
    shape.n_ranges = int64_t(ranges.size());
    shape.a_panel = data;
    shape.b_panel = data + a_floats;
    shape.scale = scale.data();
    shape.dropout_p = dropout_p;
    shape.seed = seed ? uint64_t(seed->item<int64_t>()) : 0;
  }
};

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
  const Packed packed(weight, lora_as, lora_bs, scales, factors, rows, dropout_p, seed);
  const at::Tensor x2 = as_rows(x);
  const int64_t m = x2.size(0);
  at::Tensor y = at::empty(with_last(x, weight.size(0)), x.options());
  at::Tensor z = at::empty({m, packed.shape.total_rank}, at::kFloat);
  at::Tensor y2 = y.view({m, weight.size(0)});
  LoraForward p;
  p.shape = packed.shape;
  p.x = matrix(x2);
  p.y = matrix(y2);
  const at::Tensor dense_bias = bias ? bias->contiguous() : at::Tensor();
  p.bias = bias ? dense_bias.data_ptr() : nullptr;
  p.z = z.data_ptr<float>();
  const int64_t parts = parts_for(m, LEAST_ROWS), scratch = kernels().lora_scratch(packed.shape);
  at::Tensor memory = floats(parts * scratch);
  over_parts(parts, m, [&](int64_t part, int64_t begin, int64_t end) {
    kernels().lora_forward(p, begin, end, memory.data_ptr<float>() + part * scratch);
  });
  y2.addmm_(for_blas(x2), for_blas(weight).t());
  return {y, z};
}

Tensors lora_linear_backward(const at::Tensor& dy, const std::optional<at::Tensor>& x, const at::Tensor& weight,
                             const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& z, const Tensors& lora_as,
                             const Tensors& lora_bs, const OptionalTensors& scales, const std::vector<double>& factors,
                             const std::vector<int64_t>& rows, double dropout_p, const std::optional<at::Tensor>& seed,
                             const std::vector<bool>& needs) {
  arguments::lora_linear_backward(DEVICE, dy, x, weight, bias, z, lora_as, lora_bs, scales, factors, rows, dropout_p, seed, needs);
  if (empty::linear(dy, weight)) return empty::lora_linear_backward(dy, weight, bias, lora_as, lora_bs, scales, needs);
  const Packed packed(weight, lora_as, lora_bs, scales, factors, rows, dropout_p, seed);
  const LoraShape& s = packed.shape;
  const at::Tensor dy2 = as_rows(dy);
  const at::Tensor x2 = x ? as_rows(*x) : at::Tensor();
  const int64_t m = dy2.size(0);
  LoraBackward p;
  p.shape = s;
  p.dy = matrix(dy2);
  p.need_dx = needs[0];
  p.need_bias = needs[2];
  // Of every A, every B, every s.
  const size_t adapters = lora_as.size();
  const auto need_as = needs.begin() + 3, need_bs = need_as + adapters, need_scales = need_bs + adapters;
  const auto any = [&](auto first) { return std::find(first, first + adapters, true) != first + adapters; };
  p.need_a = any(need_as), p.need_b = any(need_bs), p.need_s = any(need_scales);
  if (p.need_a) p.x = matrix(x2);
  if (z) p.z = z->data_ptr<float>();
  at::Tensor dx;
  if (p.need_dx) {
    dx = at::empty(with_last(dy, s.d_in), dy.options());
    p.dx = {dx.data_ptr(), s.d_in, dtype_of(dx)};
  }

  // One buffer of gradients per part: A, B, s, bias; parts are summed in order, so the bits do not depend on scheduling.
  const int64_t parts = parts_for(m, LEAST_ROWS), scratch = kernels().lora_scratch(s);
  const int64_t grads = (p.need_a ? packed.a_floats : 0) + (p.need_b ? packed.b_floats : 0) + s.total_rank + (p.need_bias ? s.d_out : 0);
  at::Tensor partial = at::zeros({parts * grads}, at::kFloat), memory = floats(parts * scratch);
  auto bind = [&](LoraBackward& q, float* at) {
    q.grad_a = at;
    q.grad_b = q.grad_a + (q.need_a ? packed.a_floats : 0);
    q.grad_s = q.grad_b + (q.need_b ? packed.b_floats : 0);
    q.grad_bias = q.grad_s + s.total_rank;
  };
  over_parts(parts, m, [&](int64_t part, int64_t begin, int64_t end) {
    LoraBackward q = p;
    bind(q, partial.data_ptr<float>() + part * grads);
    kernels().lora_backward(q, begin, end, memory.data_ptr<float>() + part * scratch);
  });
  sum_parts(partial.data_ptr<float>(), parts, grads);
  bind(p, partial.data_ptr<float>());

  Tensors out;
  if (needs[0]) {
    dx.view({m, s.d_in}).addmm_(for_blas(dy2), for_blas(weight));
    out.push_back(dx);
  }
  if (needs[1]) out.push_back(for_blas(dy2).t().mm(for_blas(x2)));
  if (needs[2]) out.push_back(at::from_blob(p.grad_bias, {s.d_out}, at::kFloat).to(bias->scalar_type(), false, true));
  for (size_t i = 0; i < adapters; ++i) {
    if (!need_as[i]) continue;
    const int64_t rank = lora_as[i].size(0);
    at::Tensor da = at::empty({rank, s.d_in}, at::kFloat);
    kernels().unpack_panel(p.grad_a, rank, s.d_in, s.d_in, 1, s.total_rank, s.rank_begin[i], da.data_ptr<float>());
    out.push_back(da.to(lora_as[i].scalar_type()));
  }
  for (size_t i = 0; i < adapters; ++i) {
    if (!need_bs[i]) continue;
    const int64_t rank = lora_as[i].size(0);
    at::Tensor db = at::empty({lora_bs[i].size(0), rank}, at::kFloat);
    for (size_t q = 0; q < packed.ranges.size(); ++q) {
      const RowRange& range = packed.ranges[q];
      if (range.adapter != int(i)) continue;
      kernels().unpack_panel(p.grad_b + range.panel, rank, range.stop - range.start, 1, rank, rank, 0,
                             db.data_ptr<float>() + packed.offsets[q] * rank);
    }
    out.push_back(db.to(lora_bs[i].scalar_type()));
  }
  for (size_t i = 0; i < adapters; ++i) {
    if (!need_scales[i]) continue;
    at::Tensor ds = at::from_blob(p.grad_s + s.rank_begin[i], {lora_as[i].size(0)}, at::kFloat) * factors[i];
    if (scales[i]->dim() == 0) ds = ds.sum();
    out.push_back(ds.to(scales[i]->scalar_type()));
  }
  return out;
}

}  // namespace fe
