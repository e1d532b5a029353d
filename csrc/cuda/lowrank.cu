// SPDX-License-Identifier: Apache-2.0
// Around the walk: packing the factors of all adapters, expanding ranks to columns, and distributing the gradients.
#include <algorithm>

#include "lowrank.cuh"
#include "philox.cuh"
#include "reduce.cuh"

namespace fe::cuda {

// ---- adapters

FE_DEVICE float scale_at(const LowrankAdapter& e, int k) {
  return e.scale == nullptr ? e.factor : e.factor * load_number(e.scale, e.scale_dtype, e.one_scale ? 0 : k * e.scale_stride);
}

// The adapter that rank k of the call belongs to, or none of this launch.
FE_DEVICE const LowrankAdapter* adapter_of(const AdapterTable& table, int k) {
  for (int i = 0; i < table.count; ++i)
    if (uint32_t(k - table.adapters[i].first) < uint32_t(table.adapters[i].rank)) return &table.adapters[i];
  return nullptr;
}

// The row of an adapter's B that belongs to an output row, or -1.
FE_DEVICE int64_t owned_row(const AdapterTable& table, const LowrankAdapter& e, int64_t row) {
  for (int i = e.first_range; i < e.first_range + e.ranges; ++i) {
    const RowRange& range = table.ranges[i];
    if (row >= range.start && row < range.stop) return row - range.start + range.offset;
  }
  return -1;
}

// a[k, n], or b[n, k]; zero in the padding.
FE_DEVICE float packed_number(const AdapterTable& table, bool of_a, int k, int64_t n, int64_t columns) {
  const LowrankAdapter* e = n < columns ? adapter_of(table, k) : nullptr;
  if (e == nullptr) return 0.f;
  const int r = k - e->first;
  if (of_a) return load_number(e->a.data, e->a.dtype, r * e->a.row + n * e->a.column);
  const int64_t row = owned_row(table, *e, n);
  return row < 0 ? 0.f : load_number(e->b.data, e->b.dtype, row * e->b.row + r * e->b.column) * scale_at(*e, r);
}

// ---- pack

constexpr int PACK_THREADS = 256;

// A thread writes one unit of the factor of the walk, then one of the factor of the expansion.
template <class T>
FE_KERNEL(PACK_THREADS, 2)
pack_kernel(FE_PARAMETER PackParams p) {
  constexpr int COUNT = Wide<T>::COUNT;
  int64_t unit = int64_t(block_x()) * PACK_THREADS + thread();
  if (unit == 0 && p.counter != nullptr) *p.counter = 0;
  float v[COUNT];
  const int64_t across = p.walk_pitch / COUNT;
  if (p.walk != nullptr) {
    const int k = int(unit / across);
    if (k >= p.table.first && k < p.table.last) {
      const int64_t n = unit % across * COUNT;
      for (int i = 0; i < COUNT; ++i)
        v[i] = n + i < p.walk_columns ? packed_number(p.table, p.walk_a, k, p.walk_first + n + i, p.walk_first + p.walk_columns) : 0.f;
      store_words(static_cast<T*>(p.walk) + unit * COUNT, unit_of<T>(v));
    }
    unit -= across * p.ranks;
  }
  if (p.expand == nullptr || unit < 0 || unit * COUNT >= p.expand_pitch * p.ranks) return;
  const int at = int(unit % 32), half = int(unit / 32 % 2), steps = p.ranks / 16;
  const int first = int(unit / 64 % steps) * 16;
  const int64_t n = unit / 64 / steps * ExpandUnit<T>::COLUMNS;
  T* to = static_cast<T*>(p.expand) + unit * COUNT;
  for (int i = 0; i < COUNT; ++i) {
    const int k = first + inner_index(at % 4, i % 4);
    const int64_t column = n + ExpandUnit<T>::column(ExpandUnit<T>::fragment(half, i), at / 4);
    v[i] = packed_number(p.table, !p.walk_a, k, column, p.expand_columns);
    if (k >= p.table.first && k < p.table.last) to[i] = from_float<T>(v[i]);
  }
}

cudaError_t launch_lowrank_pack(const PackParams& p, cudaStream_t stream) {
  const int64_t numbers = ((p.walk ? p.walk_pitch : 0) + (p.expand ? p.expand_pitch : 0)) * p.ranks;
  const int64_t blocks = std::max<int64_t>(1, ceil_div(numbers * element_size(p.dtype) / 16, PACK_THREADS));  // the counter needs one
  const Launch how{dim3(unsigned(blocks)), PACK_THREADS, 0, stream};
  switch (p.dtype) {
    case Dtype::f32:
      return launch(pack_kernel<float>, how, p);
    case Dtype::bf16:
      return launch(pack_kernel<bf16>, how, p);
    default:
      return launch(pack_kernel<f16>, how, p);
  }
}

// ---- expand

constexpr int EXPAND_WARPS = 8, EXPAND_THREADS = 32 * EXPAND_WARPS;
constexpr int EXPAND_ROWS = 32, EXPAND_TILES = EXPAND_ROWS / 16;
constexpr int EXPAND_RANKS = 256;  // held in shared memory at a time

template <Precision P>
struct Expand {
  using T = Number<P>;
  using Unit = ExpandUnit<T>;
  static constexpr int COUNT = Unit::COUNT, FRAGMENTS = COUNT / 2;

