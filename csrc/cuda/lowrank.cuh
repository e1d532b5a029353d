// SPDX-License-Identifier: Apache-2.0
// What the kernels of the low-rank terms share: the numbers of a precision, and where 16-byte accesses meet matrix fragments.
//
// A lane reads and writes whole 16-byte units of a row, so lane t of a quad has COUNT consecutive columns, and the fragments' columns and inner
// indices are a permutation of the real ones. Two factors of a product have to agree on it, nothing else does.
#pragma once
#include "fragments.cuh"
#include "lowrank.h"

namespace fe::cuda {

template <Precision P>
struct NumberOf {
  using Type = float;
};
template <>
struct NumberOf<Precision::bf16> {
  using Type = bf16;
};
template <>
struct NumberOf<Precision::f16> {
  using Type = f16;
};
template <Precision P>
using Number = typename NumberOf<P>::Type;

template <Precision P>
constexpr bool IS_HALF = P == Precision::bf16 || P == Precision::f16;

// Registers of four numbers of a row: two, or four of fp32.
template <Precision P>
constexpr int FOUR = IS_HALF<P> ? 2 : 4;

// Fragments from numbers as they lie in memory.
template <Precision P, int SLOTS>
FE_DEVICE Fragment<P, SLOTS> fragment_of(const uint32_t* words) {
  Fragment<P, SLOTS> f;
  if constexpr (IS_HALF<P>) {
    FE_UNROLL for (int i = 0; i < SLOTS / 2; ++i) f.word[i] = words[i];
  } else {
    float v[SLOTS];
    FE_UNROLL for (int i = 0; i < SLOTS; ++i) v[i] = float_of(words[i]);
    f = Fragment<P, SLOTS>::of(v);
  }
  return f;
}

// Inner index of slot 0..3 of lane t of a quad.
FE_DEVICE int inner_index(int t, int slot) {
  return 2 * t + slot % 2 + 8 * (slot / 2);
}

FE_DEVICE uint32_t raw_bits(float value) {
  return bits_of(value);
}
template <class T>
FE_DEVICE uint32_t raw_bits(T value) {
  return value.bits;
}

// ---- the factor of the expansion: units of 16 bytes in the order in which lanes read them
// Unit ((group * steps + step) * 2 + half) * 32 + lane holds B fragments of 16 ranks (`step`) and the 4 COUNT columns of `group`.
template <class T>
struct ExpandUnit {
  static constexpr int COUNT = Wide<T>::COUNT, COLUMNS = 4 * COUNT;

  // Column, in its group, that is column g of fragment j: lane t then has columns COUNT t ... of C.
  FE_DEVICE static int column(int j, int g) { return COUNT * (g / 2) + 2 * j + g % 2; }
  // Fragment and slot of number i of a unit.
  FE_DEVICE static int fragment(int half, int i) { return half * (COUNT / 4) + i / 4; }
};

}  // namespace fe::cuda
