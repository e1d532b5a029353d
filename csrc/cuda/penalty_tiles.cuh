// SPDX-License-Identifier: Apache-2.0
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
  return lane() % 4 * 2 + i % 2 + i / 2 * 8;
}

// Tiles of 16 x 16 in shared memory, so that a lane finds what it needs in the order of its registers: [half][lane][4]. `lane_place` is
// where a lane's four are; they are turned a bit, so that accesses by rows and by columns of the tile hit different banks, too.
constexpr int HALF_TILE = 128, SQUARE = 2 * HALF_TILE;
FE_DEVICE int lane_place(int g, int t) {
  return (g * 4 + (t ^ g / 2 % 4)) * 4;
}
FE_DEVICE int as_left(int row, int inner) {
  return inner / 8 * HALF_TILE + lane_place(row % 8, inner % 8 / 2) + inner % 2 * 2 + row / 8;
}
FE_DEVICE int as_right(int inner, int column) {
  return column / 8 * HALF_TILE + lane_place(column % 8, inner % 8 / 2) + inner / 8 * 2 + inner % 2;
}
FE_DEVICE int as_product(int row, int column) {
  return column / 8 * HALF_TILE + lane_place(row % 8, column % 8 / 2) + row / 8 * 2 + column % 2;
}
// The tile of H, by rows: 16-byte accesses of two rows and 8-byte accesses of four even or odd rows hit different banks. `unit`: of 4 columns.
FE_DEVICE int in_strip(int row, int unit) {
  return row * PENALTY_COLUMNS + (unit ^ (row ^ row / 2) % 2 * 4 ^ row / 4 % 2 * 2) * 4;
}

