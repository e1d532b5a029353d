// SPDX-License-Identifier: Apache-2.0
// Fisher accumulation: squared products dy_n^T x_n of samples, added to F.
#pragma once
#include "numbers.h"
#include "runtime.h"

namespace fe::cuda {

// [samples, tokens, columns] in device memory, strides in elements. Packed samples have a stride of 0 and rows of all samples as tokens.
struct FisherTokens {
  const void* data;
  int64_t sample, token, column;
};

// Samples, cut into parts that blocks share.
struct FisherSamples {
  FisherTokens x, dy;
  const void* cu_seqlens;  // samples + 1 offsets of rows, contiguous; or null
  int64_t samples, tokens;
  int32_t d_out, d_in, splits;
  float weight;
  Dtype dtype;          // of x and dy
  Precision precision;  // of fp32 operands: tf32x3 or tf32
  bool long_offsets;    // cu_seqlens is int64
  bool wide;            // x and dy may be read 16 bytes at a time: contiguous columns, rows that begin and end at multiples of 16 bytes
};

struct FisherProducts : FisherSamples {
  Matrix fisher;    // any strides; several splits need fp32
  uint32_t* locks;  // for more than one split: a counter of tickets, then one per tile of F; 0 before and after
};

constexpr int FISHER_TILE = 128;  // rows and columns of F that a block owns

// Shared memory of a block: stages of a tile of x and one of dy, or a tile of sums. The pitch keeps reads of fragments
// free of bank conflicts, whether 16-bit numbers are read as matrices or one by one.
constexpr int FISHER_STAGES = 4, FISHER_PITCH = FISHER_TILE + 8;
constexpr int fisher_step(int element_size, bool single) {  // tokens of a stage
  return element_size == 2 && !single ? 32 : 16;
}
constexpr size_t fisher_shared_bytes(int element_size, bool single) {
  const size_t stages = size_t(FISHER_STAGES) * 2 * fisher_step(element_size, single) * FISHER_PITCH * element_size;
  const size_t sums = sizeof(float) * FISHER_TILE * FISHER_PITCH;
  return (stages > sums ? stages : sums) + 4 * (FISHER_STAGES + 1);  // words of the stages, and the ticket
}

// F += weight sum_n (dy_n^T x_n)^2. Samples are summed in order, split after split.
cudaError_t launch_fisher_samples(const FisherProducts& p, cudaStream_t stream);

// F += weight sum_n (dy_n^2)^T (x_n^2): samples of one token each, `tokens` of them; `samples` is 1.
cudaError_t launch_fisher_single_tokens(const FisherProducts& p, cudaStream_t stream);

struct FisherSquare {
  Matrix fisher;          // any strides
  const float* gradient;  // [d_out, d_in], contiguous
  int64_t d_out, d_in;
  float weight;
};

// F += weight G^2.
cudaError_t launch_fisher_square(const FisherSquare& p, cudaStream_t stream);

}  // namespace fe::cuda
