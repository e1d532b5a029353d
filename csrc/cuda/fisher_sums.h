// SPDX-License-Identifier: Apache-2.0
// Row and column sums of a Fisher that is never in memory: squared products dy_n^T x_n of samples.
#pragma once
#include "fisher_accumulate.h"

namespace fe::cuda {

struct FisherSums : FisherSamples {
  float *rows, *columns;  // [d_out] and [d_in]
  int64_t row, column;    // from one to the next
  float* work;            // fisher_sums_work numbers, or single_sums_work of them
  uint32_t* counters;     // as many as there are groups of rows and of columns; 0 before and after
  int32_t chunks;         // of tokens, for samples of one token
};

// Numbers in the workspace: from each block the sums of its tile's rows and columns.
constexpr int64_t fisher_sums_work(int64_t tiles, int64_t splits) {
  return tiles * splits * 2 * FISHER_TILE;
}

// Columns of x or dy that a block owns where samples have one token, and tokens of a chunk at least.
constexpr int SINGLE_SUMS_WARPS = 8, SINGLE_SUMS_TOKENS = 32;
constexpr int single_sums_columns(Dtype dtype, bool wide) {
  return 32 * (wide ? 16 / int(element_size(dtype)) : 1);
}
// Numbers in the workspace: norms of all tokens, then the sums of each chunk.
constexpr int64_t single_sums_work(int64_t tokens, int64_t groups, int64_t chunks, int64_t columns) {
  return 2 * tokens + groups * chunks * columns;
}

// rows += weight F 1 and columns += weight 1^T F of F = sum_n (dy_n^T x_n)^2. Every sum has a fixed order.
cudaError_t launch_fisher_sums(const FisherSums& p, cudaStream_t stream);

// The same for samples of one token each, `tokens` of them: rows += weight sum_m |x_m|^2 dy_m^2, columns likewise.
cudaError_t launch_single_sums(const FisherSums& p, cudaStream_t stream);

}  // namespace fe::cuda
