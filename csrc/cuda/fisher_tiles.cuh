// What the Fisher kernel multiplies: operands in shared memory as fragments, and the order in which they are fetched.
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
    FE_UNROLL for (int i = 0; i < DOWN; ++i) FE_UNROLL for (int j = 0; j < ACROSS; ++j) mma<P>(c[i][j], a[i], b[j]);
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
      FE_UNROLL for (int j = 0; j < ACROSS; ++j) mma<P>(c[i][j], a, b[j]);
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

  FE_DEVICE static int64_t offset(const FisherProducts& p, int64_t n) {
    return p.long_offsets ? static_cast<const int64_t*>(p.cu_seqlens)[n] : static_cast<const int32_t*>(p.cu_seqlens)[n];
  }
  FE_DEVICE void seek(const FisherProducts& p, int64_t begin, int64_t end) {
    left = end - begin;
    dy.seek(p.dy, sample, begin), x.seek(p.x, sample, begin);
  }
  // Goes to `sample`, or to the next one that has tokens.
  FE_DEVICE void open(const FisherProducts& p) {
    for (; sample < stop; ++sample) {
      if (p.cu_seqlens == nullptr) return seek(p, 0, p.tokens);
      const int64_t begin = offset(p, sample), end = offset(p, sample + 1);
      if (begin < end) return seek(p, begin, end);
    }
    left = 0;
  }
  FE_DEVICE Steps(const FisherProducts& p, int split, int row, int column)
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
  FE_DEVICE uint32_t fetch(const FisherProducts& p, T* to) {
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

}  // namespace fisher
}  // namespace fe::cuda