template <Precision P>
FE_DEVICE FragmentA<P> load_left(const float* tile) {
  float v[8];
  FE_UNROLL for (int half = 0; half < 2; ++half) {
    const Words four = load_shared_words(tile + half * HALF_TILE);
    FE_UNROLL for (int i = 0; i < 4; ++i) v[i % 2 * 4 + 2 * half + i / 2] = float_of(four.w[i]);
  }
  return FragmentA<P>::of_prepared(v);
}
template <Precision P>
FE_DEVICE FragmentB<P> load_right(const float* tile) {
  const Words four = load_shared_words(tile);
  float v[4];
  FE_UNROLL for (int i = 0; i < 4; ++i) v[i] = float_of(four.w[i]);
  return FragmentB<P>::of_prepared(v);
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

// The warp's columns of F, strip by strip: `start` begins to fetch the first of `rows` rows; `next` returns a strip in the layout of C
// fragments, of which `rows` rows are left with it, and begins to fetch a later one.
template <class T>
struct WideFisher {
  static constexpr int V = 16 / sizeof(T), GROUPS = PENALTY_COLUMNS / (4 * V);
  const T* at;
  int32_t row;  // its stride: a register less than 64 bits, without which some architectures spill
  bool inside[GROUPS];

  FE_DEVICE WideFisher(const PenaltyAdapter& p, int first, int column) : row(int32_t(p.fisher_row)) {
    const int j = column + lane() % 4 * V;
    at = static_cast<const T*>(p.fisher) + int64_t(first + lane() / 4) * row + j;
    FE_UNROLL for (int group = 0; group < GROUPS; ++group) inside[group] = j + group * 4 * V < p.d_in;
  }
  // Calls use(half, group, address, whether there are numbers) for each 16 bytes of the lane in a strip.
  template <class Use>
  FE_DEVICE void each(int rows, const Use& use) {
    FE_UNROLL for (int half = 0; half < 2; ++half) {
      FE_UNROLL for (int group = 0; group < GROUPS; ++group)
          use(half, group, at + int64_t(8 * half) * row + group * 4 * V, lane() / 4 + 8 * half < rows && inside[group]);
    }
    at += int64_t(ROWS) * row;
  }
  FE_DEVICE static void place_in(float (&f)[TILES][4], int half, int group, Words raw) {
    float v[V];
    unpack(raw, v, T{});
    FE_UNROLL for (int i = 0; i < V; ++i) f[group * (V / 2) + i / 2][2 * half + i % 2] = v[i];
  }
};

// One strip ahead, in registers.
template <class T>
struct NearFisher : WideFisher<T> {
  using Wide = WideFisher<T>;
  Words raw[2][Wide::GROUPS];

  FE_DEVICE NearFisher(const PenaltyAdapter& p, int first, int column, float*) : Wide(p, first, column) {}
  FE_DEVICE void start(int rows) {
    this->each(rows, [&](int half, int group, const T* from, bool there) { raw[half][group] = there ? load_words_once(from) : Words{}; });
  }
  FE_DEVICE void next(float (&f)[TILES][4], int rows) {
    FE_UNROLL for (int half = 0; half < 2; ++half) {
      FE_UNROLL for (int group = 0; group < Wide::GROUPS; ++group) Wide::place_in(f, half, group, raw[half][group]);
    }
    start(rows - ROWS);
  }
};

// STAGES strips ahead, in shared memory. A lane reads what it has fetched itself, so it waits for no other.
template <class T, int STAGES>
struct FarFisher : WideFisher<T> {
  using Wide = WideFisher<T>;
  static constexpr int COPY = 32 * 16, STRIP = ROWS * PENALTY_COLUMNS * sizeof(T);  // bytes of the warp
  char* own;
  int stage = 0;

  FE_DEVICE FarFisher(const PenaltyAdapter& p, int first, int column, float* shared)
      : Wide(p, first, column), own(reinterpret_cast<char*>(shared) + warp() * STAGES * STRIP + lane() * 16) {}
  FE_DEVICE char* place(int half, int group) const { return own + stage * STRIP + (half * Wide::GROUPS + group) * COPY; }
  FE_DEVICE void fetch(int rows) {
    this->each(rows, [&](int half, int group, const T* from, bool there) { copy_async(place(half, group), from, there ? 16 : 0); });
    copy_async_commit();
    stage = (stage + 1) % STAGES;
  }
  FE_DEVICE void start(int rows) { FE_UNROLL for (int i = 0; i < STAGES; ++i) fetch(rows - i * ROWS); }
  FE_DEVICE void next(float (&f)[TILES][4], int rows) {
    copy_async_wait<STAGES - 1>();
    FE_UNROLL for (int half = 0; half < 2; ++half) {
      FE_UNROLL for (int group = 0; group < Wide::GROUPS; ++group) Wide::place_in(f, half, group, load_shared_words(place(half, group)));
    }
    fetch(rows - STAGES * ROWS);
  }
};

// 8-bit codes: a warp's columns are one block, with one scale in each row. Code c of a block with scale s stands for s c^2.
FE_DEVICE float decoded(uint32_t code, float scale) {
  const float c = float_of(0x4b000000u | code) - 8388608.f;  // code + 2^23, exactly, and without it
  return c * c * scale;
}
struct CodesFisher {
  static constexpr int V = 8;  // codes of a lane in a row

  FE_DEVICE static void place_in(float (&f)[TILES][4], int half, Pair codes, float scale) {
    const uint32_t words[2] = {bits_of(codes.low), bits_of(codes.high)};
    FE_UNROLL for (int i = 0; i < V; ++i) f[i / 2][2 * half + i % 2] = decoded(words[i / 4] >> i % 4 * 8 & 255, scale);
  }
};

// One strip ahead, in registers.
struct NearCodes : CodesFisher {
  const char *at, *scale_at;  // the lane's codes of the next strip, and their scale
  int64_t row;                // bytes
  bool inside;
  Pair raw[2];
  float scale[2];

  FE_DEVICE NearCodes(const PenaltyAdapter& p, int first, int column, float*) : row(p.fisher_row), inside(column < p.d_in) {
    const char* own = static_cast<const char*>(p.fisher) + (first + lane() / 4) * row;
    at = own + column + lane() % 4 * V;
    scale_at = own + p.block_scales + column / PENALTY_COLUMNS * sizeof(bf16);
  }
  FE_DEVICE void start(int rows) {
    FE_UNROLL for (int half = 0; half < 2; ++half) {
      const bool there = lane() / 4 + 8 * half < rows && inside;
      raw[half] = there ? load_pair(reinterpret_cast<const float*>(at + 8 * half * row)) : Pair{};
      scale[half] = there ? to_float(*reinterpret_cast<const bf16*>(scale_at + 8 * half * row)) : 0.f;
    }
    at += ROWS * row, scale_at += ROWS * row;
  }
  FE_DEVICE void next(float (&f)[TILES][4], int rows) {
    FE_UNROLL for (int half = 0; half < 2; ++half) place_in(f, half, raw[half], scale[half]);
    start(rows - ROWS);
  }
};

// STAGES strips ahead, in shared memory: a lane fetches half of a block, and every second one the word that the row's scale is in.
template <int STAGES>
struct FarCodes : CodesFisher {
  static constexpr int STRIP = penalty_strip(FisherLoads::codes) * 4;  // bytes of the warp
  static constexpr int WORDS = ROWS * PENALTY_COLUMNS;                 // and of its codes
  const PenaltyAdapter& p;
  const char* at;  // what the lane fetches next
  int word;        // bytes from a block to its word
  int own;         // the lane's row of a strip; beyond all where there are no columns
  char* strips;
  int scale;  // place of the scale of the row that the lane reads
  int stage = 0;

  FE_DEVICE FarCodes(const PenaltyAdapter& p, int first, int column, float* shared)
      : p(p),
        word(p.block_scales + column / (2 * PENALTY_COLUMNS) * 4 - column),
        own(column < p.d_in ? lane() / 2 : INT32_MAX),
        strips(reinterpret_cast<char*>(shared) + warp() * STAGES * STRIP),
        scale(WORDS + lane() / 4 * 4 + column / PENALTY_COLUMNS % 2 * 2) {
    at = static_cast<const char*>(p.fisher) + (first + lane() / 2) * p.fisher_row + column + lane() % 2 * 16;
  }
  FE_DEVICE void fetch(int rows) {
    char* strip = strips + stage * STRIP;
    copy_async(strip + lane() * 16, at, own < rows ? 16 : 0);
    if (lane() % 2 == 0) copy_async_word(strip + WORDS + lane() * 2, at + word, own < rows);
    copy_async_commit();
    at += ROWS * p.fisher_row;  // read anew, not kept: registers are short
    stage = (stage + 1) % STAGES;
  }
  FE_DEVICE void start(int rows) { FE_UNROLL for (int i = 0; i < STAGES; ++i) fetch(rows - i * ROWS); }
  FE_DEVICE void next(float (&f)[TILES][4], int rows) {
    copy_async_wait<STAGES - 1>();
    sync_warp();
    const char* strip = strips + stage * STRIP;
    FE_UNROLL for (int half = 0; half < 2; ++half) {
      const Pair codes = load_pair(reinterpret_cast<const float*>(strip + lane() * V + 8 * half * PENALTY_COLUMNS));
      place_in(f, half, codes, to_float(*reinterpret_cast<const bf16*>(strip + scale + 8 * half * 4)));
    }
    sync_warp();  // all lanes have read the strip that is overwritten
    fetch(rows - STAGES * ROWS);
  }
};

// Any dtype and strides.
struct ElementFisher {
  static constexpr int V = 2;
  const PenaltyAdapter& p;
  int row, column;
  float value[TILES][4];

  FE_DEVICE ElementFisher(const PenaltyAdapter& p, int first, int column, float*)
      : p(p), row(first + lane() / 4), column(column + lane() % 4 * 2) {}
  FE_DEVICE void start(int rows) {
    FE_UNROLL for (int tile = 0; tile < TILES; ++tile) {
      FE_UNROLL for (int i = 0; i < 4; ++i) {
        const int64_t m = row + i / 2 * 8, n = column + tile * 8 + i % 2;
        const bool there = lane() / 4 + i / 2 * 8 < rows && n < p.d_in;
        value[tile][i] = there ? load_number(p.fisher, p.fisher_dtype, m * p.fisher_row + n * p.fisher_column) : 0.f;
      }
    }
    row += ROWS;
  }
  FE_DEVICE void next(float (&f)[TILES][4], int rows) {
    FE_UNROLL for (int tile = 0; tile < TILES; ++tile) {
      FE_UNROLL for (int i = 0; i < 4; ++i) f[tile][i] = value[tile][i];
    }
    start(rows - ROWS);
  }
};

// Of an l1 norm, which has none.
struct NoFisher {
  static constexpr int V = 2;

  FE_DEVICE NoFisher(const PenaltyAdapter&, int, int, float*) {}
  FE_DEVICE void start(int) {}
  FE_DEVICE void next(float (&)[TILES][4], int) {}
};

template <FisherLoads L, int STAGES>
struct Fishers {
  using T = std::conditional_t<L == FisherLoads::f32, float, bf16>;
  using Type = std::conditional_t<STAGES == 0, NearFisher<T>, FarFisher<T, STAGES == 0 ? 1 : STAGES>>;
};
template <int STAGES>
struct Fishers<FisherLoads::codes, STAGES> {
  using Type = std::conditional_t<STAGES == 0, NearCodes, FarCodes<STAGES == 0 ? 1 : STAGES>>;
};
template <int STAGES>
struct Fishers<FisherLoads::elements, STAGES> {
  using Type = ElementFisher;
};
template <int STAGES>
struct Fishers<FisherLoads::none, STAGES> {
  using Type = NoFisher;
};
template <FisherLoads L, int STAGES>
using Fisher = typename Fishers<L, STAGES>::Type;

// A of the warp's columns as operands of both products: in registers, or in shared memory.
template <Precision P, int RP, FisherLoads L>
struct Factor {
  using Layout = PenaltyLayout<P, RP, L>;
  static constexpr bool HELD = penalty_holds_a(RP);
  static constexpr int V = Fisher<L, Layout::STAGES>::V;
  float inner[HELD ? TILES : 1][4], outer[HELD ? COLUMN_STEPS : 1][8];
  const float* tile;  // [RP][LDA], the warp's columns in the order of fragments

  FE_DEVICE void load(const PenaltyAdapter& p, int first_rank, int column, float* shared) {
    if constexpr (HELD) {
      FE_UNROLL for (int i = 0; i < 4; ++i) {
        FE_UNROLL for (int n = 0; n < TILES; ++n) inner[n][i] = prepared<P>(a_at(p, slot(i), column + place<V>(n, lane() / 4)));
        FE_UNROLL for (int step = 0; step < COLUMN_STEPS; ++step) {
          const int j = column + place<V>(step * 2 + i / 2, lane() % 4 * 2 + i % 2);
          FE_UNROLL for (int half = 0; half < 2; ++half) outer[step][4 * half + i] = prepared<P>(a_at(p, 8 * half + lane() / 4, j));
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
  // tf32x3 splits numbers where it multiplies them: for the parts of all of A there are no registers.
  FE_DEVICE void keep_whole() {
    if constexpr (HELD && P == Precision::tf32x3) {
      FE_UNROLL for (int n = 0; n < TILES; ++n) FE_UNROLL for (int i = 0; i < 4; ++i) opaque(inner[n][i]);
      FE_UNROLL for (int n = 0; n < COLUMN_STEPS; ++n) FE_UNROLL for (int i = 0; i < 8; ++i) opaque(outer[n][i]);
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
  // Ranks [16 m, 16 m + 16) by columns [16 step, 16 step + 16).
  FE_DEVICE FragmentA<P> of_columns(int m, int step) const {
    if constexpr (HELD) {
      return FragmentA<P>::of_prepared(outer[step]);
    } else {
      const float* at = tile + (16 * m + lane() / 4) * Layout::LDA + 16 * step + slot(0);
      float v[8];
      FE_UNROLL for (int i = 0; i < 8; i += 2) {
        const Pair pair = load_pair(at + i / 4 * 8 * Layout::LDA + i / 2 % 2 * 8);
        v[i] = pair.low, v[i + 1] = pair.high;
      }
      return FragmentA<P>::of_prepared(v);
    }
  }
};

// Rows of B. A thread's numbers are all of one rank; it keeps those of this strip while it fetches those of the next.
template <Precision P, int RP, FisherLoads L>
struct Rows {
  using Layout = PenaltyLayout<P, RP, L>;
  static constexpr int COUNT = ROWS * RP / Layout::THREADS, STEP = Layout::THREADS / RP;
  const char* at;  // the thread's first number of the next strip
  int64_t row;     // bytes between rows
  Dtype dtype;
  int own;  // the first number's row in the strip; beyond all rows where there is no such rank
  float scale;
  float value[COUNT], coming[COUNT];

  FE_DEVICE Rows(const PenaltyAdapter& p, int first, int k) : row(p.b_row * element_size(p.b_dtype)), dtype(p.b_dtype) {
    const int m = thread() / RP;
    at = static_cast<const char*>(p.lora_b) + (first + m) * row + k * p.b_column * element_size(p.b_dtype);
    own = k < p.rank ? m : INT32_MAX - ROWS;
    scale = k < p.rank ? scale_at(p, k) : 0.f;
  }
  FE_DEVICE void fetch(int rows) {
    FE_UNROLL for (int e = 0; e < COUNT; ++e) coming[e] = own + e * STEP < rows ? load_number(at + e * STEP * row, dtype, 0) : 0.f;
    at += ROWS * row;
  }
  // To shared memory, as operands of both products.
  FE_DEVICE void store(float* shared, int buffer) const {
    const int k = thread() % RP;
    shared += (buffer * RP + k / 16 * 16) * ROWS;
    FE_UNROLL for (int e = 0; e < COUNT; ++e) {
      const int m = thread() / RP + e * STEP;
      const float scaled = prepared<P>(coming[e] * scale);
      shared[Layout::SCALED + as_left(m, k % 16)] = scaled;
      shared[Layout::TURNED + as_right(m, k % 16)] = scaled;
    }
  }
  FE_DEVICE void advance() { FE_UNROLL for (int e = 0; e < COUNT; ++e) value[e] = coming[e]; }
};

}  // namespace
}  // namespace fe::cuda
