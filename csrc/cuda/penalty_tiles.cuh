// What a block of the EWC penalty reads, in the layouts in which the matrix units take it: F, A and B.
#pragma once
#include "ewc_penalty.h"
#include "fragments.cuh"

namespace fe::cuda {
namespace {

constexpr int ROWS = PENALTY_ROWS;
constexpr int TILES = PENALTY_COLUMNS / 8;  // of eight columns
constexpr int COLUMN_STEPS = PENALTY_COLUMNS / 16;

// The four inner indices of a lane's fragments, see fragments.cuh.
FE_DEVICE int slot(int i) {
  return 2 * (lane() % 4) + i % 2 + i / 2 * 8;
}

// Where column c of tile `tile` lies among the warp's columns: with accesses of V numbers, a lane's numbers of V / 2 tiles are neighbours.
template <int V>
FE_DEVICE int place(int tile, int c) {
  return tile / (V / 2) * 4 * V + c / 2 * V + tile % (V / 2) * 2 + c % 2;
}

FE_DEVICE float scale_at(const PenaltyAdapter& p, int k) {
  return p.scale == nullptr ? p.factor : p.factor * load_number(p.scale, p.scale_dtype, k * p.scale_stride);
}
FE_DEVICE float a_at(const PenaltyAdapter& p, int k, int j) {
  return k < p.rank && j < p.d_in ? load_number(p.lora_a, p.a_dtype, k * p.a_row + j * p.a_column) : 0.f;
}
FE_DEVICE float b_at(const PenaltyAdapter& p, int i, int k) {
  return k < p.rank && i < p.d_out ? load_number(p.lora_b, p.b_dtype, i * p.b_row + k * p.b_column) : 0.f;
}

// The warp's columns of F, strip by strip: `load` starts the accesses to the next strip, `get` returns it in the layout of C fragments.
template <FisherLoads L>
struct Fisher;

template <class T>
struct WideFisher {
  static constexpr int V = 16 / sizeof(T), GROUPS = PENALTY_COLUMNS / (4 * V);
  const T* at;
  int32_t row;  // its stride: a register less than 64 bits, without which some architectures spill
  bool inside[GROUPS];
  Words raw[2][GROUPS];

  FE_DEVICE WideFisher(const PenaltyAdapter& p, int first, int column) : row(int32_t(p.fisher_row)) {
    const int j = column + lane() % 4 * V;
    at = static_cast<const T*>(p.fisher) + int64_t(first + lane() / 4) * row + j;
    FE_UNROLL for (int group = 0; group < GROUPS; ++group) inside[group] = j + group * 4 * V < p.d_in;
  }
  FE_DEVICE void load(int rows) {
    FE_UNROLL for (int half = 0; half < 2; ++half) {
      FE_UNROLL for (int group = 0; group < GROUPS; ++group) {
        const bool there = lane() / 4 + 8 * half < rows && inside[group];
        raw[half][group] = there ? load_words_once(at + int64_t(8 * half) * row + group * 4 * V) : Words{};
      }
    }
    at += int64_t(ROWS) * row;
  }
  FE_DEVICE void get(float (&f)[TILES][4]) const {
    FE_UNROLL for (int half = 0; half < 2; ++half) {
      FE_UNROLL for (int group = 0; group < GROUPS; ++group) {
        float v[V];
        unpack(raw[half][group], v, T{});
        FE_UNROLL for (int i = 0; i < V; ++i) f[group * (V / 2) + i / 2][2 * half + i % 2] = v[i];
      }
    }
  }
};
template <>
struct Fisher<FisherLoads::f32> : WideFisher<float> {
  using WideFisher<float>::WideFisher;
};
template <>
struct Fisher<FisherLoads::bf16> : WideFisher<bf16> {
  using WideFisher<bf16>::WideFisher;
};
template <>
struct Fisher<FisherLoads::elements> {
  static constexpr int V = 2;
  const PenaltyAdapter& p;
  int row, column;
  float value[TILES][4];

