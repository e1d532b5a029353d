// SPDX-License-Identifier: Apache-2.0
// One vector of floats of the instruction set that FE_VECTOR_BYTES stands for, on the compiler's vector extension.
#pragma once
#include <cstdint>
#include <cstring>
#if FE_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

#include "kernels.h"

namespace fe::FE_ISA {

typedef float vfloat __attribute__((vector_size(FE_VECTOR_BYTES)));
typedef int32_t vint __attribute__((vector_size(FE_VECTOR_BYTES)));
constexpr int64_t L = FE_VECTOR_BYTES / 4;
#if FE_VECTOR_BYTES == 64
constexpr int RANK_BLOCK = 6;                    // ranks per pass of a row kernel: 6 x 4 accumulators and their operands fill 32 registers
constexpr int COLUMNS = 4;                       // vectors per pass along the wide axis
constexpr int TILE_ROWS = 12, TILE_COLUMNS = 2;  // register tile of the matrix product
#else
constexpr int RANK_BLOCK = 3;  // 16 registers
constexpr int COLUMNS = 3;
constexpr int TILE_ROWS = 6, TILE_COLUMNS = 2;
#endif

// The lane numbers 0 .. L - 1 as template arguments.
template <int64_t... I>
struct Lanes {};
template <int64_t N, int64_t... I>
struct CountLanes : CountLanes<N - 1, N - 1, I...> {};
template <int64_t... I>
struct CountLanes<0, I...> {
  using type = Lanes<I...>;
};
using AllLanes = CountLanes<L>::type;

inline __attribute__((always_inline)) vfloat load(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline __attribute__((always_inline)) void store(float* p, vfloat v) {
  std::memcpy(p, &v, sizeof v);
}
// s - 0 is s for every s, so this is one broadcast; s + 0 would be an addition (it turns -0 into 0).
inline __attribute__((always_inline)) vfloat splat(float s) {
  return s - vfloat{};
}

// How much of a vector lies inside a matrix: all of it, or the first n lanes at its right edge. Known at compile time in the main loops.
struct Whole {};
struct Part {
  int64_t n;
};
inline __attribute__((always_inline)) vfloat load(const float* p, Whole) {
  return load(p);
}
inline __attribute__((always_inline)) void store(float* p, vfloat v, Whole) {
  store(p, v);
}
// The lanes inside the matrix; 0 in the others, whatever was computed there.
inline __attribute__((always_inline)) vfloat inside(vfloat v, Whole) {
  return v;
}
#if FE_VECTOR_BYTES == 64
inline __attribute__((always_inline)) vfloat load(const float* p, Part part) {
  return (vfloat)_mm512_maskz_loadu_ps(__mmask16((1u << part.n) - 1), p);
}
inline __attribute__((always_inline)) void store(float* p, vfloat v, Part part) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << part.n) - 1), (__m512)v);
}
inline __attribute__((always_inline)) vfloat inside(vfloat v, Part part) {
  return (vfloat)_mm512_maskz_mov_ps(__mmask16((1u << part.n) - 1), (__m512)v);
}
#else
inline vfloat load(const float* p, Part part) {
  vfloat v{};
  for (int64_t i = 0; i < part.n; ++i) v[i] = p[i];
  return v;
}
inline void store(float* p, vfloat v, Part part) {
  for (int64_t i = 0; i < part.n; ++i) p[i] = v[i];
}
inline vfloat inside(vfloat v, Part part) {
  for (int64_t i = part.n; i < L; ++i) v[i] = 0.f;
  return v;
}
#endif

inline __attribute__((always_inline)) float sum(vfloat v) {
  float s = 0.f;
  for (int64_t l = 0; l < L; ++l) s += v[l];
  return s;
}

// Within each group of S lanes: the first (HIGH = false) or second halves of a's and b's group, side by side.
template <int64_t S, bool HIGH, int64_t... I>
inline __attribute__((always_inline)) vfloat halves(vfloat a, vfloat b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, ((I / S) * S + I % (S / 2) + (HIGH ? S / 2 : 0) + (I % S >= S / 2 ? L : 0))...);
}

