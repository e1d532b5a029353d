// SPDX-License-Identifier: Apache-2.0
#include "fisher_accumulate.h"
#include "fisher_tiles.cuh"
#include "reduce.cuh"

namespace fe::cuda {
namespace fisher {

// ---- additions to F

// F += sums, a tile; neighbouring threads take neighbouring elements of F.
template <bool FLOATS>
FE_DEVICE void add(const FisherProducts& p, const float* sums, const Place& place) {
  constexpr int ROWS = THREADS / TILE, TOGETHER = 16;
  const Matrix& f = p.fisher;
  const int down = p.d_out - place.row, across = p.d_in - place.column;
  const bool by_rows = f.column <= f.row;
  const int64_t row = by_rows ? f.row : f.column, column = by_rows ? f.column : f.row;
  const int i = thread() / TILE, j = thread() % TILE;
  const int rows = j < (by_rows ? across : down) ? by_rows ? down : across : 0;
  const int64_t first = place.row * f.row + place.column * f.column + i * row + j * column;
  const float* own = sums + (by_rows ? i * FISHER_PITCH + j : j * FISHER_PITCH + i);
  const int pitch = by_rows ? FISHER_PITCH : 1;
  for (int k = 0; k < TILE; k += ROWS * TOGETHER) {
    float old[TOGETHER];
    FE_UNROLL for (int n = 0; n < TOGETHER; ++n) {
      const int64_t at = first + (k + n * ROWS) * row;
      if (i + k + n * ROWS >= rows) continue;
      old[n] = FLOATS ? load_shared_by_blocks(static_cast<const float*>(f.data) + at) : load_number(f.data, f.dtype, at);
    }
    FE_UNROLL for (int n = 0; n < TOGETHER; ++n) {
      if (i + k + n * ROWS >= rows) continue;
      store_number(f.data, FLOATS ? Dtype::f32 : f.dtype, first + (k + n * ROWS) * row, old[n] + own[(k + n * ROWS) * pitch]);
    }
  }
}

template <class T, Precision P, bool SINGLE, bool WIDE>
FE_KERNEL(THREADS, 1)
fisher_kernel(FE_PARAMETER FisherProducts p) {
  using L = Layout<T, P, SINGLE>;
  uint32_t* ticket = words_of_stages<L>() + FISHER_STAGES;
  if (p.splits > 1) draw_ticket(p.locks, uint32_t(blocks_x()), ticket);
  // Read anew where it is needed: every register of the loop is taken.
  const auto find_place = [&] { return place_of(p, p.splits > 1 ? int(*ticket) : block_x()); };
  Product total = {};
  add_samples<T, P, SINGLE, WIDE>(p, find_place(), total);

  float* sums = reinterpret_cast<float*>(shared_memory());  // where tiles were
  FE_UNROLL for (int i = 0; i < DOWN; ++i) FE_UNROLL for (int j = 0; j < ACROSS; ++j) FE_UNROLL for (int k = 0; k < 4; ++k) {
    const int m = warp_row() + 16 * i + 8 * (k / 2) + lane() / 4, n = warp_column() + 8 * j + lane() % 4 * 2 + k % 2;
    sums[m * FISHER_PITCH + n] = p.weight * total[i][j][k];
  }
  const Place place = find_place();
  uint32_t* lock = p.locks + 1 + place.tile;
  if (p.splits > 1) take_turn(lock, place.split);
  sync_block();
  p.fisher.dtype == Dtype::f32 ? add<true>(p, sums, place) : add<false>(p, sums, place);
  if (p.splits > 1) pass_turn(lock, place.split, p.splits);
}

constexpr int SQUARE_THREADS = 256, SQUARE_EACH = 4;  // accesses of a thread, all under way at once

// F whose rows are contiguous and may be read 16 bytes at a time.
template <class T>
FE_KERNEL(SQUARE_THREADS, 4)
fisher_square_kernel(FE_PARAMETER FisherSquare p) {
  constexpr int COUNT = Wide<T>::COUNT;
  const uint32_t in_row = uint32_t(p.d_in / COUNT), count = uint32_t(p.d_out) * in_row;
  const uint32_t first = uint32_t(block_x()) * (SQUARE_EACH * SQUARE_THREADS) + thread();
  Words old[SQUARE_EACH], g[SQUARE_EACH][COUNT / 4];
  FE_UNROLL for (int i = 0; i < SQUARE_EACH; ++i) {
    const uint32_t index = first + i * SQUARE_THREADS;
    if (index >= count) break;
    const int64_t m = index / in_row, n = int64_t(index % in_row) * COUNT;
    old[i] = load_words_once(static_cast<const T*>(p.fisher.data) + m * p.fisher.row + n);
    FE_UNROLL for (int j = 0; j < COUNT / 4; ++j) g[i][j] = load_words_once(p.gradient + m * p.d_in + n + 4 * j);
  }
  FE_UNROLL for (int i = 0; i < SQUARE_EACH; ++i) {
    const uint32_t index = first + i * SQUARE_THREADS;
    if (index >= count) break;
    const int64_t m = index / in_row, n = int64_t(index % in_row) * COUNT;
    float value[COUNT];
    unpack(old[i], value, T());
    FE_UNROLL for (int j = 0; j < COUNT; ++j) {
      const float gradient = float_of(g[i][j / 4].w[j % 4]);
      value[j] += p.weight * (gradient * gradient);
    }
    store_words(static_cast<T*>(p.fisher.data) + m * p.fisher.row + n, unit_of<T>(value));
  }
}

// F of any strides.
FE_KERNEL(SQUARE_THREADS, 4) fisher_square_elements_kernel(FE_PARAMETER FisherSquare p) {
  const int across = int(ceil_div(p.d_in, SQUARE_THREADS));
  const int64_t row = int64_t(block_x() / across) * SQUARE_EACH, n = int64_t(block_x() % across) * SQUARE_THREADS + thread();
  FE_UNROLL for (int i = 0; i < SQUARE_EACH; ++i) {
    if (row + i >= p.d_out || n >= p.d_in) return;
    const int64_t at = (row + i) * p.fisher.row + n * p.fisher.column;
    const float g = p.gradient[(row + i) * p.d_in + n];
    store_number(p.fisher.data, p.fisher.dtype, at, load_number(p.fisher.data, p.fisher.dtype, at) + p.weight * (g * g));
  }
}

template <class T, Precision P, bool SINGLE>
cudaError_t launch_products(const FisherProducts& p, cudaStream_t stream) {
  const int64_t tiles = ceil_div(p.d_out, TILE) * ceil_div(p.d_in, TILE);
  const Launch how{dim3(unsigned(tiles * p.splits)), THREADS, Layout<T, P, SINGLE>::BYTES, stream};
  return p.wide ? launch(fisher_kernel<T, P, SINGLE, true>, how, p) : launch(fisher_kernel<T, P, SINGLE, false>, how, p);
}

}  // namespace fisher

cudaError_t launch_fisher_samples(const FisherProducts& p, cudaStream_t stream) {
  switch (p.dtype) {
    case Dtype::bf16:
      return fisher::launch_products<bf16, Precision::bf16, false>(p, stream);
    case Dtype::f16:
      return fisher::launch_products<f16, Precision::f16, false>(p, stream);
    default:
      return p.precision == Precision::tf32x3 ? fisher::launch_products<float, Precision::tf32x3, false>(p, stream)
                                              : fisher::launch_products<float, Precision::tf32, false>(p, stream);
  }
}

cudaError_t launch_fisher_single_tokens(const FisherProducts& p, cudaStream_t stream) {
  switch (p.dtype) {  // squares of 16-bit numbers have up to 22 bits
    case Dtype::bf16:
      return fisher::launch_products<bf16, Precision::tf32x3, true>(p, stream);
    case Dtype::f16:
      return fisher::launch_products<f16, Precision::tf32x3, true>(p, stream);
    default:
      return p.precision == Precision::tf32x3 ? fisher::launch_products<float, Precision::tf32x3, true>(p, stream)
                                              : fisher::launch_products<float, Precision::tf32, true>(p, stream);
  }
}

cudaError_t launch_fisher_square(const FisherSquare& p, cudaStream_t stream) {
  using namespace fisher;
  const Matrix& f = p.fisher;
  const int64_t each = 16 / element_size(f.dtype), bytes = element_size(f.dtype) * f.row;
  const auto aligned = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; };
  if (f.column != 1 || p.d_in % each != 0 || bytes % 16 != 0 || !aligned(f.data) || !aligned(p.gradient)) {
    const int64_t blocks = ceil_div(p.d_out, SQUARE_EACH) * ceil_div(p.d_in, SQUARE_THREADS);
    return launch(fisher_square_elements_kernel, {dim3(unsigned(blocks)), SQUARE_THREADS, 0, stream}, p);
  }
  const Launch how{dim3(unsigned(ceil_div(p.d_out * (p.d_in / each), SQUARE_THREADS * SQUARE_EACH))), SQUARE_THREADS, 0, stream};
  switch (f.dtype) {
    case Dtype::f32:
      return launch(fisher_square_kernel<float>, how, p);
    case Dtype::bf16:
      return launch(fisher_square_kernel<bf16>, how, p);
    default:
      return launch(fisher_square_kernel<f16>, how, p);
  }
}

}  // namespace fe::cuda
