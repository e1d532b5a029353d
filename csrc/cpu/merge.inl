// SPDX-License-Identifier: Apache-2.0
// W <- W + (B s) A on rows [row0, row1): fp32 sum, one rounding to W's dtype.
#pragma once
#include "lowrank.h"

namespace fe::FE_ISA {

inline void merge(Matrix weight, int64_t d_in, int64_t rank, const float* a_panel, const float* sb, int64_t row0, int64_t row1) {
  for (int64_t i = row0; i < row1; ++i) {
    expand(sb + i * rank, rank, 1, a_panel, rank, d_in, [&](int64_t, int64_t column, int, vfloat v, auto) __attribute__((always_inline)) {
      const int64_t valid = d_in - column < L ? d_in - column : L;
      float row[L];
      to_float(at(weight, i, column), weight.dtype, valid, row);
      for (int64_t l = 0; l < valid; ++l) row[l] += v[l];
      from_float(row, valid, at(weight, i, column), weight.dtype);
    });
  }
}

}  // namespace fe::FE_ISA
