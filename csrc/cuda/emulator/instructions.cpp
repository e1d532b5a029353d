// SPDX-License-Identifier: Apache-2.0
// Instructions of a whole warp, on the arguments of its 32 lanes.
#include <c10/util/Half.h>

#include "emulator.h"

namespace fe::cuda::emulator {
namespace {

// C[16 x 8] += A[16 x K] B[K x 8] in fp64, rounded once. a(row, inner) and b(inner, column) find operands in the lanes' registers.
template <int K, class A, class B>
void multiply(void* const* arguments, const A& a, const B& b) {
  double left[16][K], right[K][8];
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < K; ++k) left[row][k] = a(row, k);
  for (int k = 0; k < K; ++k)
    for (int column = 0; column < 8; ++column) right[k][column] = b(k, column);
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      float& c = static_cast<Product*>(arguments[row % 8 * 4 + column / 2])->c[row / 8 * 2 + column % 2];
      double sum = c;
      for (int k = 0; k < K; ++k) sum += left[row][k] * right[k][column];
      c = float(sum);
    }
}

template <class T>
void multiply_halves(void* const* arguments) {
  const auto number = [](const uint32_t* words, int word, int half) { return to_float(T{uint16_t(words[word] >> 16 * half)}); };
  multiply<16>(
      arguments,
      [&](int row, int k) {
        const auto* p = static_cast<const Product*>(arguments[row % 8 * 4 + k % 8 / 2]);
        return number(p->a, row / 8 + k / 8 * 2, k % 2);
      },
      [&](int k, int column) {
        const auto* p = static_cast<const Product*>(arguments[column * 4 + k % 8 / 2]);
        return number(p->b, k / 8, k % 2);
      });
}

}  // namespace

void multiply_tf32(void* const* arguments) {
  const auto cut = [](uint32_t word) { return float_of(word & ~0x1fffu); };
  multiply<8>(
      arguments, [&](int row, int k) { return cut(static_cast<const Product*>(arguments[row % 8 * 4 + k % 4])->a[row / 8 + k / 4 * 2]); },
      [&](int k, int column) { return cut(static_cast<const Product*>(arguments[column * 4 + k % 4])->b[k / 4]); });
}
void multiply_bf16(void* const* arguments) {
  multiply_halves<bf16>(arguments);
}
void multiply_f16(void* const* arguments) {
  multiply_halves<f16>(arguments);
}

void transpose_from_memory(void* const* arguments) {
  for (int matrix = 0; matrix < 4; ++matrix)
    for (int lane = 0; lane < 32; ++lane) {
      uint16_t pair[2];
      for (int half = 0; half < 2; ++half) {
        const int row = lane % 4 * 2 + half, column = lane / 4;
        const auto* rows = static_cast<const Rows*>(arguments[8 * matrix + row]);
        pair[half] = static_cast<const uint16_t*>(rows->row)[column];
      }
      static_cast<Rows*>(arguments[lane])->to[matrix] = pair[0] | uint32_t(pair[1]) << 16;
    }
}

void transpose_registers(void* const* arguments) {
  const auto element = [&](int row, int column) {
    return static_cast<const Register*>(arguments[row * 4 + column / 2])->value >> 16 * (column % 2) & 0xffff;
  };
  for (int lane = 0; lane < 32; ++lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    static_cast<Register*>(arguments[lane])->result = element(column, row) | element(column + 1, row) << 16;
  }
}

void exchange(void* const* arguments) {
  for (int lane = 0; lane < 32; ++lane) {
    auto* own = static_cast<Register*>(arguments[lane]);
    own->result = static_cast<const Register*>(arguments[lane ^ own->mask])->value;
  }
}

void nothing(void* const*) {}

float half_to_float(uint16_t bits) {
  return c10::detail::fp16_ieee_to_fp32_value(bits);
}
uint16_t float_to_half(float value) {
  return c10::detail::fp16_ieee_from_fp32_value(value);
}

}  // namespace fe::cuda::emulator
