// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 dropout masks (Salmon et al., SC'11), the same map from (seed, row, column) as fused_ewclora/reference/philox.py.
#pragma once
#include "simd.h"

namespace fe::FE_ISA {

constexpr int PHILOX_ROUNDS = 10;
constexpr uint32_t PHILOX_M0 = 0xD2511F53, PHILOX_M1 = 0xCD9E8D57, PHILOX_W0 = 0x9E3779B9, PHILOX_W1 = 0xBB67AE85;

// Each lane holds one 32-bit word in 64 bits, so that a product keeps both of its halves.
typedef uint64_t vwords __attribute__((vector_size(FE_VECTOR_BYTES)));
typedef uint32_t vhalves __attribute__((vector_size(FE_VECTOR_BYTES)));
constexpr int64_t COUNTERS = FE_VECTOR_BYTES / 8;
constexpr int64_t MASK_BLOCK = 8 * COUNTERS;  // columns per step: two vectors of counters, four words each

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own header trips over its "undefined" vectors
inline __attribute__((always_inline)) vwords multiply(vwords a, uint32_t b) {
#if FE_VECTOR_BYTES == 64
  return (vwords)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif FE_VECTOR_BYTES == 32
  return (vwords)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return a * uint64_t(b);
#endif
}

template <int64_t... I>
inline __attribute__((always_inline)) vwords counting(Lanes<I...>) {
  return vwords{uint64_t(I)...};
}

struct Counters {
  vwords c0, c1, c2, c3;
};

inline __attribute__((always_inline)) void philox_round(Counters& c, uint32_t k0, uint32_t k1) {
  const vwords p0 = multiply(c.c0, PHILOX_M0), p1 = multiply(c.c2, PHILOX_M1);
  c.c0 = (p1 >> 32) ^ c.c1 ^ uint64_t(k0);
  c.c1 = p1 & 0xFFFFFFFFull;
  c.c2 = (p0 >> 32) ^ c.c3 ^ uint64_t(k1);
  c.c3 = p0 & 0xFFFFFFFFull;
}

// [a0 b0 a1 b1 ...], first or second half of it.
template <bool HIGH, int64_t... I>
inline __attribute__((always_inline)) vwords interleave(vwords a, vwords b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + (HIGH ? COUNTERS / 2 : 0) + (I % 2 ? COUNTERS : 0))...);
}

inline __attribute__((always_inline)) void keep_words(vwords words, uint32_t threshold, float factor, float* keep) {
  uint32_t bits;
  std::memcpy(&bits, &factor, 4);
  const vhalves kept = (vhalves)((vhalves)words >= threshold) & bits;
  std::memcpy(keep, &kept, sizeof kept);
}

// keep[j] = 1 / (1 - p) where column j of the row is kept, 0 where it is dropped; writes up to the next multiple of MASK_BLOCK.
inline void dropout_row(uint64_t seed, int64_t row, int64_t columns, double p, float* keep) {
  using All = CountLanes<COUNTERS>::type;
  const double rounded = __builtin_nearbyint(p * 4294967296.0);
  const uint32_t threshold = rounded >= 4294967295.0 ? 0xFFFFFFFFu : uint32_t(rounded);
  const float factor = p >= 1.0 ? 0.f : float(1.0 / (1.0 - p));
  for (int64_t j = 0; j < columns; j += MASK_BLOCK) {
    Counters c[2];
    for (int64_t half = 0; half < 2; ++half) {
      const vwords zero{};
      c[half] = {counting(All{}) + uint64_t(j / 4 + half * COUNTERS), uint64_t(uint32_t(row)) - zero, (uint64_t(row) >> 32) - zero, zero};
    }
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < PHILOX_ROUNDS; ++round, k0 += PHILOX_W0, k1 += PHILOX_W1) {
      philox_round(c[0], k0, k1);
      philox_round(c[1], k0, k1);
    }
    for (int64_t half = 0; half < 2; ++half) {
      const vwords w01 = c[half].c0 | (c[half].c1 << 32), w23 = c[half].c2 | (c[half].c3 << 32);
      float* to = keep + j + half * MASK_BLOCK / 2;
      keep_words(interleave<false>(w01, w23, All{}), threshold, factor, to);
      keep_words(interleave<true>(w01, w23, All{}), threshold, factor, to + L);
    }
  }
}
#pragma GCC diagnostic pop

}  // namespace fe::FE_ISA
