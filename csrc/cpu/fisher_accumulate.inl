// One block of F += weight * sum_n (dy_n^T x_n)^2. Per sample, tokens of x and dy are packed into panels of the register tile's width;
// a tile of dy_n^T x_n lives in registers, is squared there and added to the block's sum of squares, which stays in cache.
// One segment holding all rows gives mode "batch"; squared inputs over one segment give the one-token case (dy^2)^T (x^2).
#pragma once
#include "simd.h"

namespace fe::FE_ISA {

constexpr int64_t WIDTH = TILE_COLUMNS * L;
constexpr int64_t MAX_TOKENS = 320;  // tokens packed at a time: x panel 40 KiB, streamed; longer samples carry their sum in cache
constexpr int64_t FISHER_BLOCK = 384;

struct FisherLayout {
  int64_t row_tiles, column_tiles, tokens, tile_floats;
  bool carried;  // some sample is longer than `tokens`: partial products need a second buffer
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

inline int64_t fisher_scratch(const FisherBlock& p) {
  const FisherLayout f = fisher_layout(p);
  const int64_t block = f.row_tiles * f.column_tiles * f.tile_floats;
  return block * (f.carried ? 2 : 1) + aligned(f.tokens * f.row_tiles * TILE_ROWS) + f.tokens * f.column_tiles * WIDTH;
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

// acc = [carry] + sum_t dy[t, :]^T x[t, :]; then carry <- acc, or total += acc^2.
inline void fisher_tile(const float* dy, const float* x, int64_t tokens, const float* carry, float* out, bool squared) {
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
#pragma GCC unroll 16
  for (int i = 0; i < TILE_ROWS; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < TILE_COLUMNS; ++v) {
      const int64_t at = i * WIDTH + v * L;
      vfloat g = carry ? acc[i][v] + load(carry + at) : acc[i][v];
      store(out + at, squared ? load(out + at) + g * g : g);
    }
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

inline void fisher(const FisherBlock& p, float* scratch) {
  const FisherLayout f = fisher_layout(p);
  const int64_t block = f.row_tiles * f.column_tiles * f.tile_floats;
  float* sums = scratch;
  float* carry = scratch + block;
  float* dy_panel = carry + (f.carried ? block : 0);
  float* x_panel = dy_panel + aligned(f.tokens * f.row_tiles * TILE_ROWS);
  std::memset(sums, 0, block * sizeof(float));
  for (int64_t n = 0; n < p.samples; ++n) {
    for (int64_t t = p.bounds[n]; t < p.bounds[n + 1];) {
      const int64_t left = p.bounds[n + 1] - t, tokens = left < f.tokens ? left : f.tokens;
      const bool first = t == p.bounds[n], last = tokens == left;
      pack_tokens<TILE_ROWS>(p.dy, t, tokens, p.i0, p.i1, p.square_inputs, dy_panel);
      pack_tokens<WIDTH>(p.x, t, tokens, p.j0, p.j1, p.square_inputs, x_panel);
      // With squared inputs the products are sums already: they go straight to `sums`, to which every part adds.
      const bool squared = last && !p.square_inputs;
      for (int64_t ct = 0; ct < f.column_tiles; ++ct)
        for (int64_t rt = 0; rt < f.row_tiles; ++rt) {
          const int64_t tile = (rt * f.column_tiles + ct) * f.tile_floats;
          float* out = squared || p.square_inputs ? sums + tile : carry + tile;
          const float* before = p.square_inputs ? sums + tile : first ? nullptr : carry + tile;
          fisher_tile(dy_panel + rt * tokens * TILE_ROWS, x_panel + ct * tokens * WIDTH, tokens, before, out, squared);
        }
      t += tokens;
    }
  }
  add_block(p, f, sums);
}

}  // namespace fe::FE_ISA
