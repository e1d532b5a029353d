// SPDX-License-Identifier: Apache-2.0
// Products on the matrix units, C[16 x 8] += A[16 x 16] B[16 x 8], one warp.
//
// With g = lane / 4 and t = lane % 4, a lane holds
//   C  rows g, g + 8, columns 2 t, 2 t + 1          c[0] c[1] of row g, c[2] c[3] of row g + 8
//   A  rows g, g + 8, four of the 16 inner indices  a[0..3] of row g, a[4..7] of row g + 8
//   B  column g, the same four inner indices        b[0..3]
// The four inner indices of lane t are 2 t, 2 t + 1, 2 t + 8, 2 t + 9: two C fragments side by side (columns 0..7 and 8..15) are one A. A
// sum does not depend on the order of inner indices, so callers may give other elements to the slots, if A and B agree.
#pragma once
#include <type_traits>

#include "device.cuh"

namespace fe::cuda {

// A number as products take it, where that pays before it enters several: tf32 operands rounded to nearest (the units cut them off).
template <Precision P>
FE_DEVICE float prepared(float value) {
  if constexpr (P == Precision::tf32)
    return float_of(round_tf32(value));
  else
    return value;
}

// Rounded numbers in registers. tf32x3 cuts a number off to tf32 and keeps the rest, exact before the units cut that off as well.
template <Precision P, int SLOTS>
struct Fragment {
  static constexpr bool HALF = P == Precision::bf16 || P == Precision::f16;
  static constexpr int WORDS = HALF ? SLOTS / 2 : SLOTS;
  uint32_t word[WORDS];
  uint32_t rest[P == Precision::tf32x3 ? WORDS : 1] = {};

  FE_DEVICE static Fragment of(const float* v) {
    float rounded[SLOTS];
    FE_UNROLL for (int i = 0; i < SLOTS; ++i) rounded[i] = prepared<P>(v[i]);
    return of_prepared(rounded);
  }
  FE_DEVICE static Fragment of_prepared(const float* v) {
    Fragment f;
    if constexpr (HALF) {
      using T = std::conditional_t<P == Precision::bf16, bf16, f16>;
      FE_UNROLL for (int i = 0; i < WORDS; ++i) f.word[i] = pack<T>(v[2 * i], v[2 * i + 1]);
    } else {
      FE_UNROLL for (int i = 0; i < WORDS; ++i) {
        f.word[i] = bits_of(v[i]);
        if constexpr (P == Precision::tf32x3) {
          f.word[i] &= 0xffffe000u;
          f.rest[i] = bits_of(v[i] - float_of(f.word[i]));
        }
      }
    }
    return f;
  }
};

template <Precision P>
using FragmentA = Fragment<P, 8>;
template <Precision P>
using FragmentB = Fragment<P, 4>;

// Both halves of the inner indices of a tf32 product: the instruction takes 8.
FE_DEVICE void mma_tf32_16(float (&c)[4], const uint32_t* a, const uint32_t* b) {
  FE_UNROLL for (int half = 0; half < 4; half += 2) {
    const uint32_t a8[4] = {a[half], a[4 + half], a[half + 1], a[4 + half + 1]};
    const uint32_t b8[2] = {b[half], b[half + 1]};
    mma_tf32(c, a8, b8);
  }
}

// Of tf32x3, one side may be tf32: numbers that it holds exactly, which have no rest.
template <Precision P, Precision Q>
FE_DEVICE void mma(float (&c)[4], const Fragment<P, 8>& a, const Fragment<Q, 4>& b) {
  static_assert(P == Q || (!Fragment<P, 8>::HALF && !Fragment<Q, 4>::HALF));
  if constexpr (Fragment<P, 8>::HALF) {
    const uint32_t a16[4] = {a.word[0], a.word[2], a.word[1], a.word[3]};
    if constexpr (P == Precision::bf16)
      mma_bf16(c, a16, b.word);
    else
      mma_f16(c, a16, b.word);
  } else {
    // Small terms first.
    if constexpr (P == Precision::tf32x3) mma_tf32_16(c, a.rest, b.word);
    if constexpr (Q == Precision::tf32x3) mma_tf32_16(c, a.word, b.rest);
    mma_tf32_16(c, a.word, b.word);
  }
}

}  // namespace fe::cuda
