// SPDX-License-Identifier: Apache-2.0
// Numbers and shapes as hosts and kernels share them; plain C++.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fe::cuda {

enum class Dtype : int32_t { f32, bf16, f16 };

constexpr int64_t element_size(Dtype dtype) {
  return dtype == Dtype::f32 ? 4 : 2;
}

// How fp32 factors pass the matrix units: split in two tf32 numbers each, rounded to tf32, or rounded to bf16; f16 for exact fp16 factors.
enum class Precision : int32_t { tf32x3, tf32, bf16, f16 };

// A matrix in device memory, strides in elements.
struct Matrix {
  void* data;
  int64_t row, column;
  Dtype dtype;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Ranks as kernels see them: one step of the matrix units is 16 wide.
constexpr int MIN_RANK = 16;

}  // namespace fe::cuda
