// SPDX-License-Identifier: Apache-2.0
// What the Fisher kernels multiply: operands in shared memory as fragments, the order in which they are fetched, and the sum of squares of a
// tile.
#pragma once
#include "fisher_accumulate.h"
#include "fragments.cuh"

namespace fe::cuda {
namespace fisher {

constexpr int TILE = FISHER_TILE, THREADS = 256;
constexpr int WARPS_ACROSS = 4;      // two rows of four warps, each 64 x 32 of the tile
constexpr int DOWN = 4, ACROSS = 4;  // 16 x 8 products of a warp
constexpr int UNIT = 16;             // tokens of one product

constexpr uint32_t LAST = 1 << 8;               // in the word of a step, beside its tokens
constexpr size_t SHARED_EVERYWHERE = 99 << 10;  // bytes a block may have from sm_80 on

// SINGLE: samples of one token, whose squares are multiplied.
template <class T, Precision P, bool SINGLE>
struct Layout {
  static constexpr int TOKENS = fisher_step(sizeof(T), SINGLE), PITCH = FISHER_PITCH, NUMBERS = TOKENS * PITCH;
  static constexpr bool PACKED = FragmentA<P>::HALF;  // numbers pass the matrix units as they are
  static constexpr int UNITS = TOKENS / UNIT;
  static constexpr size_t BYTES = fisher_shared_bytes(sizeof(T), SINGLE);
  static_assert(BYTES <= SHARED_EVERYWHERE && UNITS == (PACKED ? 2 : 1));
};

using Product = float[DOWN][ACROSS][4];

// ---- operands of 16 tokens, from tiles [tokens][PITCH] at the warp's first column

// 16-bit numbers: registers of the matrix units, loaded while the ones before are multiplied.
template <class T, Precision P, int PITCH, bool SINGLE, bool PACKED>
struct Operands {
  FragmentA<P> a[DOWN];
  FragmentB<P> b[ACROSS];

  // Where the lane's 8 numbers of a token lie, relative to a tile's first number for the warp: four matrices of 8 tokens, in the order in which
  // the matrix units take their registers.
  FE_DEVICE static int place_dy() { return (lane() / 16 * 8 + lane() % 8) * PITCH + lane() / 8 % 2 * 8; }
  FE_DEVICE static int place_x() { return lane() % 16 * PITCH + lane() / 16 * 8; }
  FE_DEVICE void load(const T* dy, const T* x) {
    uint32_t four[4];
    FE_UNROLL for (int i = 0; i < DOWN; ++i) {
      load_transposed_x4(four, dy + 16 * i);
      a[i].word[0] = four[0], a[i].word[2] = four[1], a[i].word[1] = four[2], a[i].word[3] = four[3];
    }
    FE_UNROLL for (int j = 0; j < ACROSS; j += 2) {
      load_transposed_x4(four, x + 8 * j);
      FE_UNROLL for (int w = 0; w < 2; ++w) b[j].word[w] = four[w], b[j + 1].word[w] = four[2 + w];
    }
  }
  FE_DEVICE void multiply(Product& c) const {
    FE_UNROLL for (int i = 0; i < DOWN; ++i) FE_UNROLL for (int j = 0; j < ACROSS; ++j) mma(c[i][j], a[i], b[j]);
  }
};

template <bool SQUARED, class T>
FE_DEVICE float operand(T number) {
  const float value = to_float(number);
  return SQUARED ? value * value : value;
}

// tf32: a lane takes tokens t, t + 4, t + 8, t + 12, number by number, each into the register where it is multiplied.
template <class T, Precision P, int PITCH, bool SINGLE>
struct Operands<T, P, PITCH, SINGLE, false> {
  const T *dy, *x;

  FE_DEVICE static int place_dy() { return lane() % 4 * PITCH + lane() / 4; }
  FE_DEVICE static int place_x() { return place_dy(); }
  FE_DEVICE void load(const T* dy_place, const T* x_place) { dy = dy_place, x = x_place; }
  FE_DEVICE void multiply(Product& c) const {
    FragmentB<P> b[ACROSS];
    FE_UNROLL for (int j = 0; j < ACROSS; ++j) {
      float v[4];
      FE_UNROLL for (int k = 0; k < 4; ++k) v[k] = operand<SINGLE>(x[4 * k * PITCH + 8 * j]);
      b[j] = FragmentB<P>::of(v);
    }
    FE_UNROLL for (int i = 0; i < DOWN; ++i) {
      float v[8];
      FE_UNROLL for (int k = 0; k < 8; ++k) v[k] = operand<SINGLE>(dy[k % 4 * 4 * PITCH + 16 * i + k / 4 * 8]);
      const FragmentA<P> a = FragmentA<P>::of(v);
      FE_UNROLL for (int j = 0; j < ACROSS; ++j) mma(c[i][j], a, b[j]);
    }
  }
};

// ---- steps: blocks of at most TOKENS tokens, those of all samples of a part in one sequence

// What a thread fetches of x or dy: the same columns of every step, and every ROWS-th token.
template <class T, class L, bool WIDE>
struct Column {
  static constexpr int EACH = WIDE ? Wide<T>::COUNT : 1, IN_ROW = TILE / EACH, ROWS = THREADS / IN_ROW, COPIES = L::TOKENS / ROWS;
  const T *origin, *at;  // the thread's first number of token 0 of sample 0, and of the next step
  bool inside;           // its columns exist

