// SPDX-License-Identifier: Apache-2.0
// Merging adapters into weights, and soft thresholding, many tensors per launch.
#pragma once
#include "numbers.h"
#include "runtime.h"

namespace fe::cuda {

// W += B diag(scale * factor) A, for W [rows, columns], A [rank, columns], B [rows, rank].
struct MergeEntry {
  Matrix w, a, b;
  const void* scale;  // one number per rank, or null for ones
  int64_t scale_stride;
  Dtype scale_dtype;
  float factor;
  int64_t rows, columns, rank;
  int64_t first_tile;  // set by the launcher
};

constexpr int MERGE_GROUP = 16;

struct MergeParams {
  MergeEntry entries[MERGE_GROUP];
  int32_t count;
};

// s = sign(s) max(|s| - kappa, 0) for `size` numbers, `stride` apart.
struct ThresholdEntry {
  void* data;
  int64_t size, stride;
  Dtype dtype;
  int32_t first_block;  // set by the launcher
};

constexpr int THRESHOLD_GROUP = 64;

struct ThresholdParams {
  ThresholdEntry entries[THRESHOLD_GROUP];
  int32_t count;
  float kappa;
};

// The size of launch parameters that every driver accepts.
static_assert(sizeof(MergeParams) < 4096 && sizeof(ThresholdParams) < 4096);

// Entries of one launch are written in any order: no two of them may share elements.
cudaError_t launch_merge(MergeParams params, cudaStream_t stream);
cudaError_t launch_soft_threshold(ThresholdParams params, cudaStream_t stream);

}  // namespace fe::cuda
