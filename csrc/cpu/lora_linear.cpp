// LoRA linear on the CPU: packs the factors, runs the row passes on all threads, and has BLAS add the base product.
#include <ATen/native/CPUBlas.h>

#include "tensors.h"

namespace fe {
namespace {

// Products per thread below which starting a thread costs more than it saves, and rows below which a register block is not full.
constexpr int64_t LEAST_PRODUCTS = 384 * 1024, LEAST_ROWS = 8;
// Numbers z of a call below which vectors are faster than tiles, which convert rows and factors first, and the depth of a tile.
constexpr int64_t LEAST_TILED = 2048, TILE_DEPTH = 32;
constexpr int64_t LEAST_PACKED = 64 * 1024;  // floats per thread, likewise

int64_t padded(int64_t floats) {
  return (floats + LINE - 1) / LINE * LINE;
}

// f(begin, end) over ranges of the columns of a panel of `rank` ranks, on several threads where it is large.
template <class F>
void over_columns(int64_t rank, int64_t columns, const F& f) {
  const int64_t lanes = kernels().lanes, least = std::max<int64_t>(1, LEAST_PACKED / (rank * lanes));
  at::parallel_for(0, (columns + lanes - 1) / lanes, least,
                   [&](int64_t first, int64_t last) { f(first * lanes, std::min(columns, last * lanes)); });
}

// From column `begin` and rank `first` on, of a panel of `total` ranks.
Panel panel_of(float* panel, int64_t total, int64_t first, int64_t begin) {
  return {panel + begin * total + first * kernels().lanes, total, kernels().lanes};
}

// Rows of bf16 as rows of pairs.
Matrix pairs_of(const at::Tensor& rows) {
  return {rows.data_ptr(), rows.stride(0) / 2, Dtype::f32};
}

uint32_t* words_at(float* floats, int64_t offset) {
  return reinterpret_cast<uint32_t*>(floats) + offset;
}

void tile_product(int64_t rows, int64_t columns, int64_t depth, int64_t lda, int64_t ldb, int64_t ldc, bool add, const uint16_t* a,
                  const uint32_t* b, float* c) {
  at::native::cpublas::brgemm(rows, columns, depth, lda, ldb, ldc, add, reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c);
}

bool has_tiles() {
  static const bool has = at::native::cpublas::could_pack(at::kBFloat16) && std::string(kernels().name) == "avx512";
  return has;
}

// The low-rank part of one call; owns what LoraShape points to, but for the panels.
struct Packed {
  std::vector<int64_t> rank_begin{0};
  std::vector<RowRange> ranges;
  std::vector<int64_t> offsets;  // first row of B of each range
  std::vector<float> scale;
  int64_t a_floats = 0, b_floats = 0;
  LoraShape shape;

  Packed(const at::Tensor& weight, const Tensors& lora_as, const Tensors& lora_bs, const OptionalTensors& scales,
         const std::vector<double>& factors, const std::vector<int64_t>& rows, double dropout_p, const std::optional<at::Tensor>& seed) {
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
    a_floats = rank_begin.back() * padded(weight.size(1));
    shape.d_in = weight.size(1);
    shape.d_out = weight.size(0);
    shape.total_rank = rank_begin.back();
    shape.rank_begin = rank_begin.data();
    shape.ranges = ranges.data();
    shape.n_ranges = int64_t(ranges.size());
    shape.scale = scale.data();
    shape.dtype = dtype_of(weight);
    shape.dropout_p = dropout_p;
    shape.seed = seed ? uint64_t(seed->item<int64_t>()) : 0;
  }
  Packed(const Packed&) = delete;

  // Whether tiles of 16-bit numbers compute all products: where the processor has them, all numbers are bf16, sizes are those of whole tiles
  // and there is enough to do for what they need beforehand.
  bool suits_tiles(int64_t rows, const Tensors& lora_as, const Tensors& lora_bs) const {
    if (rows < TILE_DEPTH || rows * shape.total_rank < LEAST_TILED || shape.dtype != Dtype::bf16 || shape.dropout_p > 0.0) return false;
    const auto whole = [](int64_t size, int64_t unit) { return size % unit == 0; };
    const auto dense = [&](const at::Tensor& t) { return t.scalar_type() == at::kBFloat16 && whole(t.size(0) == 1 ? 0 : t.stride(0), 2); };
    for (const RowRange& range : ranges)
      if (!whole(range.start, 2) || !whole(range.stop - range.start, TILE_DEPTH)) return false;
    for (size_t i = 0; i < lora_as.size(); ++i)
      if (!whole(lora_as[i].size(0), TILE_DEPTH / 2) || !dense(lora_as[i]) || !dense(lora_bs[i])) return false;
    return whole(shape.d_in, TILE_DEPTH) && has_tiles();
  }

