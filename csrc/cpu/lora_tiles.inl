// SPDX-License-Identifier: Apache-2.0
// The row passes of lora_linear.inl on the processor's matrix tiles, for rows, factors and gradients of bf16. Products of bf16 numbers are exact
// in fp32, in which tiles add them up. z, u and what is scaled are fp32 and enter as the sum of two bf16 numbers, which hold 16 of their bits;
// all that is computed from those is rounded to 8.
#pragma once
#include "lora_rows.h"

namespace fe::FE_ISA {

// Word (i, j) has rows 2 i and 2 i + 1 of column j. The depth is even.
inline void pack_pairs(Matrix rows, int64_t depth, int64_t n, uint32_t* words) {
  for (int64_t i = 0; i < depth; i += 2) {
    const uint16_t *even = static_cast<const uint16_t*>(at(rows, i, 0)), *odd = even + rows.stride;
    uint32_t* to = words + i / 2 * n;
    for (int64_t j = 0; j < n; ++j) to[j] = uint32_t(even[j]) | uint32_t(odd[j]) << 16;
  }
}

// The rows of a chunk in pairs, with zeros up to a whole depth of tiles.
inline int64_t pair_rows(const Matrix& source, int64_t m, int64_t n, int64_t columns, uint32_t* words) {
  const int64_t depth = round_up(n, TILE_DEPTH), even = n / 2 * 2;
  pack_pairs({const_cast<void*>(at(source, m, 0)), source.stride, source.dtype}, even, columns, words);
  uint32_t* to = words + even / 2 * columns;
  std::memset(to, 0, (depth - even) / 2 * columns * sizeof(uint32_t));
  if (n > even) {
    const uint16_t* last = static_cast<const uint16_t*>(at(source, m + even, 0));
    for (int64_t j = 0; j < columns; ++j) to[j] = last[j];
  }
  return depth;
}

// values ~ high + low. Inf stays Inf: its rest, Inf - Inf, counts as 0.
inline void split(const float* values, int64_t count, uint16_t* high, uint16_t* low) {
  over_vectors(count, [&](int64_t i, auto extent) {
    const vfloat v = load(values + i, extent), rest = v - widened<Dtype::bf16>(narrowed<Dtype::bf16>(v));
    store_as<Dtype::bf16>(high + i, v, extent);
    store_as<Dtype::bf16>(low + i, (vfloat)((vwide)rest & (vwide)(rest == rest)), extent);
  });
}

// The transposed of values [n, ranks]: [ranks, depth], with zeros behind the n rows.
inline void split_transposed(const float* values, int64_t n, int64_t ranks, int64_t depth, float* turned, uint16_t* high, uint16_t* low) {
  std::memset(turned, 0, ranks * depth * sizeof(float));
  pack_transposed({const_cast<float*>(values), ranks, Dtype::f32}, ranks, n, {turned, 1, depth});
  split(turned, ranks * depth, high, low);
}

inline const uint16_t* bf16_at(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<const uint16_t*>(at(m, row, column));
}

inline const uint32_t* words_of(const float* panel) {
  return reinterpret_cast<const uint32_t*>(panel);
}

// f(range, first rank, ranks, columns).
template <class F>
inline void over_ranges(const LoraShape& s, F&& f) {
  for (int64_t q = 0; q < s.n_ranges; ++q) {
    const RowRange& range = s.ranges[q];
    const int64_t first = s.rank_begin[range.adapter];
    f(range, first, s.rank_begin[range.adapter + 1] - first, range.stop - range.start);
  }
}

inline void tiled_forward(const LoraForward& p, int64_t m0, int64_t m1, const LoraBuffers& buffers) {
  const LoraShape& s = p.shape;
  const int64_t R = s.total_rank;
  const uint16_t* const parts[] = {buffers.high, buffers.low};
  for (int64_t m = m0; m < m1; m += buffers.chunk) {
    const int64_t n = m1 - m < buffers.chunk ? m1 - m : buffers.chunk;
    float *z = p.z + m * R, *y = buffers.x;
    s.product(n, R, s.d_in, p.x.stride, R, R, false, bf16_at(p.x, m, 0), words_of(s.a_panel), z);
    scale_rows(z, s.scale, n, R, buffers.scaled);
    split(buffers.scaled, n * R, buffers.high, buffers.low);
    const bool whole = s.n_ranges == 1 && s.ranges[0].stop - s.ranges[0].start == s.d_out;
    if (!whole) std::memset(y, 0, n * s.d_out * sizeof(float));
    over_ranges(s, [&](const RowRange& range, int64_t first, int64_t rank, int64_t columns) {
      for (const uint16_t* part : parts)
        s.product(n, columns, rank, R, columns, s.d_out, !whole || part == buffers.low, part + first, words_of(s.b_panel + range.panel),
                  y + range.start);
    });
    Matrix out = p.y;
    for (int64_t i = 0; i < n; ++i) {
      uint16_t* to = static_cast<uint16_t*>(at(out, m + i, 0));
      const float *from = y + i * s.d_out, *bias = buffers.bias;
      if (p.bias)
        over_vectors(s.d_out, [&](int64_t j, auto extent) {
          store_as<Dtype::bf16>(to + j, load(from + j, extent) + load(bias + j, extent), extent);
        });
      else
        from_float(from, s.d_out, to, out.dtype);
    }
  }
}

inline void tiled_backward(const LoraBackward& p, int64_t m0, int64_t m1, const LoraBuffers& buffers) {
  const LoraShape& s = p.shape;
  const int64_t R = s.total_rank;
  const uint16_t* const parts[] = {buffers.high, buffers.low};
  float* u = buffers.sums;
  for (int64_t m = m0; m < m1; m += buffers.chunk) {
    const int64_t n = m1 - m < buffers.chunk ? m1 - m : buffers.chunk;
    const bool add = m > m0;
    const float* z = p.z ? p.z + m * R : nullptr;
    if (p.need_bias) add_rows(float_rows(p.dy, m, n, s.d_out, buffers.dy), n, s.d_out, p.grad_bias);
    if (p.need_dx || p.need_a || p.need_s) {
      std::memset(u, 0, n * R * sizeof(float));
      over_ranges(s, [&](const RowRange& range, int64_t first, int64_t rank, int64_t columns) {
        s.product(n, rank, columns, p.dy.stride, rank, R, true, bf16_at(p.dy, m, range.start), words_of(s.b_panel + range.panel),
                  u + first);
      });
      if (p.need_s) add_scales(u, z, n, R, p.grad_s);
      scale_rows(u, s.scale, n, R, u);
    }
    if (p.need_b) {
      const int64_t depth = pair_rows(p.dy, m, n, s.d_out, buffers.words);
      scale_rows(z, s.scale, n, R, buffers.scaled);
      split_transposed(buffers.scaled, n, R, depth, buffers.turned, buffers.high, buffers.low);
      over_ranges(s, [&](const RowRange& range, int64_t first, int64_t rank, int64_t columns) {
        for (const uint16_t* part : parts)
          s.product(rank, columns, depth, depth, s.d_out, columns, add || part == buffers.low, part + first * depth,
                    buffers.words + range.start, p.grad_b + range.panel);
      });
    }
    if (p.need_a) {
      const int64_t depth = pair_rows(p.x, m, n, s.d_in, buffers.words);
      split_transposed(u, n, R, depth, buffers.turned, buffers.high, buffers.low);
      for (const uint16_t* part : parts)
        s.product(R, s.d_in, depth, depth, s.d_in, s.d_in, add || part == buffers.low, part, buffers.words, p.grad_a);
    }
    if (p.need_dx) {
      Matrix dx = p.dx;
      split(u, n * R, buffers.high, buffers.low);
      for (const uint16_t* part : parts)
        s.product(n, s.d_in, R, R, s.d_in, s.d_in, part == buffers.low, part, words_of(s.a_panel), buffers.x);
      for (int64_t i = 0; i < n; ++i) from_float(buffers.x + i * s.d_in, s.d_in, at(dx, m + i, 0), dx.dtype);
    }
  }
}

}  // namespace fe::FE_ISA
