// SPDX-License-Identifier: Apache-2.0
// EWC penalty, or l1 norm, of all adapters of a model with its gradients: one launch over a table of adapters and a list of items of work.
#pragma once
#include "numbers.h"
#include "runtime.h"

namespace fe::cuda {

// One adapter as the kernel finds it in device memory.
struct PenaltyAdapter {
  const void *fisher, *lora_a, *lora_b, *scale;  // fisher null: of an l1 norm; scale null: `factor` alone
  int64_t fisher_row, fisher_column, a_row, a_column, b_row, b_column, scale_stride;
  int64_t grad_a, grad_b, grad_s;  // places in the flat gradients; grad_s < 0: not asked for
  int64_t part_a, part_b, part_s;  // places in the workspace
  Dtype fisher_dtype, a_dtype, b_dtype, scale_dtype;
  float factor;
  int32_t d_out, d_in, rank;
  int32_t height, regions, blocks, chunks;  // rows of a region, and how many regions of rows, blocks of columns, chunks of ranks
  int32_t count_a, count_b, count_s;        // places of its counters
  int32_t scalar;                           // the scale is one number for all ranks
  int32_t block_scales;                     // of a Fisher in 8 bits: bytes from a row's codes to its scales; 0: F is numbers
};

// What one thread block does: a region of rows of a block of columns, gradients for a chunk of the ranks.
struct PenaltyItem {
  int32_t adapter, region, block, chunk;
};

struct Penalty {
  const PenaltyAdapter* adapters;
  const PenaltyItem* items;
  float* work;         // a loss per item, then parts of gradients
  uint32_t* counters;  // 0 before and after; the first is of the items
  float* loss;
  float* grads;
  int32_t n_items;
  float lambda;
  bool need_a, need_b, need_s;
};

// How Fisher matrices are read: 16 bytes at a time, as blocks of 8-bit codes, or element by element with strides of both dimensions and any
// dtype. `none` are read for the l1 norm. `f32`, `bf16`, `codes` and `none` are for ranks up to 64, and the others for any.
enum class FisherLoads : int32_t { f32, bf16, codes, codes_of_any_rank, elements, none, none_of_any_rank };

constexpr int PENALTY_ROWS = 16;     // of a strip of a region
constexpr int PENALTY_COLUMNS = 32;  // of a warp
constexpr int PENALTY_CHUNK = 64;    // ranks beyond which gradients are computed chunk by chunk

constexpr int penalty_warps(int rp) {
  return rp <= 32 ? 8 : 4;
}
// Columns of F of one block of columns.
constexpr int penalty_width(int rp) {
  return penalty_warps(rp) * PENALTY_COLUMNS;
}
// Blocks that run on a multiprocessor at a time; registers are shared out for as many.
constexpr int penalty_blocks(Precision precision, int rp) {
  return rp <= 16 || (rp <= 32 && precision == Precision::bf16) ? 2 : 1;
}

// Whether registers hold A of a warp's columns while it walks.
constexpr bool penalty_holds_a(int rp) {
  return rp <= 16;
}

// Strips of F that are on their way to shared memory; 0: one strip, to registers, where other things take the room.
constexpr int penalty_stages(Precision precision, int rp, FisherLoads loads) {
  const int floats = rp <= 16 ? 1024 : rp <= 32 && precision == Precision::bf16 ? 512 : 0;  // of a warp
  if (loads == FisherLoads::elements || loads == FisherLoads::none) return 0;
  return floats / (PENALTY_ROWS * PENALTY_COLUMNS) * (loads == FisherLoads::f32 ? 1 : 2);
}

// Floats of a warp's strip as it comes: of codes a block of 32 in each row, then a word with the scale of each.
constexpr int penalty_strip(FisherLoads loads) {
  constexpr int NUMBERS = PENALTY_ROWS * PENALTY_COLUMNS;
  return loads == FisherLoads::f32 ? NUMBERS : loads == FisherLoads::codes ? NUMBERS / 4 + PENALTY_ROWS : NUMBERS / 2;
}

// Shared memory of a block in floats, for adapters of up to RP ranks (16, 32, 64).
template <Precision P, int RP, FisherLoads L>
struct PenaltyLayout {
  static constexpr int WARPS = penalty_warps(RP), THREADS = 32 * WARPS, WIDTH = WARPS * PENALTY_COLUMNS;
  static constexpr int BLOCKS = penalty_blocks(P, RP), STAGES = penalty_stages(P, RP, L);
  static constexpr int TILE = PENALTY_ROWS * PENALTY_COLUMNS;      // a warp's numbers of a strip
  static constexpr int SQUARES = PENALTY_ROWS * RP;                // tiles of 16 x 16, see penalty_tiles.cuh
  static constexpr int LDA = WIDTH + 4;                            // four even rows of a column lie in different banks
  static constexpr int F = 0;                                      // [warps][stages][strip]
  static constexpr int H = F + WARPS * STAGES * penalty_strip(L);  // [warps][tile]; not for bf16, which is transposed in registers
  static constexpr int SCALED = H + (P == Precision::bf16 ? 0 : WARPS * TILE);  // [2][squares]: B s, as left operand
  static constexpr int TURNED = SCALED + 2 * SQUARES;                           // [2][squares]: the same, as right operand
  static constexpr int PARTS = TURNED + 2 * SQUARES;                            // [2][warps][squares]: A H^T
  static constexpr int A = PARTS + 2 * WARPS * SQUARES;                         // [RP][LDA], unless registers hold it
  static constexpr int SCRATCH = A + (penalty_holds_a(RP) ? 0 : RP * LDA);      // [36]
  static constexpr int BYTES = (SCRATCH + 36) * 4;
};

// Launches all items; adapters have ranks up to `rp` (16, 32, 64), or any rank with rp = 64 and loads for any rank.
cudaError_t launch_ewc_penalty(const Penalty& penalty, int rp, Precision precision, FisherLoads loads, cudaStream_t stream);

}  // namespace fe::cuda
