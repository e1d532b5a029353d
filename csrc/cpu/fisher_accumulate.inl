// SPDX-License-Identifier: Apache-2.0
// One block of F += weight * sum_n (dy_n^T x_n)^2. Per sample, tokens of x and dy are packed into panels of the register tile's width;
// a tile of dy_n^T x_n lives in registers, is squared there and added to the block's sum of squares, which stays in cache.
// One segment holding all rows gives mode "batch"; squared inputs over one segment give the one-token case (dy^2)^T (x^2).
#pragma once
#include "simd.h"

namespace fe::FE_ISA {

constexpr int64_t WIDTH = TILE_COLUMNS * L;
constexpr int64_t MAX_TOKENS = 320;  // tokens packed at a time: x panel 40 KiB, streamed; longer samples carry their sum in cache
constexpr int64_t FISHER_BLOCK = 384;
constexpr int64_t LINE_FLOATS = 16;  // of a cache line

struct FisherLayout {
  int64_t row_tiles, column_tiles, tokens, tile_floats;
  bool carried;  // some sample is longer than `tokens`: partial products need a buffer

  int64_t block_floats() const { return row_tiles * column_tiles * tile_floats; }
  int64_t carry_floats() const { return carried ? block_floats() : 0; }
};

inline FisherLayout fisher_layout(const FisherBlock& p) {
  int64_t longest = 1;
  for (int64_t n = 0; n < p.samples; ++n) {
    int64_t length = p.bounds[n + 1] - p.bounds[n];
    if (length > longest) longest = length;
  }
  FisherLayout f;
  f.row_tiles = (p.i1 - p.i0 + TILE_ROWS - 1) / TILE_ROWS;
  f.column_tiles = (p.j1 - p.j0 + WIDTH - 1) / WIDTH;
  f.carried = longest > MAX_TOKENS && !p.square_inputs;
  int64_t parts = (longest + MAX_TOKENS - 1) / MAX_TOKENS;
  f.tokens = (longest + parts - 1) / parts;
  f.tile_floats = TILE_ROWS * WIDTH;
  return f;
}

// What is summed: the block of F, or vectors of lanes of its row sums, beside the column sums.
inline int64_t sums_floats(const FisherBlock& p, const FisherLayout& f) {
  return p.row_sums ? f.row_tiles * TILE_ROWS * L + f.column_tiles * WIDTH : f.block_floats();
}

inline int64_t fisher_scratch(const FisherBlock& p) {
  const FisherLayout f = fisher_layout(p);
  return sums_floats(p, f) + f.carry_floats() + aligned(f.tokens * f.row_tiles * TILE_ROWS) + f.tokens * f.column_tiles * WIDTH;
}

// [tiles][tokens][width], zero beyond the matrix.
template <int64_t W>
inline void pack_tokens(const Matrix& source, int64_t t0, int64_t tokens, int64_t c0, int64_t c1, bool square, float* out) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t c = c0, tile = 0; c < c1; c += W, ++tile) {
      float* to = out + (tile * tokens + t) * W;
      int64_t valid = c1 - c < W ? c1 - c : W;
      if (valid == W && source.dtype == Dtype::f32)
        std::memcpy(to, at(source, t0 + t, c), W * sizeof(float));
      else
        to_float(at(source, t0 + t, c), source.dtype, valid, to);
      for (int64_t i = valid; i < W; ++i) to[i] = 0.f;
      if (square)
        for (int64_t i = 0; i < W; ++i) to[i] *= to[i];
    }
  }
}

// acc = [carry] + sum_t dy[t, :]^T x[t, :], handed to `finish` in registers.
template <class Finish>
inline __attribute__((always_inline)) void fisher_tile(const float* dy, const float* x, int64_t tokens, const float* carry,
                                                       Finish&& finish) {
  vfloat acc[TILE_ROWS][TILE_COLUMNS];
#pragma GCC unroll 16
  for (int i = 0; i < TILE_ROWS; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < TILE_COLUMNS; ++v) acc[i][v] = vfloat{};
  for (int64_t t = 0; t < tokens; ++t, dy += TILE_ROWS, x += WIDTH) {
    vfloat xs[TILE_COLUMNS];
#pragma GCC unroll 4
    for (int v = 0; v < TILE_COLUMNS; ++v) xs[v] = load(x + v * L);
#pragma GCC unroll 16
    for (int i = 0; i < TILE_ROWS; ++i) {
      vfloat d = splat(dy[i]);
#pragma GCC unroll 4
      for (int v = 0; v < TILE_COLUMNS; ++v) acc[i][v] += d * xs[v];
    }
  }
  if (carry) {
#pragma GCC unroll 16
    for (int i = 0; i < TILE_ROWS; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < TILE_COLUMNS; ++v) acc[i][v] += load(carry + i * WIDTH + v * L);
  }
  finish(acc);
}

// f(row, vector, acc) over a tile in registers.
template <class F>
inline __attribute__((always_inline)) void over_tile(vfloat (&acc)[TILE_ROWS][TILE_COLUMNS], F&& f) {
#pragma GCC unroll 16
  for (int i = 0; i < TILE_ROWS; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < TILE_COLUMNS; ++v) f(i, v, acc[i][v]);
}

// Leaves partial products in `out`.
inline void keep_tile(const float* dy, const float* x, int64_t tokens, const float* carry, float* out) {
  fisher_tile(dy, x, tokens, carry, [=](auto& acc) __attribute__((always_inline)) {
    over_tile(acc, [=](int i, int v, vfloat g) __attribute__((always_inline)) { store(out + i * WIDTH + v * L, g); });
  });
}