// out[i] = sum of the lanes of v[i], for L vectors: each step folds two vectors into one, L - 1 additions in all.
template <int64_t S>
inline __attribute__((always_inline)) vfloat sums_of(const vfloat* v) {
  if constexpr (S == 1) {
    return v[0];
  } else {
    vfloat folded[S / 2];
#pragma GCC unroll 16
    for (int64_t i = 0; i < S / 2; ++i)
      folded[i] = halves<S, false>(v[i], v[i + S / 2], AllLanes{}) + halves<S, true>(v[i], v[i + S / 2], AllLanes{});
    return sums_of<S / 2>(folded);
  }
}

// Lanes I of a where bit S of I is clear, of its neighbour where it is set: the halves of each group of 2 S lanes change places between the
// two vectors, as in a 2 x 2 transposition of blocks of S.
template <int64_t S, bool HIGH, int64_t... I>
inline __attribute__((always_inline)) vfloat exchanged(vfloat a, vfloat b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, ((I & S ? L + I - S : I) + (HIGH ? S : 0))...);
}

// v[i][l] becomes v[l][i].
template <int64_t S = 1>
inline __attribute__((always_inline)) void transpose(vfloat* v) {
  if constexpr (S < L) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i) {
      if (i & S) continue;
      const vfloat a = v[i], b = v[i + S];
      v[i] = exchanged<S, false>(a, b, AllLanes{});
      v[i + S] = exchanged<S, true>(a, b, AllLanes{});
    }
    transpose<2 * S>(v);
  }
}

// out[i] = sum of the lanes of vector i of n vectors in memory.
inline void sum_lanes(const float* lanes, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    vfloat v[L];
#pragma GCC unroll 16
    for (int64_t q = 0; q < L; ++q) v[q] = load(lanes + (i + q) * L);
    store(out + i, sums_of<L>(v));
  }
  for (; i < n; ++i) out[i] = sum(load(lanes + i * L));
}

// L elements of a dtype as one vector, and back. Conversions of 512 bits have a mask of all lanes, since GCC warns about the forms without.
typedef uint16_t vbits __attribute__((vector_size(FE_VECTOR_BYTES / 2)));
typedef uint32_t vwide __attribute__((vector_size(FE_VECTOR_BYTES)));

template <Dtype D>
inline __attribute__((always_inline)) vfloat widened(vbits bits) {
  if constexpr (D == Dtype::bf16) return (vfloat)(__builtin_convertvector(bits, vwide) << 16);
#if FE_VECTOR_BYTES == 64
  return (vfloat)_mm512_maskz_cvtph_ps(0xFFFF, (__m256i)bits);
#elif FE_VECTOR_BYTES == 32
  return (vfloat)_mm256_cvtph_ps((__m128i)bits);
#else
  _Float16 halves[L];
  std::memcpy(halves, &bits, sizeof bits);
  vfloat v{};
  for (int64_t i = 0; i < L; ++i) v[i] = float(halves[i]);
  return v;
#endif
}