  FE_DEVICE static Column of(const FisherTokens& tokens, int first, int width) {
    const int column = thread() % IN_ROW * EACH;
    const T* origin = static_cast<const T*>(tokens.data) + (first + column) * tokens.column + thread() / IN_ROW * tokens.token;
    return {origin, origin, first + column < width};
  }
  FE_DEVICE void seek(const FisherTokens& tokens, int64_t sample, int64_t token) {
    at = origin + sample * tokens.sample + token * tokens.token;
  }
  // Starts to fetch `count` tokens; zero beyond them, up to TOKENS, and beyond the last column.
  FE_DEVICE void fetch(T* tile, const FisherTokens& tokens, int count) {
    const int token = thread() / IN_ROW;
    T* to = tile + token * L::PITCH + thread() % IN_ROW * EACH;
    if constexpr (WIDE) {
      FE_UNROLL for (int i = 0; i < COPIES; ++i) {
        copy_async(to + i * ROWS * L::PITCH, at + i * ROWS * tokens.token, inside && token + i * ROWS < count ? 16 : 0);
      }
    } else {
      constexpr int TOGETHER = 4;  // loads under way at once
      FE_UNROLL for (int i = 0; i < COPIES; i += TOGETHER) {
        T held[TOGETHER];
        FE_UNROLL for (int j = 0; j < TOGETHER; ++j) {
          held[j] = inside && token + (i + j) * ROWS < count ? at[(i + j) * ROWS * tokens.token] : T{};
        }
        FE_UNROLL for (int j = 0; j < TOGETHER; ++j) to[(i + j) * ROWS * L::PITCH] = held[j];
      }
    }
    at += L::TOKENS * tokens.token;
  }
};

FE_DEVICE int64_t part(int64_t count, int split, int splits) {
  return count * split / splits;
}

template <class T, class L, bool SINGLE, bool WIDE>
struct Steps {
  Column<T, L, WIDE> dy, x;
  int64_t sample, stop;  // the sample of the next step, the end of the part
  int64_t left;          // its tokens

