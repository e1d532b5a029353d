// EWC penalty of one adapter over a range of rows: loss, dA, dB and ds from one read of F.
//   D = (B s) A;  H = lambda F * D;  loss += H * D / 2;  dB = (H A^T) s;  dA = (B s)^T H;  ds = sum_i B (H A^T)
// H exists only as a tile of TILE_ROWS_F x TILE_COLUMNS_F floats in the first-level cache.
#pragma once
#include "lowrank.h"

namespace fe::FE_ISA {

constexpr int64_t F_ROWS = 12, F_COLUMNS = 256;  // H 12 KiB; beside it 10 ranks of A and of dA take 20 KiB

inline int64_t penalty_scratch(int64_t rank, int64_t, int64_t d_in) {
  return 2 * F_ROWS * F_COLUMNS + F_ROWS * rank + 2 * rank * round_up(d_in, L);
}

// Loss of one tile; writes H. fisher is fp32 with the given stride.
inline float penalty_tile(const float* fisher, int64_t stride, int64_t rows, int64_t columns, const float* sb, const float* panel,
                          int64_t r, float lambda, float* h) {
  vfloat loss{};
  vfloat* total = &loss;
  const vfloat l = splat(lambda);
  expand(sb, r, rows, panel, r, 0, r, columns, [=](int64_t row, int64_t column, vfloat d) __attribute__((always_inline)) {
    const float* f = fisher + row * stride + column;
    vfloat value;
    if (column + L <= columns) {
      value = load(f);
      __builtin_prefetch(f + F_ROWS * stride);
    } else {
      value = load_first(f, columns - column);
    }
    value = l * value * d;
    *total += value * d;
    store(h + row * F_COLUMNS + column, value);
  });
  return 0.5f * sum(loss);
}

inline void add_h_a(const PenaltyAdapter& p, int64_t row0, int64_t row1, float* grad_s) {
  for (int64_t i = row0; i < row1; ++i)
    for (int64_t k = 0; k < p.rank; ++k) {
      float& g = p.grad_b[i * p.rank + k];
      if (p.need_s) grad_s[k] += p.b[i * p.rank + k] * g;
      if (p.scale) g *= p.scale[k];
    }
}

inline double penalty(const PenaltyAdapter& p, int64_t row0, int64_t row1, float* grad_a, float* grad_s, float* scratch) {
  const int64_t r = p.rank;
  float *h = scratch, *converted = h + F_ROWS * F_COLUMNS, *scaled = converted + F_ROWS * F_COLUMNS;
  float *panel = scaled + F_ROWS * r, *grad_panel = panel + r * round_up(p.d_in, L);
  pack_panel(p.a, r, p.d_in, p.d_in, 1, r, 0, panel);
  if (p.need_a) std::memset(grad_panel, 0, r * round_up(p.d_in, L) * sizeof(float));
  double loss = 0.0;
  for (int64_t j = 0; j < p.d_in; j += F_COLUMNS) {
    const int64_t columns = p.d_in - j < F_COLUMNS ? p.d_in - j : F_COLUMNS;
    const float* a = panel + j * r;  // F_COLUMNS is a multiple of L
    for (int64_t i = row0; i < row1; i += F_ROWS) {
      const int64_t rows = row1 - i < F_ROWS ? row1 - i : F_ROWS;
      const float* sb = p.b + i * r;
      if (p.scale) {
        for (int64_t q = 0; q < rows * r; ++q) scaled[q] = sb[q] * p.scale[q % r];
        sb = scaled;
      }
      const float* f = converted;
      int64_t stride = F_COLUMNS;
      if (p.fisher.dtype == Dtype::f32) {
        f = static_cast<const float*>(at(p.fisher, i, j));
        stride = p.fisher.stride;
      } else {
        for (int64_t q = 0; q < rows; ++q) to_float(at(p.fisher, i + q, j), p.fisher.dtype, columns, converted + q * F_COLUMNS);
      }
      loss += penalty_tile(f, stride, rows, columns, sb, a, r, p.lambda, h);
      float* h_a = p.grad_b + i * r;
      if ((p.need_b || p.need_s) && j == 0) dot<false>(h, F_COLUMNS, rows, columns, a, r, 0, r, h_a, r);
      if ((p.need_b || p.need_s) && j > 0) dot<true>(h, F_COLUMNS, rows, columns, a, r, 0, r, h_a, r);
      if (p.need_a) reduce(sb, r, h, F_COLUMNS, rows, columns, grad_panel + j * r, r, 0, r);
    }
  }
  if (p.need_b || p.need_s) add_h_a(p, row0, row1, grad_s);
  if (p.need_a) unpack_panel(grad_panel, r, p.d_in, p.d_in, 1, r, 0, grad_a);
  return loss;
}

}  // namespace fe::FE_ISA