  const ExpandParams& p;
  const int g = lane() / 4, t = lane() % 4;
  const int64_t row = int64_t(block_x()) * EXPAND_ROWS;
  uint32_t* const c_words = reinterpret_cast<uint32_t*>(shared_memory());
  const Philox philox = Philox::of(p.dropout);
  float sum[EXPAND_TILES][FRAGMENTS][4];

  FE_DEVICE explicit Expand(const ExpandParams& params) : p(params) {}

  // Ranks [first, first + ranks) of c for the block's rows, as A fragments; blocks of the first columns write c for others to read.
  FE_DEVICE void gather(int first, int ranks, bool write) {
    const int steps = ranks / 16;
    for (int pair = thread(); pair < EXPAND_ROWS * ranks / 2; pair += EXPAND_THREADS) {
      const int quarter = pair % 4, at = pair / 4 % 32, step = pair / 128 % steps, tile = pair / 128 / steps;
      const int64_t m = row + 16 * tile + quarter / 2 * 8 + at / 4;
      const int k = first + 16 * step + inner_index(at % 4, quarter % 2 * 2);
      float v[2] = {0.f, 0.f};
      if (m < p.rows) {
        const float* from = p.u + m * p.ranks + k;
        for (int64_t part = 0; part < p.parts; ++part) {
          v[0] += from[part * p.rows * p.ranks];
          v[1] += from[part * p.rows * p.ranks + 1];
        }
        for (int i = 0; write && i < 2; ++i) {
          if (p.z != nullptr && k + i < p.rank) p.z[m * p.rank + k + i] = v[i];
          if (p.u_t != nullptr) static_cast<T*>(p.u_t)[m * p.ranks + k + i] = from_float<T>(v[i]);
        }
      }
      to_words<T>(v, c_words + pair * (FOUR<P> / 2));
    }
  }

  FE_DEVICE void multiply(int64_t group, int first, int ranks) {
    const int steps = ranks / 16;
    const T* f = static_cast<const T*>(p.f) + ((group * (p.ranks / 16) + first / 16) * 64 + lane()) * COUNT;
    for (int step = 0; step < steps; ++step) {
      FragmentB<P> b[FRAGMENTS];
      FE_UNROLL for (int half = 0; half < 2; ++half) {
        const Words unit = load_words(f + (step * 2 + half) * 32 * COUNT);
        FE_UNROLL for (int j = 0; j < FRAGMENTS / 2; ++j) b[half * (FRAGMENTS / 2) + j] = fragment_of<P, 4>(unit.w + j * FOUR<P>);
      }
      FE_UNROLL for (int tile = 0; tile < EXPAND_TILES; ++tile) {
        const FragmentA<P> a = fragment_of<P, 8>(c_words + ((tile * steps + step) * 32 + lane()) * 2 * FOUR<P>);
        FE_UNROLL for (int j = 0; j < FRAGMENTS; ++j) mma(sum[tile][j], a, b[j]);
      }
    }
  }

  FE_DEVICE void write(int64_t group) {
    const int64_t n = group * Unit::COLUMNS + COUNT * t;
    float bias[COUNT];
    FE_UNROLL for (int i = 0; i < COUNT; ++i) bias[i] =
        p.bias != nullptr && n + i < p.columns ? load_number(p.bias, p.bias_dtype, n + i) : 0.f;
    FE_UNROLL for (int tile = 0; tile < EXPAND_TILES; ++tile) FE_UNROLL for (int half = 0; half < 2; ++half) {
      const int64_t m = row + 16 * tile + 8 * half + g;
      float v[COUNT];
      FE_UNROLL for (int i = 0; i < COUNT; ++i) v[i] = sum[tile][i / 2][2 * half + i % 2];
      if (p.dropout.seed != nullptr) drop(m, n, v);
      FE_UNROLL for (int i = 0; i < COUNT; ++i) v[i] += bias[i];
      if (m < p.rows) store(static_cast<T*>(p.y) + m * p.columns, n, v);
    }
  }
  FE_DEVICE void drop(int64_t m, int64_t n, float (&v)[COUNT]) const {
    FE_UNROLL for (int first = 0; first < COUNT; first += 4) {
      bool kept[4];
      philox.keep(m, n + first, kept);
      FE_UNROLL for (int i = 0; i < 4; ++i) v[first + i] = kept[i] ? v[first + i] * p.dropout.inverse : 0.f;
    }
  }
  FE_DEVICE void store(T* y, int64_t n, const float (&v)[COUNT]) const {
    if (p.columns % COUNT == 0) {
      if (n < p.columns) store_words(y + n, unit_of<T>(v));
      return;
    }
    FE_UNROLL for (int i = 0; i < COUNT; ++i) if (n + i < p.columns) y[n + i] = from_float<T>(v[i]);
  }

