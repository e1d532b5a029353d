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
inline vfloat load(const float* p, Part part) {
  vfloat v{};
  for (int64_t i = 0; i < part.n; ++i) v[i] = p[i];
  return v;
}
inline void store(float* p, vfloat v, Part part) {
  for (int64_t i = 0; i < part.n; ++i) p[i] = v[i];
}

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

inline float from_bf16(uint16_t b) {
  uint32_t u = uint32_t(b) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint16_t to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  uint16_t rounded = uint16_t((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
  return f == f ? rounded : uint16_t(0x7FC0);
}

// n elements of any dtype to float.
inline void to_float(const void* source, Dtype dtype, int64_t n, float* out) {
  if (dtype == Dtype::f32) {
    std::memcpy(out, source, n * 4);
  } else if (dtype == Dtype::bf16) {
    const uint16_t* in = static_cast<const uint16_t*>(source);
    for (int64_t i = 0; i < n; ++i) out[i] = from_bf16(in[i]);
  } else {
    const _Float16* in = static_cast<const _Float16*>(source);
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
    for (; i < n; ++i) out[i] = float(in[i]);
  }
}

inline void from_float(const float* in, int64_t n, void* out, Dtype dtype) {
  if (dtype == Dtype::f32) {
    std::memcpy(out, in, n * 4);
  } else if (dtype == Dtype::bf16) {
    uint16_t* to = static_cast<uint16_t*>(out);
    for (int64_t i = 0; i < n; ++i) to[i] = to_bf16(in[i]);
  } else {
    _Float16* to = static_cast<_Float16*>(out);
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < n; ++i) to[i] = _Float16(in[i]);
  }
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