  FE_DEVICE static int64_t offset(const FisherSamples& p, int64_t n) {
    return p.long_offsets ? static_cast<const int64_t*>(p.cu_seqlens)[n] : static_cast<const int32_t*>(p.cu_seqlens)[n];
  }
  FE_DEVICE void seek(const FisherSamples& p, int64_t begin, int64_t end) {
    left = end - begin;
    dy.seek(p.dy, sample, begin), x.seek(p.x, sample, begin);
  }
  // Goes to `sample`, or to the next one that has tokens.
  FE_DEVICE void open(const FisherSamples& p) {
    for (; sample < stop; ++sample) {
      if (p.cu_seqlens == nullptr) return seek(p, 0, p.tokens);
      const int64_t begin = offset(p, sample), end = offset(p, sample + 1);
      if (begin < end) return seek(p, begin, end);
    }
    left = 0;
  }
  FE_DEVICE Steps(const FisherSamples& p, int split, int row, int column)
      : dy(Column<T, L, WIDE>::of(p.dy, row, p.d_out)), x(Column<T, L, WIDE>::of(p.x, column, p.d_in)) {
    if constexpr (SINGLE) {
      sample = 0, stop = 1;
      seek(p, part(p.tokens, split, p.splits), part(p.tokens, split + 1, p.splits));
    } else {
      sample = part(p.samples, split, p.splits), stop = part(p.samples, split + 1, p.splits);
      open(p);
    }
  }
  // Starts to fetch the next step. Returns its tokens, beside LAST of a sample, or 0 at the end.
  FE_DEVICE uint32_t fetch(const FisherSamples& p, T* to) {
    if (left <= 0) return 0;
    const int count = left < L::TOKENS ? int(left) : L::TOKENS;
    dy.fetch(to, p.dy, count), x.fetch(to + L::NUMBERS, p.x, count);
    left -= L::TOKENS;
    if (left > 0) return count;
    ++sample;
    open(p);
    return count | LAST;
  }
};

// ---- tiles of F

constexpr int GROUP = 8;  // rows of tiles that share columns of x in the second-level cache

struct Place {
  int row, column, tile, split;  // of the block: first row and column of its tile of F
};

// Tiles by columns inside groups of GROUP rows of tiles, split after split: blocks that run side by side share operands, and earlier splits
// have lower indices.
FE_DEVICE Place place_of(const FisherSamples& p, int index) {
  const int down = int(ceil_div(p.d_out, TILE)), across = int(ceil_div(p.d_in, TILE));
  const int tile = index % (down * across), first = tile / (GROUP * across) * GROUP;
  const int rows = down - first < GROUP ? down - first : GROUP, inside = tile % (GROUP * across);
  return {(first + inside % rows) * TILE, inside / rows * TILE, tile, index / (down * across)};
}

// The warp's first row and column in a tile.
FE_DEVICE int warp_row() {
  return warp() / WARPS_ACROSS * (16 * DOWN);
}
FE_DEVICE int warp_column() {
  return warp() % WARPS_ACROSS * (8 * ACROSS);
}

// Behind the tiles in shared memory: a word about the step in each stage, and one that is the kernel's own.
template <class L>
FE_DEVICE uint32_t* words_of_stages() {
  return reinterpret_cast<uint32_t*>(shared_memory() + L::BYTES - 4 * (FISHER_STAGES + 1));
}

// Adds the block's share of the samples to a tile of zeros. It keeps two fp32 tiles in registers: the product of the current sample, summed
// over tokens in order, and the sum of squares. The steps of all its samples are one sequence of fetches, so that the next sample is on its
// way while this one is multiplied. Shared memory is free afterwards.
template <class T, Precision P, bool SINGLE, bool WIDE>
FE_DEVICE void add_samples(const FisherSamples& p, const Place& place, Product& total) {
  using L = Layout<T, P, SINGLE>;
  using Unit = Operands<T, P, L::PITCH, SINGLE, L::PACKED>;
  T* tiles = reinterpret_cast<T*>(shared_memory());  // [FISHER_STAGES][dy, x][TOKENS][PITCH]
  uint32_t* words = words_of_stages<L>();
  const int row = warp_row(), column = warp_column();
  Steps<T, L, SINGLE, WIDE> steps(p, place.split, place.row, place.column);
  const auto fetch = [&](uint32_t stage) {
    const uint32_t word = steps.fetch(p, tiles + stage * 2 * L::NUMBERS);
    if (thread() == 0) words[stage] = word;
    copy_async_commit();
  };
  const T *dy = tiles + row + Unit::place_dy(), *x = tiles + L::NUMBERS + column + Unit::place_x();
  const auto load = [&](Unit& unit, uint32_t stage, int token) {
    const uint32_t from = stage * 2 * L::NUMBERS + token * L::PITCH;
    unit.load(dy + from, x + from);
  };
  for (uint32_t stage = 0; stage < FISHER_STAGES; ++stage) fetch(stage);
  copy_async_wait<FISHER_STAGES - 1>();
  sync_block();

  Unit unit, second;
  uint32_t stage = 0;
  load(unit, stage, 0);
  for (uint32_t word = words[stage]; word != 0;) {
    Product product = {};
    for (bool last = false; !last;) {
      last = word & LAST;
      const bool both = L::UNITS == 2 && int(word & (LAST - 1)) > UNIT;
      if (L::UNITS == 2) load(second, stage, UNIT);
      unit.multiply(product);
      // All of this stage is in registers, and the next one has landed: its first operands come before the products of the second ones.
      copy_async_wait<FISHER_STAGES - 2>();
      sync_block();
      fetch(stage);
      stage = (stage + 1) % FISHER_STAGES;
      word = words[stage];
      load(unit, stage, 0);
      if (both) second.multiply(product);
    }
    FE_UNROLL for (int i = 0; i < DOWN; ++i) FE_UNROLL for (int j = 0; j < ACROSS; ++j) FE_UNROLL for (int k = 0; k < 4; ++k) {
      const float g = product[i][j][k];
      total[i][j][k] = SINGLE ? g : total[i][j][k] + g * g;
    }
  }
  sync_block();  // the fragments read ahead are not used, but the reads must be over
}

}  // namespace fisher
}  // namespace fe::cuda
