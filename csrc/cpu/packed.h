// SPDX-License-Identifier: Apache-2.0
// The factors of a LoRA linear as its row passes take them, and their gradients back.
#pragma once
#include <ATen/native/CPUBlas.h>

#include "tensors.h"

namespace fe {

// Products per thread below which starting a thread costs more than it saves, and rows below which a register block is not full.
constexpr int64_t LEAST_PRODUCTS = 384 * 1024, LEAST_ROWS = 8;
// Numbers z of a call below which vectors are faster than tiles, which convert rows and factors first, and the depth of a tile.
constexpr int64_t LEAST_TILED = 512, TILE_DEPTH = 32;
constexpr int64_t LEAST_PACKED = 64 * 1024;  // floats per thread, likewise

inline int64_t padded(int64_t floats) {
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
inline Panel panel_of(float* panel, int64_t total, int64_t first, int64_t begin) {
  return {panel + begin * total + first * kernels().lanes, total, kernels().lanes};
}

// Rows of bf16 as rows of pairs.
inline Matrix pairs_of(const at::Tensor& rows) {
  return {rows.data_ptr(), rows.stride(0) / 2, Dtype::f32};
}

inline uint32_t* words_at(float* floats, int64_t offset) {
  return reinterpret_cast<uint32_t*>(floats) + offset;
}

inline void tile_product(int64_t rows, int64_t columns, int64_t depth, int64_t lda, int64_t ldb, int64_t ldc, bool add, const uint16_t* a,
                         const uint32_t* b, float* c) {
  at::native::cpublas::brgemm(rows, columns, depth, lda, ldb, ldc, add, reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c);
}

inline bool has_tiles() {
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
    if (rows * shape.total_rank < LEAST_TILED || shape.dtype != Dtype::bf16 || shape.dropout_p > 0.0) return false;
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

}  // namespace fe