// Rounded to nearest, ties to even; every NaN of bf16 becomes the same.
template <Dtype D>
inline __attribute__((always_inline)) vbits narrowed(vfloat v) {
  if constexpr (D == Dtype::bf16) {
    const vwide u = (vwide)v, rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16, number = (vwide)(v == v);
    return __builtin_convertvector((rounded & number) | (~number & 0x7FC0), vbits);
  }
#if FE_VECTOR_BYTES == 64
  return (vbits)_mm512_maskz_cvtps_ph(0xFFFF, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif FE_VECTOR_BYTES == 32
  return (vbits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  _Float16 halves[L];
  for (int64_t i = 0; i < L; ++i) halves[i] = _Float16(v[i]);
  vbits bits;
  std::memcpy(&bits, halves, sizeof bits);
  return bits;
#endif
}

template <Dtype D>
inline __attribute__((always_inline)) vfloat load_as(const void* p, Whole) {
  if constexpr (D == Dtype::f32) return load(static_cast<const float*>(p));
  vbits bits;
  std::memcpy(&bits, p, sizeof bits);
  return widened<D>(bits);
}
template <Dtype D>
inline __attribute__((always_inline)) void store_as(void* p, vfloat v, Whole) {
  if constexpr (D == Dtype::f32) return store(static_cast<float*>(p), v);
  const vbits bits = narrowed<D>(v);
  std::memcpy(p, &bits, sizeof bits);
}

// The first n of L elements; what is behind them is neither read nor written.
template <Dtype D>
inline __attribute__((always_inline)) vfloat load_as(const void* p, Part part) {
  if constexpr (D == Dtype::f32) return load(static_cast<const float*>(p), part);
#if FE_VECTOR_BYTES == 64
  return widened<D>((vbits)_mm256_maskz_loadu_epi16(__mmask16((1u << part.n) - 1), p));
#else
  vbits bits{};
  std::memcpy(&bits, p, part.n * sizeof(uint16_t));
  return widened<D>(bits);
#endif
}
template <Dtype D>
inline __attribute__((always_inline)) void store_as(void* p, vfloat v, Part part) {
  if constexpr (D == Dtype::f32) return store(static_cast<float*>(p), v, part);
  const vbits bits = narrowed<D>(v);
#if FE_VECTOR_BYTES == 64
  _mm256_mask_storeu_epi16(p, __mmask16((1u << part.n) - 1), (__m256i)bits);
#else
  std::memcpy(p, &bits, part.n * sizeof(uint16_t));
#endif
}

// Calls f with the dtype as a compile-time value.
template <Dtype D>
struct DtypeOf {
  static constexpr Dtype value = D;
};
template <class F>
inline void with_dtype(Dtype dtype, F&& f) {
  if (dtype == Dtype::f32)
    f(DtypeOf<Dtype::f32>{});
  else if (dtype == Dtype::bf16)
    f(DtypeOf<Dtype::bf16>{});
  else
    f(DtypeOf<Dtype::f16>{});
}

// f(column, extent) over vectors of columns [0, n).
template <class F>
inline __attribute__((always_inline)) void over_vectors(int64_t n, F&& f) {
  int64_t j = 0;
  for (; j + L <= n; j += L) f(j, Whole{});
  if (j < n) f(j, Part{n - j});
}

// n elements of any dtype to float, and back.
inline void to_float(const void* source, Dtype dtype, int64_t n, float* out) {
  with_dtype(dtype, [&](auto d) {
    constexpr Dtype D = decltype(d)::value;
    const char* from = static_cast<const char*>(source);
    over_vectors(n, [&](int64_t i, auto extent) { store(out + i, load_as<D>(from + i * bytes_of(D), extent), extent); });
  });
}
inline void from_float(const float* in, int64_t n, void* out, Dtype dtype) {
  with_dtype(dtype, [&](auto d) {
    constexpr Dtype D = decltype(d)::value;
    char* to = static_cast<char*>(out);
    over_vectors(n, [&](int64_t i, auto extent) { store_as<D>(to + i * bytes_of(D), load(in + i, extent), extent); });
  });
}

inline const void* at(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<const char*>(m.data) + (row * m.stride + column) * bytes_of(m.dtype);
}
inline void* at(Matrix& m, int64_t row, int64_t column) {
  return static_cast<char*>(m.data) + (row * m.stride + column) * bytes_of(m.dtype);
}

inline int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

// Buffers are cut from 64-byte aligned scratch in whole cache lines: a vector that straddles two lines costs two accesses.
inline int64_t aligned(int64_t floats) {
  return round_up(floats, 16);
}

}  // namespace fe::FE_ISA
