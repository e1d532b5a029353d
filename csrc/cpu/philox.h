// Philox4x32-10 dropout masks (Salmon et al., SC'11), the same map from (seed, row, column) as fused_ewclora/reference/philox.py.
#pragma once
#include "simd.h"

namespace fe::FE_ISA {

constexpr int PHILOX_ROUNDS = 10;
constexpr uint32_t PHILOX_M0 = 0xD2511F53, PHILOX_M1 = 0xCD9E8D57, PHILOX_W0 = 0x9E3779B9, PHILOX_W1 = 0xBB67AE85;

// keep[j] = 1 / (1 - p) where column j of the row is kept, 0 where it is dropped. Counters go in groups so that the compiler
// vectorises the rounds.
inline void dropout_row(uint64_t seed, int64_t row, int64_t columns, float p, float* keep) {
  constexpr int GROUP = 16;
  const double scaled = double(p) * 4294967296.0;
  const double rounded = __builtin_nearbyint(scaled);
  const uint32_t threshold = rounded >= 4294967295.0 ? 0xFFFFFFFFu : uint32_t(rounded);
  const float factor = p >= 1.f ? 0.f : float(1.0 / (1.0 - double(p)));
  uint32_t c0[GROUP], c1[GROUP], c2[GROUP], c3[GROUP];
  for (int64_t block = 0; 4 * block < columns; block += GROUP) {
    for (int i = 0; i < GROUP; ++i) {
      c0[i] = uint32_t(block + i);
      c1[i] = uint32_t(row);
      c2[i] = uint32_t(uint64_t(row) >> 32);
      c3[i] = 0;
    }
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < PHILOX_ROUNDS; ++round, k0 += PHILOX_W0, k1 += PHILOX_W1) {
      for (int i = 0; i < GROUP; ++i) {
        uint64_t p0 = uint64_t(c0[i]) * PHILOX_M0, p1 = uint64_t(c2[i]) * PHILOX_M1;
        c0[i] = uint32_t(p1 >> 32) ^ c1[i] ^ k0;
        c1[i] = uint32_t(p1);
        c2[i] = uint32_t(p0 >> 32) ^ c3[i] ^ k1;
        c3[i] = uint32_t(p0);
      }
    }
    float group[4 * GROUP];
    for (int i = 0; i < GROUP; ++i) {
      group[4 * i] = c0[i] >= threshold ? factor : 0.f;
      group[4 * i + 1] = c1[i] >= threshold ? factor : 0.f;
      group[4 * i + 2] = c2[i] >= threshold ? factor : 0.f;
      group[4 * i + 3] = c3[i] >= threshold ? factor : 0.f;
    }
    int64_t left = columns - 4 * block;
    std::memcpy(keep + 4 * block, group, sizeof(float) * (left < 4 * GROUP ? left : 4 * GROUP));
  }
}

}  // namespace fe::FE_ISA
