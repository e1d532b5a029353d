// SPDX-License-Identifier: Apache-2.0
#include "fisher_sums.h"
#include "fisher_tiles.cuh"
#include "reduce.cuh"

namespace fe::cuda {
namespace fisher {

constexpr int WARPS_DOWN = THREADS / 32 / WARPS_ACROSS;

// to += weight times the sum of `count` parts, `stride` apart, in order. Eight loads are under way at a time.
FE_DEVICE void add_parts(const float* parts, int count, int64_t stride, float weight, float* to) {
  constexpr int TOGETHER = 8;
  float total = 0.f;
  for (int first = 0; first < count; first += TOGETHER) {
    float some[TOGETHER];
    FE_UNROLL for (int i = 0; i < TOGETHER; ++i) some[i] = first + i < count ? load_shared_by_blocks(parts + (first + i) * stride) : 0.f;
    FE_UNROLL for (int i = 0; i < TOGETHER; ++i) total += some[i];
  }
  *to += weight * total;
}

// The sums of the tile's rows and of its columns to shared memory: [WARPS_ACROSS][TILE] of rows, then [WARPS_DOWN][TILE] of columns.
FE_DEVICE void reduce(const Product& squares, float* sums) {
  float* rows = sums + warp() % WARPS_ACROSS * TILE + warp_row() + lane() / 4;
  FE_UNROLL for (int i = 0; i < DOWN; ++i) FE_UNROLL for (int half = 0; half < 2; ++half) {
    float sum = 0.f;
    FE_UNROLL for (int j = 0; j < ACROSS; ++j) sum += squares[i][j][2 * half] + squares[i][j][2 * half + 1];
    FE_UNROLL for (int mask = 1; mask < 4; mask *= 2) sum += shuffle_xor(sum, mask);
    if (lane() % 4 == 0) rows[16 * i + 8 * half] = sum;
  }
  float* columns = sums + (WARPS_ACROSS + warp() / WARPS_ACROSS) * TILE + warp_column() + lane() * 2;
  FE_UNROLL for (int j = 0; j < ACROSS; ++j) FE_UNROLL for (int odd = 0; odd < 2; ++odd) {
    float sum = 0.f;
    FE_UNROLL for (int i = 0; i < DOWN; ++i) sum += squares[i][j][odd] + squares[i][j][2 + odd];
    FE_UNROLL for (int mask = 4; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
    if (lane() < 4) columns[8 * j + odd] = sum;
  }
}

// A block owns a tile of F, as in fisher_accumulate_, and one part of the samples. Of the tile only its sums leave the block; the last block
// of a row of tiles adds up the sums of its rows over all blocks there, and likewise for columns.
template <class T, Precision P, bool WIDE>
FE_KERNEL(THREADS, 1)
fisher_sums_kernel(FE_PARAMETER FisherSums p) {
  static_assert(THREADS == 2 * TILE);
  Product total = {};
  add_samples<T, P, false, WIDE>(p, place_of(p, block_x()), total);
  float* sums = reinterpret_cast<float*>(shared_memory());
  reduce(total, sums);
  sync_block();

  int block = block_x();
  opaque(block);  // its place is found anew, not kept: every register of the loop is taken
  const Place place = place_of(p, block);
  const int down = int(ceil_div(p.d_out, TILE)), across = int(ceil_div(p.d_in, TILE));
  const bool of_rows = thread() < TILE;  // half of the threads each
  const int own = thread() % TILE, group = of_rows ? place.row / TILE : down + place.column / TILE;
  const int part = (of_rows ? place.column : place.row) / TILE * p.splits + place.split;
  const int parts = (of_rows ? across : down) * p.splits;
  // Parts of all rows of tiles, then those of all columns of tiles.
  float* of_group =
      p.work + (of_rows ? int64_t(group) * parts : (int64_t(down) * across * p.splits + int64_t(group - down) * parts)) * TILE;
  float sum = 0.f;
  FE_UNROLL for (int i = 0; i < WARPS_ACROSS; ++i) {
    if (of_rows || i < WARPS_DOWN) sum += sums[((of_rows ? 0 : WARPS_ACROSS) + i) * TILE + own];
  }
  of_group[int64_t(part) * TILE + own] = sum;

  const Arrival arrivals[2] = {{p.counters + place.row / TILE, across * p.splits},
                               {p.counters + down + place.column / TILE, down * p.splits}};
  bool last[2];
  last_to_arrive(arrivals, last, reinterpret_cast<uint32_t*>(sums + (WARPS_ACROSS + WARPS_DOWN) * TILE));
  const int at = (of_rows ? place.row : place.column) + own;
  if (!(of_rows ? last[0] : last[1]) || at >= (of_rows ? p.d_out : p.d_in)) return;
  add_parts(of_group + own, parts, TILE, p.weight, of_rows ? p.rows + at * p.row : p.columns + at * p.column);
}

// ---- samples of one token

constexpr int WARPS = SINGLE_SUMS_WARPS;

// COUNT neighbouring numbers of a token, squared; zero past the last.
template <class T, bool WIDE, int COUNT>
FE_DEVICE void squares_of(const FisherTokens& tokens, int64_t token, int column, int width, float (&to)[COUNT]) {
  const T* from = static_cast<const T*>(tokens.data) + token * tokens.token + column * tokens.column;
  const bool inside = column < width;
  if constexpr (WIDE)
    unpack(inside ? load_words(from) : Words{}, to, T{});
  else
    to[0] = inside ? to_float(*from) : 0.f;
  FE_UNROLL for (int i = 0; i < COUNT; ++i) to[i] *= to[i];
}

// |x_m|^2 of all tokens, then |dy_m|^2: a warp for each.
template <class T, bool WIDE>
FE_KERNEL(WARPS * 32, 4)
fisher_norms_kernel(FE_PARAMETER FisherSums p) {
  constexpr int COUNT = WIDE ? Wide<T>::COUNT : 1;
  const int64_t index = int64_t(block_x()) * WARPS + warp();
  if (index >= 2 * p.tokens) return;
  const bool of_x = index < p.tokens;
  const FisherTokens& tokens = of_x ? p.x : p.dy;
  const int64_t token = of_x ? index : index - p.tokens;
  const int width = of_x ? p.d_in : p.d_out;
  float sum = 0.f;
  for (int column = lane() * COUNT; column < width; column += 32 * COUNT) {
    float squares[COUNT];
    squares_of<T, WIDE>(tokens, token, column, width, squares);
    FE_UNROLL for (int i = 0; i < COUNT; ++i) sum += squares[i];
  }
  FE_UNROLL for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (lane() == 0) p.work[index] = sum;
}

// A block owns some columns of x or dy and a chunk of the tokens; the last block of the same columns adds up the chunks.
template <class T, bool WIDE>
FE_KERNEL(WARPS * 32, 2)
fisher_single_sums_kernel(FE_PARAMETER FisherSums p) {
  constexpr int COUNT = WIDE ? Wide<T>::COUNT : 1, COLUMNS = 32 * COUNT;
  const int groups_of_x = int(ceil_div(p.d_in, COLUMNS)), group = block_x() / p.chunks, chunk = block_x() % p.chunks;
  const bool of_x = group < groups_of_x;
  const FisherTokens& tokens = of_x ? p.x : p.dy;
  const int width = of_x ? p.d_in : p.d_out, first = (of_x ? group : group - groups_of_x) * COLUMNS;
  const float* norms = p.work + (of_x ? p.tokens : 0);  // of the other side
  float* parts = p.work + 2 * p.tokens + int64_t(group) * p.chunks * COLUMNS;
  float* sums = reinterpret_cast<float*>(shared_memory());  // [WARPS][COLUMNS]

  float sum[COUNT] = {};
  for (int64_t token = part(p.tokens, chunk, p.chunks) + warp(); token < part(p.tokens, chunk + 1, p.chunks); token += WARPS) {
    float squares[COUNT];
    squares_of<T, WIDE>(tokens, token, first + lane() * COUNT, width, squares);
    const float norm = norms[token];
    FE_UNROLL for (int i = 0; i < COUNT; ++i) sum[i] += squares[i] * norm;
  }
  FE_UNROLL for (int i = 0; i < COUNT; ++i) sums[warp() * COLUMNS + lane() * COUNT + i] = sum[i];
  sync_block();
  const int own = thread();
  if (own < COLUMNS) {
    float total = 0.f;
    FE_UNROLL for (int w = 0; w < WARPS; ++w) total += sums[w * COLUMNS + own];
    parts[chunk * COLUMNS + own] = total;
  }
  const bool last = last_to_arrive(p.counters + group, p.chunks, reinterpret_cast<uint32_t*>(sums + WARPS * COLUMNS));
  if (!last || own >= COLUMNS || first + own >= width) return;
  const int64_t at = first + own;
  add_parts(parts + own, p.chunks, COLUMNS, p.weight, of_x ? p.columns + at * p.column : p.rows + at * p.row);
}

template <class T, Precision P>
cudaError_t launch_sums(const FisherSums& p, cudaStream_t stream) {
  const int64_t tiles = ceil_div(p.d_out, TILE) * ceil_div(p.d_in, TILE);
  const Launch how{dim3(unsigned(tiles * p.splits)), THREADS, Layout<T, P, false>::BYTES, stream};
  return p.wide ? launch(fisher_sums_kernel<T, P, true>, how, p) : launch(fisher_sums_kernel<T, P, false>, how, p);
}

template <class T, bool WIDE>
cudaError_t launch_single(const FisherSums& p, cudaStream_t stream) {
  constexpr int COLUMNS = 32 * (WIDE ? Wide<T>::COUNT : 1);
  const Launch of_norms{dim3(unsigned(ceil_div(2 * p.tokens, WARPS))), WARPS * 32, 0, stream};
  const cudaError_t status = launch(fisher_norms_kernel<T, WIDE>, of_norms, p);
  if (status != cudaSuccess) return status;
  const int64_t groups = ceil_div(p.d_in, COLUMNS) + ceil_div(p.d_out, COLUMNS);
  const Launch how{dim3(unsigned(groups * p.chunks)), WARPS * 32, sizeof(float) * (WARPS * COLUMNS + 1), stream};
  return launch(fisher_single_sums_kernel<T, WIDE>, how, p);
}

}  // namespace fisher

cudaError_t launch_fisher_sums(const FisherSums& p, cudaStream_t stream) {
  switch (p.dtype) {
    case Dtype::bf16:
      return fisher::launch_sums<bf16, Precision::bf16>(p, stream);
    case Dtype::f16:
      return fisher::launch_sums<f16, Precision::f16>(p, stream);
    default:
      return p.precision == Precision::tf32x3 ? fisher::launch_sums<float, Precision::tf32x3>(p, stream)
                                              : fisher::launch_sums<float, Precision::tf32>(p, stream);
  }
}

cudaError_t launch_single_sums(const FisherSums& p, cudaStream_t stream) {
  switch (p.dtype) {
    case Dtype::bf16:
      return p.wide ? fisher::launch_single<bf16, true>(p, stream) : fisher::launch_single<bf16, false>(p, stream);
    case Dtype::f16:
      return p.wide ? fisher::launch_single<f16, true>(p, stream) : fisher::launch_single<f16, false>(p, stream);
    default:
      return p.wide ? fisher::launch_single<float, true>(p, stream) : fisher::launch_single<float, false>(p, stream);
  }
}

}  // namespace fe::cuda
