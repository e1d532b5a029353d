// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels need from a call, and the table of kernels of one instruction set. No ATen, no allocation: plain pointers and
// sizes, so that the same sources compile anywhere. Every kernel does one thread's share of the work.
//
// "Panel" is the layout all low-rank factors are packed into: a [r, n] matrix stored as [ceil(n / L)][r][L] with zero padding, L the
// vector length of the instruction set. Walking along n reads it sequentially for every rank, whatever n and r are, and no kernel
// needs a tail for it.
#pragma once
#include <cstdint>

namespace fe {

enum class Dtype : int { f32, bf16, f16 };

static inline int64_t bytes_of(Dtype t) {
  return t == Dtype::f32 ? 4 : 2;
}

// A row-major matrix with contiguous rows.
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;  // elements between rows
  Dtype dtype = Dtype::f32;
};

// Where a panel lies: the vector of columns [j, j + L) of rank k is at data + j per_column + k per_rank.
struct Panel {
  float* data = nullptr;
  int64_t per_column = 0, per_rank = 0;
};

// C [rows, columns] in fp32 (stride ldc) becomes A B, or A B is added to it, on the processor's tiles of 16-bit numbers. A [rows, depth] is
// bf16 with stride lda; B [depth, columns] is bf16 in pairs of rows: word (i, j) of stride ldb has its elements (2 i, j) and (2 i + 1, j).
using TileProduct = void (*)(int64_t rows, int64_t columns, int64_t depth, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                             const uint16_t* a, const uint32_t* b, float* c);

// Output rows [start, stop) of the layer belong to rows [offset, offset + stop - start) of B of one adapter.
struct RowRange {
  int adapter = 0;
  int64_t start = 0, stop = 0;
  int64_t panel = 0;  // offset in floats of this range's panel of B^T, and of its gradient
};

// The low-rank part of a LoRA linear: R is the sum of the adapters' ranks.
struct LoraShape {
  int64_t d_in = 0, d_out = 0, total_rank = 0;
  const int64_t* rank_begin = nullptr;  // [adapters + 1]
  const RowRange* ranges = nullptr;
  int64_t n_ranges = 0;
  const float* a_panel = nullptr;  // all A stacked: panel [R, d_in]
  const float* b_panel = nullptr;  // per range: panel [r, stop - start] of its rows of B, transposed
  const float* scale = nullptr;    // [R]
  Dtype dtype = Dtype::f32;        // of x, y and their gradients
  double dropout_p = 0.0;
  uint64_t seed = 0;
  TileProduct product = nullptr;  // where given, the panels are the factors as bf16 words for it (tiled.inl)
};

struct LoraForward {
  LoraShape shape;
  Matrix x, y;
  const void* bias = nullptr;  // in y's dtype, or null
  float* z = nullptr;          // [M, R], without the scale
};

// Gradients of A, B, s and the bias are overwritten by those of a call's rows (of A and B in panel layout); the caller adds those of
// several calls in their order.
struct LoraBackward {
  LoraShape shape;
  Matrix dy, x, dx;
  const float* z = nullptr;  // [M, R]
  bool need_dx = false, need_a = false, need_b = false, need_s = false, need_bias = false;
  float* grad_a = nullptr;     // panel [R, d_in]
  float* grad_b = nullptr;     // as b_panel
  float* grad_s = nullptr;     // [R]
  float* grad_bias = nullptr;  // [d_out]
};

struct PenaltyAdapter {
  bool l1 = false;     // the penalty is lambda sum |B diag(s) A|, which has no Fisher
  Matrix fisher;       // [rows, d_in], f32 or bf16
  bool codes = false;  // fisher has rows of codes in 8 bits (reference/eight_bit.py), its stride is in bytes
  int64_t rows = 0, d_in = 0, rank = 0;
  const float* a = nullptr;      // [r, d_in]
  const float* b = nullptr;      // [rows, r]
  const float* scale = nullptr;  // [r], or null for 1
  float lambda = 0.f;
  bool need_a = false, need_b = false, need_s = false;
  float* grad_b = nullptr;  // [rows, r]
};

// A penalty of F = r c^T / sum(c), of all rows of an adapter.
struct FactoredAdapter {
  const float *rows = nullptr, *columns = nullptr;  // r [d_out], c [d_in]
  int64_t d_out = 0, d_in = 0, rank = 0;
  const float* a = nullptr;      // [r, d_in]
  const float* b = nullptr;      // [d_out, r]
  const float* scale = nullptr;  // [r]
  float lambda = 0.f;
  float *grad_a = nullptr, *grad_b = nullptr;  // as a and b, null where not wanted
  float* grad_s = nullptr;                     // [r]
};

struct FisherBlock {
  Matrix x, dy, fisher;             // x [rows, d_in], dy [rows, d_out]
  const int64_t* bounds = nullptr;  // [samples + 1] row offsets
  int64_t samples = 0;
  bool square_inputs = false;  // one token per sample: (dy^2)^T (x^2) over all rows of a segment, not squared again
  float weight = 1.f;
  int64_t i0 = 0, i1 = 0, j0 = 0, j1 = 0;  // the block of F this call owns
  // Where given, they are overwritten by the sums of the block's rows (from i0 on) and columns (from j0 on), without the weight, and
  // `fisher` is left alone.
  float *row_sums = nullptr, *column_sums = nullptr;
};

struct Kernels {
  const char* name;
  int64_t lanes;  // floats per vector
  // A panel of r ranks and n columns from a matrix [r, n], from one [n, r], and the reverse.
  void (*pack_panel)(Matrix rows, int64_t r, int64_t n, Panel panel);
  void (*pack_transposed)(Matrix rows, int64_t r, int64_t n, Panel panel);
  void (*unpack_panel)(Panel panel, int64_t r, int64_t n, Matrix rows);
  void (*unpack_transposed)(Panel panel, int64_t r, int64_t n, Matrix rows);
  void (*pack_pairs)(Matrix rows, int64_t depth, int64_t n, uint32_t* words);  // of rows, for tile products; depth is even
  int64_t (*lora_scratch)(const LoraShape&, int64_t rows);                     // floats of scratch for a call of at most so many rows
  void (*lora_forward)(const LoraForward&, int64_t m0, int64_t m1, float* scratch);
  void (*lora_backward)(const LoraBackward&, int64_t m0, int64_t m1, float* scratch);
  int64_t (*penalty_scratch)(int64_t rank, int64_t d_in);  // floats of scratch per thread
  int64_t penalty_rows;                                    // row ranges that start at multiples of this waste nothing
  // Rows [row0, row1): returns their loss, overwrites grad_a [r, d_in], adds to grad_s [r].
  double (*penalty)(const PenaltyAdapter&, int64_t row0, int64_t row1, float* grad_a, float* grad_s, float* scratch);
  int64_t (*factored_scratch)(int64_t rank, int64_t d_out, int64_t d_in);
  double (*factored)(const FactoredAdapter&, float* scratch);  // returns the loss, overwrites the gradients
  int64_t (*fisher_scratch)(const FisherBlock&);
  int64_t fisher_block;                           // largest side of a block that keeps the scratch of one thread in its cache
  int64_t fisher_tile_rows, fisher_tile_columns;  // blocks whose sides are multiples of these waste nothing
  void (*fisher)(const FisherBlock&, float* scratch);
  void (*merge)(Matrix weight, int64_t d_in, int64_t rank, const float* a_panel, const float* sb, int64_t row0, int64_t row1);
};

// The widest instruction set that this processor has (or that FUSED_EWCLORA_CPU_ISA names).
const Kernels& kernels();

}  // namespace fe
