// SPDX-License-Identifier: Apache-2.0
// The three products that every low-rank pass is made of, on rows X [m, n] (fp32, contiguous rows) and a panel P of [r, n]:
//   dot     out[m, k] += sum_j X[m, j] P[k, j]          z = x A^T, u = dy B, dB = H A^T
//   expand  out[m, j]  = sum_k C[m, k] P[k, j]          y += z B^T, dx += u A, D = B A; an epilogue takes each vector
//   reduce  G[k, j]   += sum_m C[m, k] X[m, j]          dB = dy^T z, dA = u^T x, dA = B^T H; G is a panel
// Ranks go in register blocks of at most RANK_BLOCK, balanced so that r = 10 is 5 + 5 and not 6 + 4.
#pragma once
#include "simd.h"

namespace fe::FE_ISA {

inline int rank_block(int64_t remaining) {
  int64_t blocks = (remaining + RANK_BLOCK - 1) / RANK_BLOCK;
  return int((remaining + blocks - 1) / blocks);
}

// Calls f with std::integral_constant-like width K in 1..RANK_BLOCK.
template <int K>
struct Width {
  static constexpr int value = K;
};
template <class F>
inline __attribute__((always_inline)) void with_width(int k, F&& f) {
  switch (k) {
    case 1:
      f(Width<1>{});
      break;
    case 2:
      f(Width<2>{});
      break;
    case 3:
      f(Width<3>{});
      break;
#if FE_VECTOR_BYTES == 64
    case 4:
      f(Width<4>{});
      break;
    case 5:
      f(Width<5>{});
      break;
    case 6:
      f(Width<6>{});
      break;
#endif
  }
}

// Lanes of out[m, k] for MR rows and KR ranks, not summed yet: acc += X[m, j..] P[k, j..].
template <int MR, int KR>
inline __attribute__((always_inline)) void dot_lanes(const float* x, int64_t ldx, int64_t n, const float* panel, int64_t r,
                                                     vfloat (&acc)[MR][KR]) {
  int64_t j = 0;
  for (; j + L <= n; j += L, panel += r * L) {
    vfloat xs[MR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) xs[m] = load(x + m * ldx + j);
#pragma GCC unroll 8
    for (int k = 0; k < KR; ++k) {
      vfloat p = load(panel + k * L);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) acc[m][k] += xs[m] * p;
    }
  }
  if (j < n) {
    for (int m = 0; m < MR; ++m) {
      vfloat tail = load(x + m * ldx + j, Part{n - j});
      for (int k = 0; k < KR; ++k) acc[m][k] += tail * load(panel + k * L);
    }
  }
}

constexpr int DOT_ROWS = FE_VECTOR_BYTES == 64 ? 4 : 3;

// Calls f(first row, rows MR, first rank, ranks KR) over blocks of rows and ranks; MR and KR are compile-time widths.
template <class F>
inline __attribute__((always_inline)) void dot_blocks(int64_t rows, int64_t ranks, F&& f) {
  constexpr int MR = DOT_ROWS;
  for (int64_t m = 0; m < rows;) {
    const int64_t left = rows - m;
    for (int64_t k = 0; k < ranks;) {
      const int block = rank_block(ranks - k);
      with_width(block, [&](auto w) __attribute__((always_inline)) {
        if (left >= MR)
          f(m, Width<MR>{}, k, w);
        else if (left >= 2)
          f(m, Width<2>{}, k, w);
        else
          f(m, Width<1>{}, k, w);
      });
      k += block;
    }
    m += left >= MR ? MR : left >= 2 ? 2 : 1;
  }
}