  FE_DEVICE void run() {
    const int64_t begin = block_y() * p.split, end = min(p.columns, begin + p.split);
    const int64_t groups = p.y == nullptr ? 1 : (end - begin + Unit::COLUMNS - 1) / Unit::COLUMNS;
    // All warps take as many turns: they wait for each other where ranks come in several parts.
    for (int64_t turn = 0; turn < groups; turn += EXPAND_WARPS) {
      const int64_t group = begin / Unit::COLUMNS + turn + warp();
      FE_UNROLL for (int tile = 0; tile < EXPAND_TILES; ++tile) FE_UNROLL for (int j = 0; j < FRAGMENTS; ++j)
          FE_UNROLL for (int i = 0; i < 4; ++i) sum[tile][j][i] = 0.f;
      const bool work = p.y != nullptr && turn + warp() < groups;
      for (int first = 0; first < p.ranks; first += EXPAND_RANKS) {
        const int ranks = min(EXPAND_RANKS, p.ranks - first);
        if (turn == 0 || p.ranks > EXPAND_RANKS) {
          sync_block();
          gather(first, ranks, block_y() == 0 && turn == 0);
          sync_block();
        }
        if (work) multiply(group, first, ranks);
      }
      if (work) write(group);
    }
  }
};

// Block (i, j) owns 32 rows and `split` columns.
template <Precision P>
FE_KERNEL(EXPAND_THREADS, 2)
expand_kernel(FE_PARAMETER ExpandParams p) {
  Expand<P>(p).run();
}

template <Precision P>
cudaError_t launch_expand(const ExpandParams& p, cudaStream_t stream) {
  const size_t shared = EXPAND_ROWS * size_t(std::min(p.ranks, EXPAND_RANKS)) * sizeof(Number<P>);
  const dim3 grid(unsigned(ceil_div(p.rows, EXPAND_ROWS)), unsigned(p.y ? ceil_div(p.columns, p.split) : 1));
  return launch(expand_kernel<P>, {grid, EXPAND_THREADS, shared, stream}, p);
}

cudaError_t launch_lowrank_expand(const ExpandParams& p, cudaStream_t stream) {
  switch (p.precision) {
    case Precision::tf32x3:
      return launch_expand<Precision::tf32x3>(p, stream);
    case Precision::tf32:
      return launch_expand<Precision::tf32>(p, stream);
    case Precision::bf16:
      return launch_expand<Precision::bf16>(p, stream);
    default:
      return launch_expand<Precision::f16>(p, stream);
  }
}

// ---- finish

constexpr int FINISH_WARPS = 8, FINISH_THREADS = 32 * FINISH_WARPS;
static_assert(FINISH_SLAB == 32 * 4);

// FINISH_SLAB totals from `first` on, number i in thread i; each warp adds every eighth part. All threads call it.
FE_DEVICE float slab_total(const Parts& parts, int64_t first, float* scratch) {
  float sum[4] = {};
  const int64_t at = first + 4 * lane();
  if (at < parts.length)
    for (int64_t part = warp(); part < parts.count; part += FINISH_WARPS) {
      float v[4];
      unpack(load_words(parts.data + part * parts.stride + at), v, float());
      FE_UNROLL for (int i = 0; i < 4; ++i) sum[i] += v[i];
    }
  store_words(scratch + warp() * FINISH_SLAB + 4 * lane(), unit_of<float>(sum));
  sync_block();
  float total = 0.f;
  if (thread() < FINISH_SLAB) FE_UNROLL for (int w = 0; w < FINISH_WARPS; ++w) total += scratch[w * FINISH_SLAB + thread()];
  sync_block();
  return total;
}

FE_DEVICE void deal_a(const FinishParams& p, int64_t at, float total) {
  const int k = int(at % p.ranks);
  const int64_t n = at / p.ranks, d_in = p.a.length / p.ranks;
  const LowrankAdapter* e = at < p.a.length ? adapter_of(p.table, k) : nullptr;
  if (e != nullptr && e->da != nullptr) store_number(e->da, e->a.dtype, (k - e->first) * d_in + n, total * p.inverse);
}

// Returns the term of the gradient of the scale.
FE_DEVICE float deal_b(const FinishParams& p, int64_t at, float total) {
  const int k = int(at % p.ranks);
  const LowrankAdapter* e = at < p.b.length ? adapter_of(p.table, k) : nullptr;
  const int64_t row = e == nullptr ? -1 : owned_row(p.table, *e, p.first_row + at / p.ranks);
  if (row < 0) return 0.f;
  const int r = k - e->first;
  if (e->db != nullptr) store_number(e->db, e->b.dtype, row * e->rank + r, total * scale_at(*e, r));
  return e->ds == nullptr ? 0.f : e->factor * total * load_number(e->b.data, e->b.dtype, row * e->b.row + r * e->b.column);
}

// The slab's terms of every rank to their place in p.dots.
FE_DEVICE void keep_dots(const FinishParams& p, int64_t first, float term, float* scratch) {
  if (thread() < FINISH_SLAB) scratch[thread()] = term;
  sync_block();
  const int width = min(p.ranks, FINISH_SLAB);
  if (thread() < width && first < p.b.length) {
    float total = 0.f;
    for (int i = thread(); i < FINISH_SLAB; i += width) total += scratch[i];
    p.dots[(p.ranks < FINISH_SLAB ? first / FINISH_SLAB * p.ranks : first) + thread()] = total;
  }
  sync_block();
}

// ds of all adapters by one block, in the order of groups.
FE_DEVICE void deal_scales(const FinishParams& p, int64_t groups) {
  float* totals = reinterpret_cast<float*>(shared_memory());
  for (int k = p.table.first + warp(); k < p.table.last; k += FINISH_WARPS) {
    float total = 0.f;
    for (int64_t i = lane(); i < groups; i += 32) total += load_shared_by_blocks(p.dots + i * p.ranks + k);
    FE_UNROLL for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
    if (lane() == 0) totals[k - p.table.first] = total;
  }
  sync_block();
  for (int i = warp(); i < p.table.count; i += FINISH_WARPS) {
    const LowrankAdapter& e = p.table.adapters[i];
    if (e.ds == nullptr) continue;
    const float* own = totals + (e.first - p.table.first);
    if (!e.one_scale) {
      for (int r = lane(); r < e.rank; r += 32) store_number(e.ds, e.scale_dtype, r, own[r]);
    } else if (lane() == 0) {
      float total = 0.f;
      for (int r = 0; r < e.rank; ++r) total += own[r];
      store_number(e.ds, e.scale_dtype, 0, total);
    }
  }
}

// A block per slab of a, then of b, then of the bias; the last of those of b to arrive computes the gradients of scales.
FE_KERNEL(FINISH_THREADS, 2) finish_kernel(FE_PARAMETER FinishParams p) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const int64_t of_a = (p.a.length + FINISH_SLAB - 1) / FINISH_SLAB, of_b = (p.b.length + FINISH_SLAB - 1) / FINISH_SLAB;
  const int64_t block = block_x();
  if (block < of_a) {
    const float total = slab_total(p.a, block * FINISH_SLAB, scratch);
    if (thread() < FINISH_SLAB) deal_a(p, block * FINISH_SLAB + thread(), total);
  } else if (block < of_a + of_b) {
    const int64_t first = (block - of_a) * FINISH_SLAB;
    const float total = slab_total(p.b, first, scratch);
    const float term = thread() < FINISH_SLAB ? deal_b(p, first + thread(), total) : 0.f;
    if (p.dots == nullptr) return;
    keep_dots(p, first, term, scratch);
    const int64_t groups = p.ranks < FINISH_SLAB ? of_b : p.b.length / p.ranks;
    if (last_to_arrive(p.counter, uint32_t(of_b), reinterpret_cast<uint32_t*>(scratch))) deal_scales(p, groups);
  } else {
    const int64_t first = (block - of_a - of_b) * FINISH_SLAB;
    const float total = slab_total(p.bias, first, scratch);
    if (thread() < FINISH_SLAB && first + thread() < p.columns) store_number(p.dbias, p.bias_dtype, first + thread(), total);
  }
}

cudaError_t launch_lowrank_finish(const FinishParams& p, cudaStream_t stream) {
  int64_t blocks = 0;
  for (const Parts* parts : {&p.a, &p.b, &p.bias}) blocks += ceil_div(parts->length, FINISH_SLAB);
  const size_t shared = sizeof(float) * std::max<size_t>(FINISH_WARPS * FINISH_SLAB, p.dots ? p.table.last - p.table.first : 0);
  return launch(finish_kernel, {dim3(unsigned(blocks)), FINISH_THREADS, shared, stream}, p);
}

}  // namespace fe::cuda
