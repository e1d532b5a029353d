// SPDX-License-Identifier: Apache-2.0
// The row passes around the base product of a LoRA linear. The base product itself is BLAS's, accumulating onto what these write:
//   forward   z = x A^T;  y <- bias + (z s) B^T          then y += x W^T
//   backward  u = (dy B) s;  dB += dy^T (z s);  dA += u^T x;  dx <- u A          then dx += dy W
// Rows go in chunks that stay in the second-level cache, so dy and x are read from memory once for all that is computed from them.
#pragma once
#include "lora_tiles.inl"

namespace fe::FE_ISA {

// y rows <- bias + (z s) B^T on the adapters' columns, bias elsewhere; `out` is fp32 with the given stride.
inline void seed_output(const LoraShape& s, const float* zs, int64_t n, const float* bias, float* out, int64_t stride) {
  for (int64_t i = 0; i < n; ++i) {
    if (bias)
      std::memcpy(out + i * stride, bias, s.d_out * sizeof(float));
    else
      std::memset(out + i * stride, 0, s.d_out * sizeof(float));
  }
  for (int64_t q = 0; q < s.n_ranges; ++q) {
    const RowRange& range = s.ranges[q];
    const int64_t first = s.rank_begin[range.adapter], rank = s.rank_begin[range.adapter + 1] - first;
    const int64_t columns = range.stop - range.start;
    float* base = out + range.start;
    expand(zs + first, s.total_rank, n, s.b_panel + range.panel, rank, columns,
           [=](int64_t row, int64_t column, int, vfloat v, auto extent) __attribute__((always_inline)) {
             float* p = base + row * stride + column;
             store(p, load(p, extent) + v, extent);
           });
  }
}

// f(first row, rows) over the rows whose lanes are summed at a time: those of one block of `dot`, to have them in the first-level cache.
template <class F>
inline __attribute__((always_inline)) void over_dot_rows(int64_t n, F&& f) {
  for (int64_t i = 0; i < n; i += DOT_ROWS) f(i, n - i < DOT_ROWS ? n - i : int64_t(DOT_ROWS));
}

inline void lora_forward(const LoraForward& p, int64_t m0, int64_t m1, float* scratch) {
  const LoraShape& s = p.shape;
  const LoraBuffers buffers(s, m1 - m0, scratch);
  const int64_t R = s.total_rank;
  if (p.bias) to_float(p.bias, p.y.dtype, s.d_out, buffers.bias);
  if (s.product) return tiled_forward(p, m0, m1, buffers);
  for (int64_t m = m0; m < m1; m += buffers.chunk) {
    const int64_t n = m1 - m < buffers.chunk ? m1 - m : buffers.chunk;
    Rows x = float_rows(p.x, m, n, s.d_in, buffers.x);
    if (s.dropout_p > 0.0) {
      mask_rows(s, m, n, buffers.mask);
      x = times(x, {buffers.mask, buffers.wide}, n, s.d_in, buffers.x);
    }
    float* z = p.z + m * R;
    over_dot_rows(n, [&](int64_t i, int64_t rows) {
      std::memset(buffers.lanes, 0, rows * R * L * sizeof(float));
      dot(x.data + i * x.stride, x.stride, rows, s.d_in, s.a_panel, R, buffers.lanes, R);
      sum_lanes(buffers.lanes, rows * R, z + i * R);
    });
    scale_rows(z, s.scale, n, R, buffers.scaled);
    Matrix y = p.y;
    const float* bias = p.bias ? buffers.bias : nullptr;
    if (y.dtype == Dtype::f32) {
      seed_output(s, buffers.scaled, n, bias, static_cast<float*>(at(y, m, 0)), y.stride);
    } else {
      seed_output(s, buffers.scaled, n, bias, buffers.x, s.d_out);
      for (int64_t i = 0; i < n; ++i) from_float(buffers.x + i * s.d_out, s.d_out, at(y, m + i, 0), y.dtype);
    }
  }
}

// u = (dy B) s over all ranges of every adapter; with grad_s also ds += (dy B) z.
inline void project(const LoraBackward& p, Rows dy, int64_t n, const float* z, float* u, float* lanes) {
  const LoraShape& s = p.shape;
  const int64_t R = s.total_rank;
  over_dot_rows(n, [&](int64_t i, int64_t rows) {
    std::memset(lanes, 0, rows * R * L * sizeof(float));
    for (int64_t q = 0; q < s.n_ranges; ++q) {
      const RowRange& range = s.ranges[q];
      const int64_t first = s.rank_begin[range.adapter], rank = s.rank_begin[range.adapter + 1] - first;
      dot(dy.data + i * dy.stride + range.start, dy.stride, rows, range.stop - range.start, s.b_panel + range.panel, rank,
          lanes + first * L, R);
    }
    sum_lanes(lanes, rows * R, u + i * R);
  });
  if (p.need_s) add_scales(u, z, n, R, p.grad_s);
  scale_rows(u, s.scale, n, R, u);
}

inline void seed_dx(const LoraBackward& p, const float* u, int64_t m, int64_t n, const float* mask, float* rows) {
  const LoraShape& s = p.shape;
  Matrix dx = p.dx;
  const bool direct = dx.dtype == Dtype::f32 && !mask;
  float* base = direct ? static_cast<float*>(at(dx, m, 0)) : rows;
  const int64_t stride = direct ? dx.stride : s.d_in, columns = s.d_in;
  expand(u, s.total_rank, n, s.a_panel, s.total_rank, columns,
         [=](int64_t row, int64_t column, int, vfloat v, auto extent)
             __attribute__((always_inline)) { store(base + row * stride + column, v, extent); });
  if (direct) return;
  if (mask) times({rows, columns}, {mask, widest(s)}, n, columns, rows);
  for (int64_t i = 0; i < n; ++i) from_float(rows + i * columns, columns, at(dx, m + i, 0), dx.dtype);
}

inline void lora_backward(const LoraBackward& p, int64_t m0, int64_t m1, float* scratch) {
  const LoraShape& s = p.shape;
  const LoraBuffers buffers(s, m1 - m0, scratch);
  const int64_t R = s.total_rank;
  const bool masked = s.dropout_p > 0.0 && (p.need_a || p.need_dx);
  if (p.need_s) std::memset(p.grad_s, 0, R * sizeof(float));
  if (p.need_bias) std::memset(p.grad_bias, 0, s.d_out * sizeof(float));
  if (s.product) return tiled_backward(p, m0, m1, buffers);
  for (int64_t m = m0; m < m1; m += buffers.chunk) {
    const int64_t n = m1 - m < buffers.chunk ? m1 - m : buffers.chunk;
    const bool fresh = m == m0;
    const Rows dy = float_rows(p.dy, m, n, s.d_out, buffers.dy);
    const float* z = p.z ? p.z + m * R : nullptr;
    float* u = buffers.sums;
    if (p.need_bias) add_rows(dy, n, s.d_out, p.grad_bias);
    if (p.need_dx || p.need_a || p.need_s) project(p, dy, n, z, u, buffers.lanes);
    if (p.need_b) {
      scale_rows(z, s.scale, n, R, buffers.scaled);
      for (int64_t q = 0; q < s.n_ranges; ++q) {
        const RowRange& range = s.ranges[q];
        const int64_t first = s.rank_begin[range.adapter], rank = s.rank_begin[range.adapter + 1] - first;
        reduce(buffers.scaled + first, R, dy.data + range.start, dy.stride, n, range.stop - range.start, p.grad_b + range.panel, rank,
               fresh);
      }
    }
    if (masked) mask_rows(s, m, n, buffers.mask);
    if (p.need_a) {
      Rows x = float_rows(p.x, m, n, s.d_in, buffers.x);
      if (masked) x = times(x, {buffers.mask, buffers.wide}, n, s.d_in, buffers.x);
      reduce(u, R, x.data, x.stride, n, s.d_in, p.grad_a, R, fresh);
    }
    if (p.need_dx) seed_dx(p, u, m, n, masked ? buffers.mask : nullptr, buffers.x);
  }
}

}  // namespace fe::FE_ISA