// lanes[m * ldl + k], vectors in memory, += the lanes of out[m, k]. The sum may go on over several column blocks; sum_lanes ends it.
inline void dot(const float* x, int64_t ldx, int64_t rows, int64_t n, const float* panel, int64_t r, float* lanes, int64_t ldl) {
  dot_blocks(rows, r, [&](int64_t m, auto mr, int64_t k, auto kr) __attribute__((always_inline)) {
    constexpr int MR = decltype(mr)::value, KR = decltype(kr)::value;
    vfloat acc[MR][KR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
      for (int q = 0; q < KR; ++q) acc[i][q] = load(lanes + ((m + i) * ldl + k + q) * L);
    dot_lanes<MR, KR>(x + m * ldx, ldx, n, panel + k * L, r, acc);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
      for (int q = 0; q < KR; ++q) store(lanes + ((m + i) * ldl + k + q) * L, acc[i][q]);
  });
}

// epilogue(row, column, v, vector, extent) receives sum_k C[row, k] P[k, column .. column + L), the v-th of at most COLUMNS neighbours;
// extent is Whole, or Part at the right edge.
template <int MR, int NV, class Extent, class Epilogue>
inline __attribute__((always_inline)) void expand_block(const float* c, int64_t ldc, const float* panel, int64_t r, int64_t row,
                                                        int64_t column, Extent extent, Epilogue&& epilogue) {
  vfloat acc[MR][NV] = {};
  const float* p = panel + column * r;
  for (int64_t k = 0; k < r; ++k, p += L) {
    vfloat ps[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) ps[v] = load(p + v * r * L);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      vfloat s = splat(c[m * ldc + k]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[m][v] += s * ps[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) epilogue(row + m, column + v * L, v, acc[m][v], extent);
  }
}

template <int MR, class Epilogue>
inline __attribute__((always_inline)) void expand_rows(const float* c, int64_t ldc, const float* panel, int64_t r, int64_t row, int64_t n,
                                                       Epilogue&& epilogue) {
  int64_t j = 0;
  for (; j + COLUMNS * L <= n; j += COLUMNS * L) expand_block<MR, COLUMNS>(c, ldc, panel, r, row, j, Whole{}, epilogue);
  for (; j + L <= n; j += L) expand_block<MR, 1>(c, ldc, panel, r, row, j, Whole{}, epilogue);
  if (j < n) expand_block<MR, 1>(c, ldc, panel, r, row, j, Part{n - j}, epilogue);
}

template <class Epilogue>
inline __attribute__((always_inline)) void expand(const float* c, int64_t ldc, int64_t rows, const float* panel, int64_t r, int64_t n,
                                                  Epilogue&& epilogue) {
  constexpr int MR = FE_VECTOR_BYTES == 64 ? 6 : 3;
  int64_t m = 0;
  for (; m + MR <= rows; m += MR) expand_rows<MR>(c + m * ldc, ldc, panel, r, m, n, epilogue);
  for (; m < rows; ++m) expand_rows<1>(c + m * ldc, ldc, panel, r, m, n, epilogue);
}

template <int KR, int NV>
inline __attribute__((always_inline)) void reduce_block(const float* c, int64_t ldc, const float* x, int64_t ldx, int64_t rows, float* grad,
                                                        int64_t r, bool fresh) {
  vfloat acc[KR][NV] = {};
  if (!fresh) {
#pragma GCC unroll 8
    for (int k = 0; k < KR; ++k) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[k][v] = load(grad + (v * r + k) * L);
    }
  }
  for (int64_t m = 0; m < rows; ++m, c += ldc, x += ldx) {
    vfloat xs[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) xs[v] = load(x + v * L);
#pragma GCC unroll 8
    for (int k = 0; k < KR; ++k) {
      vfloat s = splat(c[k]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[k][v] += s * xs[v];
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < KR; ++k) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(grad + (v * r + k) * L, acc[k][v]);
  }
}

template <int KR>
inline void reduce_tail(const float* c, int64_t ldc, const float* x, int64_t ldx, int64_t rows, int64_t valid, float* grad, bool fresh) {
  vfloat acc[KR] = {};
  if (!fresh)
    for (int k = 0; k < KR; ++k) acc[k] = load(grad + k * L);
  for (int64_t m = 0; m < rows; ++m, c += ldc, x += ldx) {
    vfloat xs = load(x, Part{valid});
    for (int k = 0; k < KR; ++k) acc[k] += splat(c[k]) * xs;
  }
  for (int k = 0; k < KR; ++k) store(grad + k * L, acc[k]);
}

// Adds to all r ranks of the gradient panel, or overwrites them where it is `fresh`. A strip of columns of X stays in the first-level cache while the ranks pass over it; with
// the loops interchanged, X and the panel together slightly exceed that cache, which sometimes costs a factor of two.
inline void reduce(const float* c, int64_t ldc, const float* x, int64_t ldx, int64_t rows, int64_t n, float* grad, int64_t r,
                   bool fresh = false) {
  auto over_ranks = [&](int64_t j, auto&& block_of) __attribute__((always_inline)) {
    for (int64_t k = 0; k < r;) {
      const int block = rank_block(r - k);
      with_width(block, [&](auto w) __attribute__((always_inline)) { block_of(w, c + k, x + j, grad + j * r + k * L); });
      k += block;
    }
  };
  int64_t j = 0;
  for (; j + COLUMNS * L <= n; j += COLUMNS * L)
    over_ranks(j, [&](auto w, const float* ck, const float* xj, float* g)
                      __attribute__((always_inline)) { reduce_block<decltype(w)::value, COLUMNS>(ck, ldc, xj, ldx, rows, g, r, fresh); });
  for (; j + L <= n; j += L)
    over_ranks(j, [&](auto w, const float* ck, const float* xj, float* g)
                      __attribute__((always_inline)) { reduce_block<decltype(w)::value, 1>(ck, ldc, xj, ldx, rows, g, r, fresh); });
  if (j < n)
    over_ranks(j, [&](auto w, const float* ck, const float* xj, float* g)
                      __attribute__((always_inline)) { reduce_tail<decltype(w)::value>(ck, ldc, xj, ldx, rows, n - j, g, fresh); });
}

// f(rank, column, extent) over the vectors of [r, n], in strips of several vectors along each rank: ranks lie a row apart, where single
// vectors would meet in a few sets of the first-level cache and escape the prefetcher.
template <class F>
inline __attribute__((always_inline)) void over_strips(int64_t r, int64_t n, F&& f) {
  constexpr int64_t STRIP = 8 * L;
  int64_t j = 0;
  for (; j + STRIP <= n; j += STRIP)
    for (int64_t k = 0; k < r; ++k)
#pragma GCC unroll 8
      for (int64_t v = 0; v < STRIP; v += L) f(k, j + v, Whole{});
  for (int64_t k = 0; k < r; ++k) over_vectors(n - j, [&](int64_t v, auto extent) __attribute__((always_inline)) { f(k, j + v, extent); });
}

// The vector of rank k from column j on, a multiple of L.
inline float* vector_at(const Panel& panel, int64_t k, int64_t j) {
  return panel.data + j * panel.per_column + k * panel.per_rank;
}

inline int64_t count_of(Whole) {
  return L;
}
inline int64_t count_of(Part part) {
  return part.n;
}

// A panel of r ranks and n columns from a matrix [r, n] (A).
inline void pack_panel(Matrix rows, int64_t r, int64_t n, Panel panel) {
  with_dtype(rows.dtype, [&](auto d) {
    constexpr Dtype D = decltype(d)::value;
    over_strips(r, n, [&](int64_t k, int64_t j, auto extent) __attribute__((always_inline)) {
      store(vector_at(panel, k, j), load_as<D>(at(rows, k, j), extent));
    });
  });
}

// The same from a matrix [n, r] (B).
inline void pack_transposed(Matrix rows, int64_t r, int64_t n, Panel panel) {
  with_dtype(rows.dtype, [&](auto d) {
    constexpr Dtype D = decltype(d)::value;
    over_vectors(n, [&](int64_t j, auto columns) {
      over_vectors(r, [&](int64_t k, auto ranks) {
        vfloat v[L] = {};
#pragma GCC unroll 16
        for (int64_t i = 0; i < L; ++i)
          if (i < count_of(columns)) v[i] = load_as<D>(at(rows, j + i, k), ranks);
        transpose(v);
#pragma GCC unroll 16
        for (int64_t i = 0; i < L; ++i)
          if (i < count_of(ranks)) store(vector_at(panel, k + i, j), v[i]);
      });
    });
  });
}

// The reverse of both, rounding to the dtype of `rows`.
inline void unpack_panel(Panel panel, int64_t r, int64_t n, Matrix rows) {
  with_dtype(rows.dtype, [&](auto d) {
    constexpr Dtype D = decltype(d)::value;
    over_strips(r, n, [&](int64_t k, int64_t j, auto extent) __attribute__((always_inline)) {
      store_as<D>(at(rows, k, j), load(vector_at(panel, k, j)), extent);
    });
  });
}

inline void unpack_transposed(Panel panel, int64_t r, int64_t n, Matrix rows) {
  with_dtype(rows.dtype, [&](auto d) {
    constexpr Dtype D = decltype(d)::value;
    over_vectors(n, [&](int64_t j, auto columns) {
      over_vectors(r, [&](int64_t k, auto ranks) {
        vfloat v[L] = {};
#pragma GCC unroll 16
        for (int64_t i = 0; i < L; ++i)
          if (i < count_of(ranks)) v[i] = load(vector_at(panel, k + i, j));
        transpose(v);
#pragma GCC unroll 16
        for (int64_t i = 0; i < L; ++i)
          if (i < count_of(columns)) store_as<D>(at(rows, j + i, k), v[i], ranks);
      });
    });
  });
}

}  // namespace fe::FE_ISA
