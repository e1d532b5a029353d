// SPDX-License-Identifier: Apache-2.0
// EWC penalty of one adapter over a range of rows: loss, dA, dB and ds from one read of F.
//   D = (B s) A;  H = F * D;  loss = lambda/2 sum H * D;  dB = lambda (H A^T) s;  dA = lambda (B s)^T H;  ds = lambda sum_i B (H A^T)
// The l1 norm of D runs through the same passes with H = sign(D), loss = lambda sum H * D, and no F.
// H exists only as a tile of F_ROWS x F_COLUMNS floats in the first-level cache. Strips of rows run along F as it lies in memory; the
// lanes of H A^T are summed once per strip.
#pragma once
#include "lowrank.h"

namespace fe::FE_ISA {

constexpr int64_t F_ROWS = 12, F_COLUMNS = 512;  // H 24 KiB, in the first-level cache beside a strip of the factors

inline int64_t penalty_scratch(int64_t rank, int64_t d_in) {
  return 2 * F_ROWS * F_COLUMNS + aligned(F_ROWS * rank) + F_ROWS * rank * L + 2 * rank * round_up(d_in, L);
}

// A tile of F in fp32, from its first row and column on.
struct FisherValues {
  const float* first;
  int64_t stride;

  // H of elements D from (row, column) on.
  template <class Extent>
  inline __attribute__((always_inline)) vfloat times(vfloat d, int64_t row, int64_t column, Extent extent) const {
    return load(first + row * stride + column, extent) * d;
  }
  // Strips are too short along a row for the hardware prefetcher to detect them. Into L2: a strip is as large as L1.
  inline __attribute__((always_inline)) void prefetch(int64_t row, int64_t column, int) const {
    __builtin_prefetch(first + (row + F_ROWS) * stride + column, 0, 2);
  }
};

constexpr int64_t CODE_BLOCK = 32;  // codes that share a scale; a vector has no more, and tiles begin at multiples of it
typedef uint8_t vcodes __attribute__((vector_size(L)));

// A tile of F as codes: code c of a block with scale s, a bf16 number, is s c^2. Codes and scales of a row are padded to whole blocks.
struct FisherCodes {
  const uint8_t *codes, *scales;
  int64_t stride;  // bytes

  template <class Extent>
  inline __attribute__((always_inline)) vfloat times(vfloat d, int64_t row, int64_t column, Extent) const {
    vcodes code;
    std::memcpy(&code, codes + row * stride + column, L);
    uint16_t high;
    std::memcpy(&high, scales + row * stride + uint64_t(column) / CODE_BLOCK * sizeof high, sizeof high);
    const uint32_t bits = uint32_t(high) << 16;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    const vfloat value = __builtin_convertvector(__builtin_convertvector(code, vint), vfloat);
    return value * value * splat(scale) * d;
  }
  inline __attribute__((always_inline)) void prefetch(int64_t row, int64_t column, int v) const {
    if (v == 0) __builtin_prefetch(codes + (row + F_ROWS) * stride + column, 0, 2);  // a line of codes is several vectors of values
  }
};

// H of the l1 norm: 1, 0 or -1, and 0 where D is no number, as torch.sign; the loss is no number then.
struct Signs {
  template <class Extent>
  inline __attribute__((always_inline)) vfloat times(vfloat d, int64_t, int64_t, Extent) const {
    const vint positive = d > 0.f, negative = d < 0.f;  // -1 where true
    return __builtin_convertvector(negative - positive, vfloat);
  }
  inline __attribute__((always_inline)) void prefetch(int64_t, int64_t, int) const {}
};

// Writes H of one tile and adds H * D to `loss`.
template <class Fisher>
inline void penalty_tile(const Fisher& fisher, int64_t rows, int64_t columns, const float* sb, const float* panel, int64_t r, float* h,
                         vfloat& loss) {
  vfloat sums[COLUMNS] = {};
  vfloat* total = sums;
  expand(sb, r, rows, panel, r, columns, [=](int64_t row, int64_t column, int v, vfloat found, auto extent) __attribute__((always_inline)) {
    const vfloat d = inside(found, extent);  // an infinite element of B times the padding of A is no number
    const vfloat value = fisher.times(d, row, column, extent);
    fisher.prefetch(row, column, v);
    total[v] += value * d;
    store(h + row * F_COLUMNS + column, value);
  });
  for (int v = 0; v < COLUMNS; ++v) loss += sums[v];
}

// Buffers of one call, cut from its scratch.
struct PenaltyScratch {
  float *h, *converted, *scaled, *lanes, *panel, *grad_panel;

