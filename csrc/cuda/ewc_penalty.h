// EWC penalty of all adapters of a model with its gradients: one launch over a table of adapters and a list of items of work.
#pragma once
#include "numbers.h"
#include "runtime.h"

namespace fe::cuda {

// One adapter as the kernel finds it in device memory.
struct PenaltyAdapter {
  const void *fisher, *lora_a, *lora_b, *scale;  // scale null: `factor` alone
  int64_t fisher_row, fisher_column, a_row, a_column, b_row, b_column, scale_stride;
  int64_t grad_a, grad_b, grad_s;  // places in the flat gradients; grad_s < 0: not asked for
  int64_t part_a, part_b, part_s;  // places in the workspace
  Dtype fisher_dtype, a_dtype, b_dtype, scale_dtype;
  float factor;
  int32_t d_out, d_in, rank;
  int32_t height, regions, blocks, chunks;  // rows of a region, and how many regions of rows, blocks of columns, chunks of ranks
  int32_t count_a, count_b, count_s;        // places of its counters
  int32_t scalar;                           // the scale is one number for all ranks
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

// How Fisher matrices are read: 16 bytes at a time, or element by element with strides of both dimensions and any dtype.
enum class FisherLoads : int32_t { f32, bf16, elements };

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

// Whether registers hold A of a warp's columns while it walks: beside three times the operands of tf32x3 there is no room.
constexpr bool penalty_holds_a(Precision precision, int rp) {
  return rp <= 16 && precision != Precision::tf32x3;
}

// Shared memory of a block in floats, for adapters of up to RP ranks (16, 32, 64).
template <Precision P, int RP>
struct PenaltyLayout {
  static constexpr int WARPS = penalty_warps(RP), THREADS = 32 * WARPS, WIDTH = WARPS * PENALTY_COLUMNS;
  static constexpr int BLOCKS = RP <= 16 || (RP <= 32 && P == Precision::bf16) ? 2 : 1;  // per multiprocessor, by registers
  // 4 more than a multiple of 16: lanes that read eight columns of four even rows then hit different banks.
  static constexpr int LDB = RP + 4, LDH = PENALTY_COLUMNS + 4, LDA = WIDTH + 4;
  static constexpr int B = 0;                                                  // [2][rows][LDB]: B
  static constexpr int SCALED = B + 2 * PENALTY_ROWS * LDB;                    // [2][rows][LDB]: B s
  static constexpr int H = SCALED + 2 * PENALTY_ROWS * LDB;                    // [warps][rows][LDH]
  static constexpr int PARTS = H + WARPS * PENALTY_ROWS * LDH;                 // [2][warps][rows][RP]: H A^T
  static constexpr int A = PARTS + 2 * WARPS * PENALTY_ROWS * RP;              // [RP][LDA], unless registers hold it
  static constexpr int SCRATCH = A + (penalty_holds_a(P, RP) ? 0 : RP * LDA);  // [33]
  static constexpr int BYTES = (SCRATCH + 33) * 4;
};

// Launches all items; adapters have ranks up to `rp` (16, 32, 64), or any rank with rp = 64 and `elements`.
cudaError_t launch_ewc_penalty(const Penalty& penalty, int rp, Precision precision, FisherLoads loads, cudaStream_t stream);

}  // namespace fe::cuda
