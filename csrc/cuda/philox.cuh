// SPDX-License-Identifier: Apache-2.0
// Dropout masks by Philox4x32-10 (Salmon et al., SC'11), the same map from (seed, row, column) as fused_ewclora/reference/philox.py.
#pragma once
#include "device.cuh"
#include "lowrank.h"

namespace fe::cuda {

struct Philox {
  uint32_t key[2], threshold;

  FE_DEVICE static Philox of(const Dropout& dropout) {
    const uint64_t seed = dropout.seed ? uint64_t(*dropout.seed) : 0;
    return {{uint32_t(seed), uint32_t(seed >> 32)}, dropout.threshold};
  }

  // Which of the four columns of a row from `column`, a multiple of 4, on are kept.
  FE_DEVICE void keep(int64_t row, int64_t column, bool (&kept)[4]) const {
    uint32_t c[4] = {uint32_t(column / 4), uint32_t(row), uint32_t(uint64_t(row) >> 32), 0}, k0 = key[0], k1 = key[1];
    FE_UNROLL for (int round = 0; round < 10; ++round) {
      const uint64_t product0 = uint64_t(c[0]) * 0xD2511F53u, product1 = uint64_t(c[2]) * 0xCD9E8D57u;
      c[0] = uint32_t(product1 >> 32) ^ c[1] ^ k0;
      c[1] = uint32_t(product1);
      c[2] = uint32_t(product0 >> 32) ^ c[3] ^ k1;
      c[3] = uint32_t(product0);
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    FE_UNROLL for (int i = 0; i < 4; ++i) kept[i] = c[i] >= threshold;
  }
};

}  // namespace fe::cuda
