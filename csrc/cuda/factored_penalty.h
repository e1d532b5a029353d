// SPDX-License-Identifier: Apache-2.0
// Penalty of factored Fishers, F = r c^T / sum(c), of all adapters of a model with its gradients: one launch.
#pragma once
#include "numbers.h"
#include "runtime.h"

namespace fe::cuda {

// One of both sides of an adapter: B with the row sums r, or A with the column sums c. `size` is d_out or d_in.
struct FactoredSide {
  const void* factor;
  const float* sums;
  int64_t along, rank;            // strides of the factor, in elements
  int64_t sum;                    // stride of the sums
  int64_t grad;                   // place in the flat gradients
  int64_t grad_along, grad_rank;  // strides there
  int64_t part;                   // place in the workspace: of each pair of tiles of ranks, of each chunk of indices
  Dtype dtype;
  int32_t size, length, chunks;  // indices of a chunk, and how many chunks
  int32_t count;                 // place of the counters of its pairs
};

// One adapter as the kernel finds it in device memory.
struct FactoredAdapter {
  FactoredSide sides[2];           // outputs, inputs
  const void* scale;               // null: `factor` alone
  int64_t scale_stride, grad_s;    // grad_s < 0: not asked for
  int64_t products, total, value;  // places in the workspace: M and N / sum(c), [rank, rank] each; sum(c); the value of the sum of both
  Dtype scale_dtype;
  float factor;
  int32_t rank, pairs;         // pairs of tiles of ranks
  int32_t count, ready, done;  // places of counters: of finished pairs, whether M and N are there, of finished gradients
  int32_t gradients;           // items that compute them
  int32_t scalar;              // the scale is one number for all ranks
};

// What one thread block does: products of two tiles of ranks over a chunk of indices, or the gradient of a tile of ranks for some indices.
struct FactoredItem {
  int32_t adapter, side, gradient, chunk, first, second, pair;  // `first`, `second`: ranks
};

struct FactoredPenalty {
  const FactoredAdapter* adapters;
  const FactoredItem* items;  // those of products come first: items of gradients wait for them
  float* work;
  uint32_t* counters;  // 0 before and after; the first is of tickets, the second of adapters
  float* loss;
  float* grads;
  int32_t n_adapters, n_items;
  float lambda;
};

constexpr int FACTORED_THREADS = 256;
// Indices that a block reads at a time for products, and those of a block for gradients; numbers of a chunk in the workspace.
constexpr int factored_step(int rp) {
  return 2048 / rp;
}
constexpr int factored_rows(int rp) {
  return 4096 / rp;
}
constexpr int factored_part(int rp) {
  return rp * rp + 1;
}

// Launches all items, for tiles of `rp` ranks (16, 32, 64).
cudaError_t launch_factored_penalty(const FactoredPenalty& penalty, int rp, cudaStream_t stream);

}  // namespace fe::cuda