// Adds the squares to `out`, which comes from the second-level cache while the products are computed.
inline void add_squares(const float* dy, const float* x, int64_t tokens, const float* carry, float* out) {
  for (int64_t at = 0; at < TILE_ROWS * WIDTH; at += LINE_FLOATS) __builtin_prefetch(out + at);
  fisher_tile(dy, x, tokens, carry, [=](auto& acc) __attribute__((always_inline)) {
    over_tile(acc, [=](int i, int v, vfloat g) __attribute__((always_inline)) {
      float* to = out + i * WIDTH + v * L;
      store(to, load(to) + g * g);
    });
  });
}

// Adds the squares to lanes of their rows, a vector for each, and to their columns.
inline void add_square_sums(const float* dy, const float* x, int64_t tokens, const float* carry, float* rows, float* columns) {
  fisher_tile(dy, x, tokens, carry, [=](auto& acc) __attribute__((always_inline)) {
    vfloat down[TILE_COLUMNS] = {};
#pragma GCC unroll 16
    for (int i = 0; i < TILE_ROWS; ++i) {
      vfloat across{};
#pragma GCC unroll 4
      for (int v = 0; v < TILE_COLUMNS; ++v) {
        const vfloat square = acc[i][v] * acc[i][v];
        across += square, down[v] += square;
      }
      store(rows + i * L, load(rows + i * L) + across);
    }
#pragma GCC unroll 4
    for (int v = 0; v < TILE_COLUMNS; ++v) store(columns + v * L, load(columns + v * L) + down[v]);
  });
}

inline void add_block(const FisherBlock& p, const FisherLayout& f, const float* sums) {
  for (int64_t i = p.i0; i < p.i1; ++i) {
    for (int64_t ct = 0; ct < f.column_tiles; ++ct) {
      const int64_t column = p.j0 + ct * WIDTH, rt = (i - p.i0) / TILE_ROWS;
      const int64_t valid = p.j1 - column < WIDTH ? p.j1 - column : WIDTH;
      const float* from = sums + (rt * f.column_tiles + ct) * f.tile_floats + (i - p.i0) % TILE_ROWS * WIDTH;
      Matrix fisher = p.fisher;
      float row[WIDTH];
      to_float(at(fisher, i, column), fisher.dtype, valid, row);
      for (int64_t l = 0; l < valid; ++l) row[l] += p.weight * from[l];
      from_float(row, valid, at(fisher, i, column), fisher.dtype);
    }
  }
}

// Columns [c0, c1) of rows [t0, t1) on their way into the second-level cache.
inline void prefetch_rows(const Matrix& source, int64_t t0, int64_t t1, int64_t c0, int64_t c1) {
  const int64_t step = LINE_FLOATS * 4 / bytes_of(source.dtype);
  for (int64_t t = t0; t < t1; ++t)
    for (int64_t c = c0; c < c1; c += step) __builtin_prefetch(at(source, t, c), 0, 2);
}

inline void write_sums(const FisherBlock& p, const FisherLayout& f, const float* sums) {
  sum_lanes(sums, p.i1 - p.i0, p.row_sums);
  std::memcpy(p.column_sums, sums + f.row_tiles * TILE_ROWS * L, (p.j1 - p.j0) * sizeof(float));
}

inline void fisher(const FisherBlock& p, float* scratch) {
  const FisherLayout f = fisher_layout(p);
  const int64_t sums_size = sums_floats(p, f);
  float* sums = scratch;
  float* carry = scratch + sums_size;
  float* dy_panel = carry + f.carry_floats();
  float* x_panel = dy_panel + aligned(f.tokens * f.row_tiles * TILE_ROWS);
  std::memset(sums, 0, sums_size * sizeof(float));
  for (int64_t n = 0; n < p.samples; ++n) {
    for (int64_t t = p.bounds[n]; t < p.bounds[n + 1];) {
      const int64_t left = p.bounds[n + 1] - t, tokens = left < f.tokens ? left : f.tokens;
      const bool first = t == p.bounds[n], last = tokens == left;
      const int64_t rest = p.bounds[p.samples] - t - tokens, coming = rest < tokens ? rest : tokens;
      pack_tokens<TILE_ROWS>(p.dy, t, tokens, p.i0, p.i1, p.square_inputs, dy_panel);
      pack_tokens<WIDTH>(p.x, t, tokens, p.j0, p.j1, p.square_inputs, x_panel);
      for (int64_t ct = 0; ct < f.column_tiles; ++ct)
        for (int64_t rt = 0; rt < f.row_tiles; ++rt) {
          const int64_t tile = (rt * f.column_tiles + ct) * f.tile_floats;
          const float *dy = dy_panel + rt * tokens * TILE_ROWS, *x = x_panel + ct * tokens * WIDTH;
          const float* before = first ? nullptr : carry + tile;
          // The tokens after these, a share of them with every tile.
          const int64_t done = ct * f.row_tiles + rt, tiles = f.row_tiles * f.column_tiles;
          const int64_t from = t + tokens + done * coming / tiles, to = t + tokens + (done + 1) * coming / tiles;
          prefetch_rows(p.x, from, to, p.j0, p.j1);
          prefetch_rows(p.dy, from, to, p.i0, p.i1);
          if (p.square_inputs)  // the products are sums already, to which every part adds
            keep_tile(dy, x, tokens, sums + tile, sums + tile);
          else if (!last)
            keep_tile(dy, x, tokens, before, carry + tile);
          else if (p.row_sums)
            add_square_sums(dy, x, tokens, before, sums + rt * TILE_ROWS * L, sums + f.row_tiles * TILE_ROWS * L + ct * WIDTH);
          else
            add_squares(dy, x, tokens, before, sums + tile);
        }
      t += tokens;
    }
  }
  if (p.row_sums)
    write_sums(p, f, sums);
  else
    add_block(p, f, sums);
}

}  // namespace fe::FE_ISA
