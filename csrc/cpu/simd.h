// One vector of floats of the instruction set that FE_VECTOR_BYTES stands for, on the compiler's vector extension.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace fe::FE_ISA {

typedef float vfloat __attribute__((vector_size(FE_VECTOR_BYTES)));
typedef int32_t vint __attribute__((vector_size(FE_VECTOR_BYTES)));
constexpr int64_t L = FE_VECTOR_BYTES / 4;
#if FE_VECTOR_BYTES == 64
constexpr int RANK_BLOCK = 6;  // ranks per pass of a row kernel: 6 x 4 accumulators and their operands fill 32 registers
constexpr int COLUMNS = 4;     // vectors per pass along the wide axis
constexpr int TILE_ROWS = 12, TILE_COLUMNS = 2;  // register tile of the matrix product
#else
constexpr int RANK_BLOCK = 3;  // 16 registers
constexpr int COLUMNS = 3;
constexpr int TILE_ROWS = 6, TILE_COLUMNS = 2;
#endif

inline __attribute__((always_inline)) vfloat load(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline __attribute__((always_inline)) void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof v); }
inline __attribute__((always_inline)) vfloat splat(float s) { return vfloat{} + s; }

inline vfloat load_first(const float* p, int64_t n) {
  vfloat v{};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
inline void store_first(float* p, vfloat v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

inline __attribute__((always_inline)) float sum(vfloat v) {
#if FE_VECTOR_BYTES == 64
  typedef float half __attribute__((vector_size(32)));
  half h = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#elif FE_VECTOR_BYTES == 32
  vfloat h = v;
#endif
  typedef float quarter __attribute__((vector_size(16)));
#if FE_VECTOR_BYTES == 16
  quarter q = v;
#else
  quarter q = __builtin_shufflevector(h, h, 0, 1, 2, 3) + __builtin_shufflevector(h, h, 4, 5, 6, 7);
#endif
  return (q[0] + q[2]) + (q[1] + q[3]);
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
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
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

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace fe::FE_ISA
