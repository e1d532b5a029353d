// SPDX-License-Identifier: Apache-2.0
// Penalty of one adapter with F = r c^T / sum(c): loss, dA, dB and ds in O((d_out + d_in) rank^2), without F.
//   M = B^T diag(r) B;  N = A diag(c / sum(c)) A^T;  loss = lambda/2 sum_kl s_k s_l M_kl N_kl
//   dA = lambda (S M S) A diag(c / sum(c));  dB = lambda diag(r) B (S N S);  ds_k = lambda sum_l s_l M_kl N_kl
#pragma once
#include "lowrank.h"

namespace fe::FE_ISA {

constexpr int64_t GRAM_ROWS = 12;  // of A at a time: so many rows of lanes exist

// Where the buffers of one call begin in its scratch.
struct FactoredLayout {
  int64_t a_panel, weighted_b, lanes, m, n, panel, end;

  FactoredLayout(int64_t r, int64_t d_out, int64_t d_in)
      : a_panel(aligned(round_up(d_in, L))),
        weighted_b(a_panel + aligned(r * round_up(d_in, L))),
        lanes(weighted_b + aligned(d_out * r)),
        m(lanes + GRAM_ROWS * r * L),
        n(m + aligned(r * r)),
        panel(n + aligned(r * r)),
        end(panel + aligned(r * round_up(r, L))) {}
};

inline int64_t factored_scratch(int64_t rank, int64_t d_out, int64_t d_in) {
  return FactoredLayout(rank, d_out, d_in).end;
}

struct FactoredScratch {
  float *shares, *a_panel, *weighted_b, *lanes, *m, *n, *panel;

  FactoredScratch(const FactoredLayout& f, float* scratch)
      : shares(scratch),
        a_panel(scratch + f.a_panel),
        weighted_b(scratch + f.weighted_b),
        lanes(scratch + f.lanes),
        m(scratch + f.m),
        n(scratch + f.n),
        panel(scratch + f.panel) {}
};

// The panel of A diag(c / sum(c)), of zeros where sum(c) is not positive; NaN stays.
inline void weigh_a(const FactoredAdapter& p, const FactoredScratch& s) {
  vfloat sums{};
  over_vectors(p.d_in, [&](int64_t j, auto extent) { sums += load(p.columns + j, extent); });
  const float total = sum(sums);
  over_vectors(p.d_in,
               [&](int64_t j, auto extent) { store(s.shares + j, total <= 0.f ? vfloat{} : load(p.columns + j, extent) / splat(total)); });
  pack_panel({const_cast<float*>(p.a), p.d_in, Dtype::f32}, p.rank, p.d_in, {s.a_panel, p.rank, L});
  for (int64_t j = 0; j < p.d_in; j += L) {
    const vfloat share = load(s.shares + j);
    float* column = s.a_panel + j * p.rank;
    for (int64_t k = 0; k < p.rank; ++k) store(column + k * L, load(column + k * L) * share);
  }
}

// N, from the panel of A diag(c / sum(c)).
inline void gram_of_a(const FactoredAdapter& p, const FactoredScratch& s) {
  const int64_t r = p.rank;
  for (int64_t k = 0; k < r; k += GRAM_ROWS) {
    const int64_t rows = r - k < GRAM_ROWS ? r - k : GRAM_ROWS;
    std::memset(s.lanes, 0, rows * r * L * sizeof(float));
    dot(p.a + k * p.d_in, p.d_in, rows, p.d_in, s.a_panel, r, s.lanes, r);
    sum_lanes(s.lanes, rows * r, s.n + k * r);
  }
}

// diag(r) B, and M.
inline void gram_of_b(const FactoredAdapter& p, const FactoredScratch& s) {
  const int64_t r = p.rank;
  for (int64_t i = 0; i < p.d_out; ++i)
    for (int64_t k = 0; k < r; ++k) s.weighted_b[i * r + k] = p.rows[i] * p.b[i * r + k];
  reduce(s.weighted_b, r, p.b, r, p.d_out, r, s.panel, r, /*fresh=*/true);
  unpack_panel({s.panel, r, L}, r, r, {s.m, r, Dtype::f32});
}

// In place: lambda S X S.
inline void scale_gram(const FactoredAdapter& p, float* x) {
  for (int64_t k = 0; k < p.rank; ++k)
    for (int64_t l = 0; l < p.rank; ++l) x[k * p.rank + l] *= p.lambda * p.scale[k] * p.scale[l];
}

inline double factored(const FactoredAdapter& p, float* scratch) {
  const int64_t r = p.rank;
  const FactoredScratch s(FactoredLayout(r, p.d_out, p.d_in), scratch);
  weigh_a(p, s);
  gram_of_a(p, s);
  gram_of_b(p, s);
  double loss = 0.0;
  for (int64_t k = 0; k < r; ++k) {
    double along = 0.0;
    for (int64_t l = 0; l < r; ++l) along += double(s.m[k * r + l]) * double(s.n[k * r + l]) * double(p.scale[l]);
    loss += double(p.scale[k]) * along;
    if (p.grad_s) p.grad_s[k] = float(double(p.lambda) * along);
  }
  if (p.grad_a) {
    scale_gram(p, s.m);
    expand(s.m, r, r, s.a_panel, r, p.d_in, [&](int64_t row, int64_t column, int, vfloat v, auto extent) __attribute__((always_inline)) {
      store(p.grad_a + row * p.d_in + column, v, extent);
    });
  }
  if (p.grad_b) {
    scale_gram(p, s.n);
    pack_panel({s.n, r, Dtype::f32}, r, r, {s.panel, r, L});
    expand(s.weighted_b, r, p.d_out, s.panel, r, r,
           [&](int64_t row, int64_t column, int, vfloat v, auto extent)
               __attribute__((always_inline)) { store(p.grad_b + row * r + column, v, extent); });
  }
  return 0.5 * double(p.lambda) * loss;
}

}  // namespace fe::FE_ISA
