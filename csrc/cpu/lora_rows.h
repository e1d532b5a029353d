// SPDX-License-Identifier: Apache-2.0
// Rows of a LoRA linear on their way through a pass: how many at a time, in which buffers, and what is done to them one by one.
#pragma once
#include "lowrank.h"
#include "philox.h"

namespace fe::FE_ISA {

constexpr int64_t CHUNK_FLOATS = 128 * 1024, MIN_CHUNK = 12, MAX_CHUNK = 48;
constexpr int64_t TILE_CHUNK = 64, TILE_DEPTH = 32;  // rows per pass of tile products, and what depths are padded to

inline int64_t widest(const LoraShape& s) {
  return round_up(s.d_in > s.d_out ? s.d_in : s.d_out, MASK_BLOCK);
}

inline int64_t chunk_rows(const LoraShape& s, int64_t rows) {
  if (s.product) return rows < TILE_CHUNK ? rows : TILE_CHUNK;
  int64_t chunk = CHUNK_FLOATS / widest(s) / MIN_CHUNK * MIN_CHUNK;
  chunk = chunk < MIN_CHUNK ? MIN_CHUNK : chunk > MAX_CHUNK ? MAX_CHUNK : chunk;
  return rows < chunk ? rows : chunk;
}

// Buffers of one call, cut from its scratch. fp32 rows that nothing is dropped from are used where they are and need none.
struct LoraBuffers {
  int64_t chunk, wide;
  float *x = nullptr, *dy = nullptr, *mask = nullptr, *bias, *scaled, *sums, *lanes = nullptr, *turned = nullptr;
  uint32_t* words = nullptr;       // rows in pairs
  uint16_t *high = nullptr, *low;  // what tile products take for fp32 numbers
  int64_t size;                    // floats

  LoraBuffers(const LoraShape& s, int64_t rows, float* scratch) : chunk(chunk_rows(s, rows)), wide(widest(s)) {
    float* next = scratch;
    const auto take = [&](int64_t floats) {
      float* taken = next;
      next += aligned(floats);
      return taken;
    };
    const bool dropped = s.dropout_p > 0.0, converted = s.dtype != Dtype::f32;
    if (converted || dropped) x = take(chunk * wide);
    if (converted) dy = take(chunk * wide);
    if (dropped) mask = take(chunk * wide);
    bias = take(s.d_out);
    scaled = take(chunk * s.total_rank);
    sums = take(chunk * s.total_rank);
    if (s.product) {
      const int64_t depth = round_up(chunk, TILE_DEPTH), split = depth * s.total_rank / 2;
      words = reinterpret_cast<uint32_t*>(take(depth / 2 * wide));
      turned = take(depth * s.total_rank);
      high = reinterpret_cast<uint16_t*>(take(split));
      low = reinterpret_cast<uint16_t*>(take(split));
    } else {
      lanes = take(DOT_ROWS * s.total_rank * L);
    }
    size = next - scratch;
  }
};

inline int64_t lora_scratch(const LoraShape& s, int64_t rows) {
  return LoraBuffers(s, rows, nullptr).size;
}

struct Rows {
  const float* data;
  int64_t stride;
};

// Rows [m, m + n) as floats: in place where they are, else converted into `buffer`.
inline Rows float_rows(const Matrix& source, int64_t m, int64_t n, int64_t columns, float* buffer) {
  if (source.dtype == Dtype::f32) return {static_cast<const float*>(at(source, m, 0)), source.stride};
  for (int64_t i = 0; i < n; ++i) to_float(at(source, m + i, 0), source.dtype, columns, buffer + i * columns);
  return {buffer, columns};
}

inline void mask_rows(const LoraShape& s, int64_t m, int64_t n, float* mask) {
  for (int64_t i = 0; i < n; ++i) dropout_row(s.seed, m + i, s.d_in, s.dropout_p, mask + i * widest(s));
}

inline Rows times(Rows x, Rows mask, int64_t n, int64_t columns, float* out) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < columns; ++j) out[i * columns + j] = x.data[i * x.stride + j] * mask.data[i * mask.stride + j];
  return {out, columns};
}

inline void scale_rows(const float* in, const float* scale, int64_t n, int64_t ranks, float* out) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < ranks; ++k) out[i * ranks + k] = in[i * ranks + k] * scale[k];
}

// sum[j] += rows[i, j] for all i.
inline void add_rows(Rows rows, int64_t n, int64_t columns, float* sum) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < columns; ++j) sum[j] += rows.data[i * rows.stride + j];
}

// ds += (dy B) z.
inline void add_scales(const float* u, const float* z, int64_t n, int64_t ranks, float* grad_s) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < ranks; ++k) grad_s[k] += u[i * ranks + k] * z[i * ranks + k];
}

}  // namespace fe::FE_ISA