  FE_DEVICE Fisher(const PenaltyAdapter& p, int first, int column) : p(p), row(first + lane() / 4), column(column + lane() % 4 * 2) {}
  FE_DEVICE void load(int rows) {
    FE_UNROLL for (int tile = 0; tile < TILES; ++tile) {
      FE_UNROLL for (int i = 0; i < 4; ++i) {
        const int64_t m = row + i / 2 * 8, n = column + tile * 8 + i % 2;
        const bool there = lane() / 4 + i / 2 * 8 < rows && n < p.d_in;
        value[tile][i] = there ? load_number(p.fisher, p.fisher_dtype, m * p.fisher_row + n * p.fisher_column) : 0.f;
      }
    }
    row += ROWS;
  }
  FE_DEVICE void get(float (&f)[TILES][4]) const {
    FE_UNROLL for (int tile = 0; tile < TILES; ++tile) {
      FE_UNROLL for (int i = 0; i < 4; ++i) f[tile][i] = value[tile][i];
    }
  }
};

// A of the warp's columns as B fragments of both products: in registers, or in shared memory.
template <Precision P, int RP, int V>
struct Factor {
  static constexpr bool HELD = penalty_holds_a(P, RP);
  using Layout = PenaltyLayout<P, RP>;
  float inner[HELD ? TILES : 1][4], outer[HELD ? COLUMN_STEPS : 1][HELD ? RP / 8 : 1][4];
  const float* tile;  // [RP][LDA], the warp's columns in the order of fragments

  FE_DEVICE void load(const PenaltyAdapter& p, int first_rank, int column, float* shared) {
    if constexpr (HELD) {
      FE_UNROLL for (int i = 0; i < 4; ++i) {
        FE_UNROLL for (int n = 0; n < TILES; ++n) inner[n][i] = prepared<P>(a_at(p, slot(i), column + place<V>(n, lane() / 4)));
        FE_UNROLL for (int step = 0; step < COLUMN_STEPS; ++step) {
          const int j = column + place<V>(step * 2 + i / 2, lane() % 4 * 2 + i % 2);
          FE_UNROLL for (int n = 0; n < RP / 8; ++n) outer[step][n][i] = prepared<P>(a_at(p, n * 8 + lane() / 4, j));
        }
      }
    } else {
      float* to = shared + warp() * PENALTY_COLUMNS + lane();
      const int j = column + place<V>(lane() / 8, lane() % 8);
      for (int k = 0; k < RP; ++k) to[k * Layout::LDA] = prepared<P>(a_at(p, first_rank + k, j));
      sync_warp();
      tile = shared + warp() * PENALTY_COLUMNS;
    }
  }
  // Ranks [16 step, 16 step + 16) by the columns of tile n.
  FE_DEVICE FragmentB<P> of_ranks(int step, int n) const {
    if constexpr (HELD) {
      return FragmentB<P>::of_prepared(inner[n]);
    } else {
      float v[4];
      FE_UNROLL for (int i = 0; i < 4; ++i) v[i] = tile[(16 * step + slot(i)) * Layout::LDA + 8 * n + lane() / 4];
      return FragmentB<P>::of_prepared(v);
    }
  }
  // Columns [16 step, 16 step + 16) by ranks [8 n, 8 n + 8).
  FE_DEVICE FragmentB<P> of_columns(int step, int n) const {
    if constexpr (HELD) {
      return FragmentB<P>::of_prepared(outer[step][n]);
    } else {
      const float* at = tile + (8 * n + lane() / 4) * Layout::LDA + 16 * step + slot(0);
      const Pair l = load_pair(at), r = load_pair(at + 8);
      const float v[4] = {l.low, l.high, r.low, r.high};
      return FragmentB<P>::of_prepared(v);
    }
  }
};

// Rows of B for the strip after this one, on their way from device to shared memory. A thread's numbers are all of one rank.
template <Precision P, int RP>
struct Rows {
  using Layout = PenaltyLayout<P, RP>;
  static constexpr int COUNT = ROWS * RP / Layout::THREADS, STEP = Layout::THREADS / RP;
  float value[COUNT];
  int row;

  FE_DEVICE explicit Rows(int first) : row(first + thread() / RP) {}
  FE_DEVICE void load(const PenaltyAdapter& p, int k) {
    FE_UNROLL for (int e = 0; e < COUNT; ++e) value[e] = b_at(p, row + e * STEP, k);
    row += ROWS;
  }
  FE_DEVICE void store(float* shared, int buffer, float scale) const {
    float* to = shared + buffer * ROWS * Layout::LDB + thread() / RP * Layout::LDB + thread() % RP;
    FE_UNROLL for (int e = 0; e < COUNT; ++e) {
      to[Layout::B + e * STEP * Layout::LDB] = value[e];
      to[Layout::SCALED + e * STEP * Layout::LDB] = prepared<P>(value[e] * scale);
    }
  }
};

}  // namespace
}  // namespace fe::cuda