  // Packs the factors into a_floats + b_floats floats, for the forward or the backward.
  void pack(const Tensors& lora_as, const Tensors& lora_bs, bool backward, float* to) {
    const Kernels& k = kernels();
    shape.a_panel = to;
    shape.b_panel = to + a_floats;
    for (size_t i = 0; i < lora_as.size(); ++i) {
      const at::Tensor lora_a = as_rows(lora_as[i]);
      const int64_t rank = lora_a.size(0), first = rank_begin[i];
      if (shape.product && backward) {
        k.pack_pairs(matrix(lora_a), rank, shape.d_in, words_at(to, first / 2 * shape.d_in));
      } else if (shape.product) {
        k.pack_transposed(pairs_of(lora_a), shape.d_in / 2, rank, {to + first, 1, shape.total_rank});
      } else {
        over_columns(rank, shape.d_in, [&](int64_t begin, int64_t end) {
          k.pack_panel(part_of(lora_a, 0, begin), rank, end - begin, panel_of(to, shape.total_rank, first, begin));
        });
      }
    }
    for (size_t q = 0; q < ranges.size(); ++q) {
      const int64_t columns = ranges[q].stop - ranges[q].start;
      const at::Tensor lora_b = as_rows(lora_bs[ranges[q].adapter].narrow(0, offsets[q], columns));
      float* panel = to + a_floats + ranges[q].panel;
      const int64_t rank = lora_b.size(1);
      if (shape.product && backward) {
        k.pack_pairs(matrix(lora_b), columns, rank, words_at(panel, 0));
      } else if (shape.product) {
        k.pack_transposed(pairs_of(lora_b), rank / 2, columns, {panel, 1, columns});
      } else {
        over_columns(rank, columns, [&](int64_t begin, int64_t end) {
          k.pack_transposed(part_of(lora_b, begin, 0), rank, end - begin, panel_of(panel, rank, 0, begin));
        });
      }
    }
  }

  // The gradient of one A, from those of all.
  at::Tensor unpacked_a(float* grads, const at::Tensor& lora_a, size_t adapter) const {
    at::Tensor da = at::empty(lora_a.sizes(), lora_a.options());
    const int64_t first = rank_begin[adapter];
    over_columns(da.size(0), shape.d_in, [&](int64_t begin, int64_t end) {
      const Panel panel =
          shape.product ? Panel{grads + first * shape.d_in + begin, 1, shape.d_in} : panel_of(grads, shape.total_rank, first, begin);
      kernels().unpack_panel(panel, da.size(0), end - begin, part_of(da, 0, begin));
    });
    return da;
  }

  at::Tensor unpacked_b(float* grads, const at::Tensor& lora_b, size_t adapter) const {
    at::Tensor db = at::empty(lora_b.sizes(), lora_b.options());
    const int64_t rank = db.size(1);
    for (size_t q = 0; q < ranges.size(); ++q) {
      if (ranges[q].adapter != int(adapter)) continue;
      const int64_t columns = ranges[q].stop - ranges[q].start;
      over_columns(rank, columns, [&](int64_t begin, int64_t end) {
        float* at = grads + ranges[q].panel;
        const Panel panel = shape.product ? Panel{at + begin, 1, columns} : panel_of(at, rank, 0, begin);
        kernels().unpack_transposed(panel, rank, end - begin, part_of(db, offsets[q] + begin, 0));
      });
    }
    return db;
  }

  int64_t parts(int64_t rows) const {
    const int64_t products = rows * shape.total_rank * (shape.d_in + shape.d_out);
    return std::min(parts_for(rows, LEAST_ROWS), parts_for(products, LEAST_PRODUCTS));
  }
};

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
  const int64_t m = x2.size(0), parts = packed.parts(m), scratch = kernels().lora_scratch(packed.shape, most_of(m, parts));
  const at::Tensor memory = floats(packed.a_floats + packed.b_floats + parts * scratch);
  float* panels = memory.data_ptr<float>();
  packed.pack(lora_as, lora_bs, /*backward=*/false, panels);
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
  float* buffers = panels + packed.a_floats + packed.b_floats;
  over_parts(parts, m, [&](int64_t part, int64_t begin, int64_t end) {
    kernels().lora_forward(p, begin, end, buffers + part * scratch);
    if (p.shape.product) at::native::cpublas::brgemm_release();
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
  const at::AutoDispatchBelowADInplaceOrView kernels_alone;
  Packed packed(weight, lora_as, lora_bs, scales, factors, rows, dropout_p, seed);
  const LoraShape& s = packed.shape;
  const at::Tensor dy2 = as_rows(dy);
  const at::Tensor x2 = x ? as_rows(*x) : at::Tensor();
  const int64_t m = dy2.size(0);
  if (packed.suits_tiles(m, lora_as, lora_bs)) packed.shape.product = tile_product;
  LoraBackward p;
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
  if (needs[0]) {
    dx.view({m, s.d_in}).addmm_(for_blas(dy2), for_blas(weight));
    out.push_back(dx);
  }
  if (needs[1]) out.push_back(for_blas(dy2).t().mm(for_blas(x2)));
  if (needs[2]) out.push_back(rounded(p.grad_bias, *bias));
  for (size_t i = 0; i < adapters; ++i)
    if (need_as[i]) out.push_back(packed.unpacked_a(p.grad_a, lora_as[i], i));
  for (size_t i = 0; i < adapters; ++i)
    if (need_bs[i]) out.push_back(packed.unpacked_b(p.grad_b, lora_bs[i], i));
  for (size_t i = 0; i < adapters; ++i) {
    if (!need_scales[i]) continue;
    at::Tensor ds = at::from_blob(p.grad_s + s.rank_begin[i], {lora_as[i].size(0)}, at::kFloat) * factors[i];
    if (scales[i]->dim() == 0) ds = ds.sum();
    out.push_back(ds.to(scales[i]->scalar_type()));
  }
  return out;
}

}  // namespace fe