  PenaltyScratch(const PenaltyAdapter& p, float* scratch)
      : h(scratch),
        converted(h + F_ROWS * F_COLUMNS),
        scaled(converted + F_ROWS * F_COLUMNS),
        lanes(scaled + aligned(F_ROWS * p.rank)),
        panel(lanes + F_ROWS * p.rank * L),
        grad_panel(panel + p.rank * round_up(p.d_in, L)) {}
};

// Rows [i, i + rows) of F: returns sum H * D, adds to the panel of (B s)^T H, leaves H A^T in s.lanes.
inline float penalty_strip(const PenaltyAdapter& p, const PenaltyScratch& s, int64_t i, int64_t rows) {
  const int64_t r = p.rank;
  const float* sb = p.b + i * r;
  if (p.scale) {
    for (int64_t q = 0; q < rows; ++q)
      for (int64_t k = 0; k < r; ++k) s.scaled[q * r + k] = sb[q * r + k] * p.scale[k];
    sb = s.scaled;
  }
  vfloat loss{};
  const bool need_h_a = p.need_b || p.need_s;
  if (need_h_a) std::memset(s.lanes, 0, rows * r * L * sizeof(float));
  for (int64_t j = 0; j < p.d_in; j += F_COLUMNS) {
    const int64_t columns = p.d_in - j < F_COLUMNS ? p.d_in - j : F_COLUMNS;
    const float* a = s.panel + j * r;  // F_COLUMNS is a multiple of L
    if (p.l1) {
      penalty_tile(Signs{}, rows, columns, sb, a, r, s.h, loss);
    } else if (p.codes) {
      const uint8_t* row = static_cast<const uint8_t*>(p.fisher.data) + i * p.fisher.stride;
      const uint8_t* scales = row + round_up(p.d_in, CODE_BLOCK) + j / CODE_BLOCK * sizeof(uint16_t);
      penalty_tile(FisherCodes{row + j, scales, p.fisher.stride}, rows, columns, sb, a, r, s.h, loss);
    } else if (p.fisher.dtype == Dtype::f32) {
      const FisherValues values{static_cast<const float*>(at(p.fisher, i, j)), p.fisher.stride};
      penalty_tile(values, rows, columns, sb, a, r, s.h, loss);
    } else {
      for (int64_t q = 0; q < rows; ++q) to_float(at(p.fisher, i + q, j), p.fisher.dtype, columns, s.converted + q * F_COLUMNS);
      penalty_tile(FisherValues{s.converted, F_COLUMNS}, rows, columns, sb, a, r, s.h, loss);
    }
    if (need_h_a) dot(s.h, F_COLUMNS, rows, columns, a, r, s.lanes, r);
    if (p.need_a) reduce(sb, r, s.h, F_COLUMNS, rows, columns, s.grad_panel + j * r, r);
  }
  return sum(loss);
}

inline double penalty(const PenaltyAdapter& p, int64_t row0, int64_t row1, float* grad_a, float* grad_s, float* scratch) {
  const PenaltyScratch s(p, scratch);
  const int64_t r = p.rank, panel_floats = r * round_up(p.d_in, L);
  pack_panel({const_cast<float*>(p.a), p.d_in, Dtype::f32}, r, p.d_in, {s.panel, r, L});
  if (p.need_a) std::memset(s.grad_panel, 0, panel_floats * sizeof(float));
  double loss = 0.0;
  for (int64_t i = row0; i < row1; i += F_ROWS) {
    const int64_t rows = row1 - i < F_ROWS ? row1 - i : F_ROWS;
    loss += penalty_strip(p, s, i, rows);
    if (!p.need_b && !p.need_s) continue;
    sum_lanes(s.lanes, rows * r, s.scaled);
    for (int64_t q = 0; q < rows; ++q)
      for (int64_t k = 0; k < r; ++k) {
        const float h_a = p.lambda * s.scaled[q * r + k];
        if (p.need_s) grad_s[k] += p.b[(i + q) * r + k] * h_a;
        if (p.need_b) p.grad_b[(i + q) * r + k] = p.scale ? h_a * p.scale[k] : h_a;
      }
  }
  if (p.need_a) {
    for (int64_t q = 0; q < panel_floats; ++q) s.grad_panel[q] *= p.lambda;
    unpack_panel({s.grad_panel, r, L}, r, p.d_in, {grad_a, p.d_in, Dtype::f32});
  }
  return (p.l1 ? 1.0 : 0.5) * double(p.lambda) * loss;
}

}  // namespace fe::FE_ISA
