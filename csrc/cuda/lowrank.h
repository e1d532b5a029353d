// SPDX-License-Identifier: Apache-2.0
// The low-rank terms of a LoRA linear beside its BLAS products: packing factors, skinny products of x and dy, distributing the gradients.
//
// A call has adapters (A_i [r_i, d_in], B_i [rows it owns, r_i], a scale per rank). Ranks are numbered across all adapters, in order, and
// padded to `ranks` (see padded_rank). a [ranks, d_in] holds the rows of every A, b [d_out, ranks] those of every B times its scale, zero
// where an adapter does not own an output row: one product then serves any number of adapters on any rows.
#pragma once
#include "numbers.h"
#include "runtime.h"

namespace fe::cuda {

// Elements are dropped by (seed, row, column) where the word of philox.cuh is below `threshold`, others are multiplied by `inverse`.
struct Dropout {
  const int64_t* seed = nullptr;  // in device memory; none: nothing is dropped
  uint32_t threshold = 0;
  float inverse = 1.f;
};

struct LowrankAdapter {
  Matrix a, b;
  const void* scale;  // or none
  int64_t scale_stride;
  void *da, *db, *ds;  // dense, in the dtypes of a, b and scale; those not asked for are null
  Dtype scale_dtype;
  float factor;         // besides the scale
  int32_t first, rank;  // ranks of the call that are this adapter's
  int32_t first_range, ranges;
  bool one_scale;  // for all ranks
};

// Output rows [start, stop) are rows `offset` and on of an adapter's B.
struct RowRange {
  int32_t start, stop, offset;
};

constexpr int LOWRANK_ADAPTERS = 16, LOWRANK_RANGES = 64;

// Adapters of one launch; calls with more of them take several, each for ranks [first, last) of the call.
struct AdapterTable {
  LowrankAdapter adapters[LOWRANK_ADAPTERS];
  RowRange ranges[LOWRANK_RANGES];
  int32_t count, first, last;
};

// Ranks as the kernels take them: 16, 32, 64, or a multiple of 128.
constexpr int padded_rank(int64_t rank) {
  return rank <= 16 ? 16 : rank <= 32 ? 32 : rank <= 64 ? 64 : int(ceil_div(rank, 128) * 128);
}

constexpr int WALK_COLUMNS = 256;   // that a block of the walk owns
constexpr int EXPAND_COLUMNS = 32;  // that a warp of the expansion writes at a time, at most

// Packs one factor for launch_lowrank_walk and the other for launch_lowrank_expand, rounded to `dtype`.
struct PackParams {
  AdapterTable table;
  void*
      walk;  // [ranks, walk_pitch], the pitch a multiple of WALK_COLUMNS: columns from `walk_first` on of a, or of the transpose of b; or null
  void* expand;  // expand_pitch (a multiple of EXPAND_COLUMNS) * ranks numbers, in the order of the fragments of the expansion; or null
  int64_t walk_first, walk_columns, walk_pitch, expand_columns, expand_pitch;
  uint32_t* counter;  // set to 0 for launch_lowrank_finish
  int32_t ranks;
  Dtype dtype;
  bool walk_a;  // `walk` is a and `expand` is b, or the other way round
};
cudaError_t launch_lowrank_pack(const PackParams& params, cudaStream_t stream);

// One read of x [rows, columns]: u = drop(x) p, and g = drop(x)^T c with the sums of the columns of x. Each only where its pointer is set;
// nothing is dropped where both are.
struct WalkParams {
  Matrix x;
  int64_t rows, columns;
  const void* p;    // packed for the walk
  int64_t p_pitch;  // of its rows
  float* u;         // [blocks of WALK_COLUMNS, rows, ranks], to be added over the first
  const void* c;    // [rows, c_columns], dense
  Dtype c_dtype;
  int32_t c_columns;
  float* g;     // [regions, columns, ranks], to be added over the first, and multiplied by dropout.inverse
  float* sums;  // [regions, sums_pitch], besides g
  int64_t sums_pitch;
  int64_t region_rows;  // a multiple of 32
  Dropout dropout;
  int32_t ranks;
  Precision precision;
  bool wide;  // rows of x are read 16 bytes at a time
};
cudaError_t launch_lowrank_walk(const WalkParams& params, cudaStream_t stream);

// y [rows, columns] = bias + drop(c f^T), dense, for f packed for the expansion and c the sum of what the walk left in u. Also writes c.
struct ExpandParams {
  const float* u;
  int64_t parts;
  float* z;   // [rows, rank] or null
  void* u_t;  // [rows, ranks] in the dtype of y, or null
  const void* f;
  const void* bias;  // or null
  void* y;           // or null
  int64_t rows, columns;
  int64_t split;  // columns per block, a multiple of WALK_COLUMNS
  Dropout dropout;
  int32_t rank, ranks;
  Dtype bias_dtype;
  Precision precision;
};
cudaError_t launch_lowrank_expand(const ExpandParams& params, cudaStream_t stream);

// parts[0] + ... + parts[count - 1], each `length` floats, `stride` apart; a multiple of 4 both.
struct Parts {
  const float* data;  // null: not asked for
  int64_t count, stride, length;
};

// Floats of a block of the finish.
constexpr int FINISH_SLAB = 128;
constexpr int64_t finish_groups(int64_t rows, int ranks) {
  return ranks < FINISH_SLAB ? ceil_div(rows, FINISH_SLAB / ranks) : rows;
}

// dA_i, dB_i, ds_i and dbias from what the walks left.
struct FinishParams {
  AdapterTable table;
  Parts a;     // [d_in, ranks], times `inverse`
  Parts b;     // output rows from first_row on [.., ranks]
  Parts bias;  // [d_out]
  void* dbias;
  float* dots;  // [finish_groups(rows of b), ranks], if there is a ds
  uint32_t* counter;
  int64_t first_row, columns;  // columns: d_out, which bias.length pads
  float inverse;
  Dtype bias_dtype;
  int32_t ranks;
};
cudaError_t launch_lowrank_finish(const FinishParams& params, cudaStream_t stream);

// The size of launch parameters that every driver accepts.
static_assert(sizeof(PackParams) < 4096 && sizeof(FinishParams) < 4096);

}  // namespace fe::cuda
