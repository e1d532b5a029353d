// SPDX-License-Identifier: Apache-2.0
// LoRA linear of few rows of fp32: products by BLAS on the factors as they are. Packing factors would read and write each of them once more,
// which only many rows make up for.
#pragma once
#include "packed.h"

namespace fe::few_rows {

constexpr int64_t MOST = 12;  // rows up to which this is faster than the row passes, where the ranks are not more

inline bool suits(const at::Tensor& rows, const LoraShape& shape) {
  return rows.scalar_type() == at::kFloat && rows.size(0) <= std::max(MOST, shape.total_rank) && shape.dropout_p == 0.0;
}

// A view only where it is one of several.
inline at::Tensor part(const at::Tensor& t, int64_t dim, int64_t first, int64_t count) {
  return count == t.size(dim) ? t : t.narrow(dim, first, count);
}

// values [m, ranks] times the scale of each rank.
inline at::Tensor scaled(const at::Tensor& values, const std::vector<float>& scale) {
  if (std::all_of(scale.begin(), scale.end(), [](float s) { return s == 1.f; })) return values;
  const at::Tensor out = at::empty(values.sizes(), values.options());
  const float* from = values.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  for (int64_t i = 0, ranks = int64_t(scale.size()); i < values.size(0); ++i)
    for (int64_t k = 0; k < ranks; ++k) to[i * ranks + k] = from[i * ranks + k] * scale[k];
  return out;
}

// One range of output rows and its adapter.
struct Piece {
  const RowRange& range;
  int64_t adapter, first, rank, columns, offset;

  Piece(const Packed& packed, size_t q)
      : range(packed.ranges[q]),
        adapter(range.adapter),
        first(packed.rank_begin[adapter]),
        rank(packed.rank_begin[adapter + 1] - first),
        columns(range.stop - range.start),
        offset(packed.offsets[q]) {}

  at::Tensor of_output(const at::Tensor& y) const { return part(y, 1, range.start, columns); }
  at::Tensor of_ranks(const at::Tensor& z) const { return part(z, 1, first, rank); }
  at::Tensor of_rows(const at::Tensor& lora_b) const { return part(lora_b, 0, offset, columns); }
};

inline void forward(const Packed& packed, const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                    const Tensors& lora_as, const Tensors& lora_bs, at::Tensor y, const at::Tensor& z) {
  for (size_t i = 0; i < lora_as.size(); ++i) {
    at::Tensor own = part(z, 1, packed.rank_begin[i], lora_as[i].size(0));
    at::mm_out(own, x, lora_as[i].t());
  }
  if (bias)
    at::addmm_out(y, *bias, x, weight.t());
  else
    at::mm_out(y, x, weight.t());
  const at::Tensor zs = scaled(z, packed.scale);
  for (size_t q = 0; q < packed.ranges.size(); ++q) {
    const Piece piece(packed, q);
    piece.of_output(y).addmm_(piece.of_ranks(zs), piece.of_rows(lora_bs[piece.adapter]).t());
  }
}

// u = (dy B), without the scale.
inline at::Tensor projected(const Packed& packed, const at::Tensor& dy, const Tensors& lora_bs) {
  if (lora_bs.size() == 1 && packed.ranges.size() == 1) return Piece(packed, 0).of_output(dy).mm(lora_bs[0]);
  const at::Tensor products = at::zeros({dy.size(0), packed.shape.total_rank}, dy.options());
  for (size_t q = 0; q < packed.ranges.size(); ++q) {
    const Piece piece(packed, q);
    piece.of_ranks(products).addmm_(piece.of_output(dy), piece.of_rows(lora_bs[piece.adapter]));
  }
  return products;
}

inline at::Tensor gradient_of_b(const Packed& packed, const at::Tensor& dy, const at::Tensor& zs, const at::Tensor& lora_b,
                                size_t adapter) {
  const at::Tensor db = at::empty(lora_b.sizes(), lora_b.options());
  for (size_t q = 0; q < packed.ranges.size(); ++q) {
    const Piece piece(packed, q);
    if (piece.adapter != int64_t(adapter)) continue;
    at::Tensor own = piece.of_rows(db);
    at::mm_out(own, piece.of_output(dy).t(), piece.of_ranks(zs));
  }
  return db;
}

}  // namespace fe::few_rows
