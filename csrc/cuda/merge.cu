// SPDX-License-Identifier: Apache-2.0
#include "device.cuh"
#include "merge.h"

namespace fe::cuda {

constexpr int MERGE_THREADS = 256, MERGE_WARPS = MERGE_THREADS / 32;
constexpr int MERGE_ROWS = 4;  // of a warp's part of a tile: each number of A is used for so many rows
constexpr int MERGE_TILE_ROWS = MERGE_WARPS * MERGE_ROWS;
constexpr int MERGE_RANKS = 16;  // held in shared memory at a time
constexpr int RANK_STEP = 4;     // numbers of B per access

constexpr int tile_columns(Dtype dtype) {  // 16 bytes a lane
  return 32 * (16 / int(element_size(dtype)));
}

// Ranks [first, first + MERGE_RANKS) of A's columns of the tile; a thread reads one column, all of its numbers at once.
template <class T, int COLUMNS>
FE_DEVICE void stage_a(const MergeEntry& e, int64_t column, int64_t first, float* a) {
  constexpr int STEP = MERGE_THREADS / COLUMNS;
  const int n = thread() % COLUMNS, begin = thread() / COLUMNS;
  const int64_t step = STEP * e.a.row;
  const T* from = static_cast<const T*>(e.a.data) + (first + begin) * e.a.row + (column + n) * e.a.column;
  const int ranks = column + n < e.columns ? int(e.rank - first < MERGE_RANKS ? e.rank - first : MERGE_RANKS) : 0;
  FE_UNROLL for (int k = 0; k < MERGE_RANKS; k += STEP, from += step) {
    a[(begin + k) * COLUMNS + n] = begin + k < ranks ? to_float(*from) : 0.f;
  }
}

// The same, and of B's rows of the tile, times the scale; zero outside.
template <int COLUMNS>
FE_DEVICE void stage_factors(const MergeEntry& e, int64_t row, int64_t column, int64_t first, float* a, float* b) {
  switch (e.a.dtype) {
    case Dtype::f32:
      stage_a<float, COLUMNS>(e, column, first, a);
      break;
    case Dtype::bf16:
      stage_a<bf16, COLUMNS>(e, column, first, a);
      break;
    default:
      stage_a<f16, COLUMNS>(e, column, first, a);
  }
  for (int i = thread(); i < MERGE_RANKS * MERGE_TILE_ROWS; i += MERGE_THREADS) {
    const int64_t k = first + i % MERGE_RANKS, m = row + i / MERGE_RANKS;
    float value = 0.f;
    if (k < e.rank && m < e.rows) {
      value = e.factor * load_number(e.b.data, e.b.dtype, m * e.b.row + k * e.b.column);
      if (e.scale != nullptr) value *= load_number(e.scale, e.scale_dtype, k * e.scale_stride);
    }
    b[i] = value;
  }
}

// One tile of W: the products are summed in fp32, rank after rank; W is added to the sum, which is rounded once. With WIDE a lane owns
// neighbouring columns, 16 bytes of each row; otherwise every 32nd column.
template <class T, bool WIDE>
FE_DEVICE void merge_tile(const MergeEntry& e, int64_t tile) {
  constexpr int COUNT = Wide<T>::COUNT, COLUMNS = 32 * COUNT;
  float* a = reinterpret_cast<float*>(shared_memory());
  float* b = a + MERGE_RANKS * COLUMNS;
  const int64_t across = ceil_div(e.columns, COLUMNS);
  const int64_t row = tile / across * MERGE_TILE_ROWS, column = tile % across * COLUMNS;
  const int64_t first_row = row + warp() * MERGE_ROWS;
  const int64_t left = e.columns - column - lane() * COUNT;  // columns from this lane's first on
  T* w = static_cast<T*>(e.w.data) + column * e.w.column;

  // W is on its way while the factors are staged and multiplied.
  Words old[MERGE_ROWS];
  if (WIDE && left >= COUNT) {
    FE_UNROLL for (int m = 0; m < MERGE_ROWS; ++m) if (first_row + m < e.rows) old[m] =
        load_words_once(w + (first_row + m) * e.w.row + lane() * COUNT);
  }

  float sum[MERGE_ROWS][COUNT] = {};
  for (int64_t first = 0; first < e.rank; first += MERGE_RANKS) {
    sync_block();
    stage_factors<COLUMNS>(e, row, column, first, a, b);
    sync_block();
    const int steps = int(e.rank - first < MERGE_RANKS ? ceil_div(e.rank - first, RANK_STEP) : MERGE_RANKS / RANK_STEP);
    for (int step = 0; step < steps; ++step) {
      Words factors[MERGE_ROWS];
      FE_UNROLL for (int m = 0; m < MERGE_ROWS; ++m) factors[m] =
          *reinterpret_cast<const Words*>(b + (warp() * MERGE_ROWS + m) * MERGE_RANKS + step * RANK_STEP);
      FE_UNROLL for (int k = 0; k < RANK_STEP; ++k) {
        const float* from = a + (step * RANK_STEP + k) * COLUMNS;
        FE_UNROLL for (int j = 0; j < COUNT; j += 4) {
          float part[4];
          if constexpr (WIDE) {
            unpack(*reinterpret_cast<const Words*>(from + lane() * COUNT + j), part, float());
          } else {
            FE_UNROLL for (int i = 0; i < 4; ++i) part[i] = from[lane() + 32 * (j + i)];
          }
          FE_UNROLL for (int m = 0; m < MERGE_ROWS; ++m) FE_UNROLL for (int i = 0; i < 4; ++i) sum[m][j + i] +=
              float_of(factors[m].w[k]) * part[i];
        }
      }
    }
  }

  FE_UNROLL for (int m = 0; m < MERGE_ROWS; ++m) {
    if (first_row + m >= e.rows) continue;
    T* to = w + (first_row + m) * e.w.row;
    if (WIDE && left >= COUNT) {
      float before[COUNT];
      unpack(old[m], before, T());
      FE_UNROLL for (int j = 0; j < COUNT; ++j) sum[m][j] += before[j];
      store_words(to + lane() * COUNT, unit_of<T>(sum[m]));
      continue;
    }
    FE_UNROLL for (int j = 0; j < COUNT; ++j) {
      const int at = WIDE ? lane() * COUNT + j : lane() + 32 * j;
      if (column + at < e.columns) {
        T* place = to + at * e.w.column;
        *place = from_float<T>(sum[m][j] + to_float(*place));
      }
    }
  }
}

template <class T>
FE_DEVICE void merge_tile_of(const MergeEntry& e, int64_t tile) {
  // Rows of 16-byte units: every row starts at one.
  const bool wide = e.w.column == 1 && reinterpret_cast<uintptr_t>(e.w.data) % 16 == 0 && e.w.row * int64_t(sizeof(T)) % 16 == 0;
  wide ? merge_tile<T, true>(e, tile) : merge_tile<T, false>(e, tile);
}

// Block t owns one tile of one W; tiles are numbered through all entries.
FE_KERNEL(MERGE_THREADS, 2) merge_kernel(FE_PARAMETER MergeParams p) {
  int i = 0;
  while (i + 1 < p.count && p.entries[i + 1].first_tile <= block_x()) ++i;
  const MergeEntry& e = p.entries[i];
  const int64_t tile = block_x() - e.first_tile;
  switch (e.w.dtype) {
    case Dtype::f32:
      return merge_tile_of<float>(e, tile);
    case Dtype::bf16:
      return merge_tile_of<bf16>(e, tile);
    default:
      return merge_tile_of<f16>(e, tile);
  }
}

constexpr int THRESHOLD_THREADS = 256, THRESHOLD_EACH = 4;

// In fp32, rounded once; NaN stays NaN. Blocks are numbered through all entries.
FE_KERNEL(THRESHOLD_THREADS, 4) soft_threshold_kernel(FE_PARAMETER ThresholdParams p) {
  int i = 0;
  while (i + 1 < p.count && p.entries[i + 1].first_block <= block_x()) ++i;
  const ThresholdEntry& e = p.entries[i];
  const int64_t first = int64_t(block_x() - e.first_block) * (THRESHOLD_THREADS * THRESHOLD_EACH) + thread();
  FE_UNROLL for (int step = 0; step < THRESHOLD_EACH; ++step) {
    const int64_t at = first + step * THRESHOLD_THREADS;
    if (at >= e.size) return;
    const float s = load_number(e.data, e.dtype, at * e.stride);
    const float zero_or_nan = s == s ? 0.f : s;
    store_number(e.data, e.dtype, at * e.stride, s > p.kappa ? s - p.kappa : s < -p.kappa ? s + p.kappa : zero_or_nan);
  }
}

size_t merge_shared_bytes() {
  return sizeof(float) * MERGE_RANKS * (tile_columns(Dtype::bf16) + MERGE_TILE_ROWS);
}

cudaError_t launch_merge(MergeParams params, cudaStream_t stream) {
  int64_t tiles = 0;
  for (int i = 0; i < params.count; ++i) {
    MergeEntry& e = params.entries[i];
    e.first_tile = tiles;
    tiles += ceil_div(e.rows, MERGE_TILE_ROWS) * ceil_div(e.columns, tile_columns(e.w.dtype));
  }
  return launch(merge_kernel, {dim3(unsigned(tiles)), MERGE_THREADS, merge_shared_bytes(), stream}, params);
}

cudaError_t launch_soft_threshold(ThresholdParams params, cudaStream_t stream) {
  int64_t blocks = 0;
  for (int i = 0; i < params.count; ++i) {
    params.entries[i].first_block = int32_t(blocks);
    blocks += ceil_div(params.entries[i].size, THRESHOLD_THREADS * THRESHOLD_EACH);
  }
  return launch(soft_threshold_kernel, {dim3(unsigned(blocks)), THRESHOLD_THREADS, 0, stream}, params);
}

}  // namespace fe::cuda
