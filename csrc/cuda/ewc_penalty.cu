// EWC penalty: loss, dA, dB and ds from one read of F (docs/mathematics.md, section 2).
//   D = (B s) A;  H = F * D;  loss = lambda/2 sum H * D;  dB = lambda (H A^T) s;  dA = lambda (B s)^T H;  ds = lambda sum_i B (H A^T)
//
// A block walks down a region of rows in strips; each of its warps owns 32 columns. D of a strip comes out of the matrix units in the very
// layout in which H enters them for H A^T, so H goes to shared memory (bf16: through a transposing instruction) only for (B s)^T H. dA of the
// warp's columns stays in its registers; H A^T of a strip is added over the warps. What is complete only when other blocks are done goes to
// the workspace, and the last of them adds it up in a fixed order.
#include "ewc_penalty.h"
#include "fragments.cuh"
#include "reduce.cuh"

namespace fe::cuda {
namespace {

constexpr int ROWS = PENALTY_ROWS;
constexpr int TILES = PENALTY_COLUMNS / 8;  // of eight columns
constexpr int COLUMN_STEPS = PENALTY_COLUMNS / 16;

// The four inner indices of a lane's fragments, see fragments.cuh.
FE_DEVICE int slot(int i) {
  return 2 * (lane() % 4) + i % 2 + i / 2 * 8;
}

// Where column c of tile `tile` lies among the warp's columns: with accesses of V numbers, a lane's numbers of V / 2 tiles are neighbours.
template <int V>
FE_DEVICE int place(int tile, int c) {
  return tile / (V / 2) * 4 * V + c / 2 * V + tile % (V / 2) * 2 + c % 2;
}

// One strip of the warp's columns of F: f[tile] in the layout of C fragments.
template <FisherLoads L>
struct FisherStrip;

template <class T>
struct WideStrip {
  static constexpr int V = 16 / sizeof(T), GROUPS = PENALTY_COLUMNS / (4 * V);
  Words raw[2][GROUPS];

  FE_DEVICE void load(const PenaltyAdapter& p, int row, int stop, int column) {
    FE_UNROLL for (int half = 0; half < 2; ++half) {
      const int i = row + lane() / 4 + 8 * half;
      const T* line = static_cast<const T*>(p.fisher) + i * p.fisher_row;
      FE_UNROLL for (int group = 0; group < GROUPS; ++group) {
        const int j = column + group * 4 * V + lane() % 4 * V;
        raw[half][group] = i < stop && j < p.d_in ? load_words_once(line + j) : Words{};
      }
    }
  }
  FE_DEVICE void get(float (&f)[TILES][4]) const {
    FE_UNROLL for (int half = 0; half < 2; ++half) {
      FE_UNROLL for (int group = 0; group < GROUPS; ++group) {
        float v[V];
        unpack(raw[half][group], v, T{});
        FE_UNROLL for (int i = 0; i < V; ++i) f[group * (V / 2) + i / 2][2 * half + i % 2] = v[i];
      }
    }
  }
};
template <>
struct FisherStrip<FisherLoads::f32> : WideStrip<float> {};
template <>
struct FisherStrip<FisherLoads::bf16> : WideStrip<bf16> {};
template <>
struct FisherStrip<FisherLoads::elements> {
  static constexpr int V = 2;
  float value[TILES][4];

  FE_DEVICE void load(const PenaltyAdapter& p, int row, int stop, int column) {
    FE_UNROLL for (int tile = 0; tile < TILES; ++tile) {
      FE_UNROLL for (int i = 0; i < 4; ++i) {
        const int m = row + lane() / 4 + i / 2 * 8, n = column + tile * 8 + lane() % 4 * 2 + i % 2;
        const bool inside = m < stop && n < p.d_in;
        value[tile][i] = inside ? load_number(p.fisher, p.fisher_dtype, m * p.fisher_row + n * p.fisher_column) : 0.f;
      }
    }
  }
  FE_DEVICE void get(float (&f)[TILES][4]) const {
    FE_UNROLL for (int tile = 0; tile < TILES; ++tile) {
      FE_UNROLL for (int i = 0; i < 4; ++i) f[tile][i] = value[tile][i];
    }
  }
};

FE_DEVICE float scale_at(const PenaltyAdapter& p, int k) {
  return p.scale == nullptr ? p.factor : p.factor * load_number(p.scale, p.scale_dtype, k * p.scale_stride);
}
FE_DEVICE float a_at(const PenaltyAdapter& p, int k, int j) {
  return k < p.rank && j < p.d_in ? load_number(p.lora_a, p.a_dtype, k * p.a_row + j * p.a_column) : 0.f;
}
FE_DEVICE float b_at(const PenaltyAdapter& p, int i, int k, int stop) {
  return k < p.rank && i < stop ? load_number(p.lora_b, p.b_dtype, i * p.b_row + k * p.b_column) : 0.f;
}

// A of the warp's columns as B fragments of both products: in registers for 16 ranks, else in shared memory.
template <Precision P, int RP, int V>
struct Factor {
  static constexpr bool HELD = RP <= 16;
  using Layout = PenaltyLayout<RP>;
  float inner[HELD ? TILES : 1][4], outer[HELD ? COLUMN_STEPS : 1][HELD ? RP / 8 : 1][4];
  const float* tile;  // [RP][LDA], the warp's columns in the order of fragments

  FE_DEVICE void load(const PenaltyAdapter& p, int first_rank, int column, float* shared) {
    if constexpr (HELD) {
      FE_UNROLL for (int i = 0; i < 4; ++i) {
        FE_UNROLL for (int n = 0; n < TILES; ++n) inner[n][i] = a_at(p, slot(i), column + place<V>(n, lane() / 4));
        FE_UNROLL for (int step = 0; step < COLUMN_STEPS; ++step) {
          FE_UNROLL for (int n = 0; n < RP / 8; ++n) {
            outer[step][n][i] = a_at(p, n * 8 + lane() / 4, column + place<V>(step * 2 + i / 2, lane() % 4 * 2 + i % 2));
          }
        }
      }
    } else {
      float* to = shared + warp() * PENALTY_COLUMNS + lane();
      for (int k = 0; k < RP; ++k) to[k * Layout::LDA] = a_at(p, first_rank + k, column + place<V>(lane() / 8, lane() % 8));
      sync_warp();
      tile = shared + warp() * PENALTY_COLUMNS;
    }
  }
  // Ranks [16 step, 16 step + 16) by the columns of tile n.
  FE_DEVICE FragmentB<P> of_ranks(int step, int n) const {
    if constexpr (HELD) return FragmentB<P>::of(inner[n]);
    float v[4];
    FE_UNROLL for (int i = 0; i < 4; ++i) v[i] = tile[(16 * step + slot(i)) * Layout::LDA + 8 * n + lane() / 4];
    return FragmentB<P>::of(v);
  }
  // Columns [16 step, 16 step + 16) by ranks [8 n, 8 n + 8).
  FE_DEVICE FragmentB<P> of_columns(int step, int n) const {
    if constexpr (HELD) return FragmentB<P>::of(outer[step][n]);
    float v[4];
    FE_UNROLL for (int i = 0; i < 4; ++i) v[i] = tile[(8 * n + lane() / 4) * Layout::LDA + 16 * step + slot(i)];
    return FragmentB<P>::of(v);
  }
};

// The B fragment whose inner indices are the strip's rows, of a C fragment: transposed on its way.
template <Precision P>
FE_DEVICE FragmentB<P> transposed(const float (&c)[4], float* tile, int ld) {
  if constexpr (P == Precision::bf16) {
    FragmentB<P> f;
    FE_UNROLL for (int half = 0; half < 2; ++half) f.word[half] = transpose_8x8(pack<bf16>(c[2 * half], c[2 * half + 1]));
    return f;
  } else {
    const int g = lane() / 4;
    float v[4];
    FE_UNROLL for (int i = 0; i < 4; ++i) tile[(g + i / 2 * 8) * ld + lane() % 4 * 2 + i % 2] = c[i];
    sync_warp();
    FE_UNROLL for (int i = 0; i < 4; ++i) v[i] = tile[slot(i) * ld + g];
    sync_warp();
    return FragmentB<P>::of(v);
  }
}

// B and B s of the strip that begins at `row`, for the block.
template <int RP>
FE_DEVICE void load_rows(const PenaltyAdapter& p, int first_rank, int row, int stop, float* shared, int buffer) {
  using Layout = PenaltyLayout<RP>;
  const int at = buffer * ROWS * Layout::LDB;
  for (int i = thread(); i < ROWS * RP; i += Layout::THREADS) {
    const int m = i / RP, k = i % RP;
    const float b = b_at(p, row + m, first_rank + k, stop);
    shared[Layout::B + at + m * Layout::LDB + k] = b;
    shared[Layout::SCALED + at + m * Layout::LDB + k] = b * shared[Layout::SCALE + k];
  }
}

// A thread block's share, and its sums.
template <Precision P, int RP, FisherLoads L, bool CHUNKED>
struct Walk {
  using Layout = PenaltyLayout<RP>;
  const Penalty& all;
  const PenaltyAdapter& p;
  const PenaltyItem item;
  float* shared;
  int first, stop, column, first_rank;
  Factor<P, RP, FisherStrip<L>::V> a;
  float da[RP / 16][TILES][4] = {};
  float value = 0.f, ds = 0.f;

  FE_DEVICE Walk(const Penalty& all, const PenaltyItem& item, float* shared)
      : all(all), p(all.adapters[item.adapter]), item(item), shared(shared) {
    first = item.region * p.height;
    stop = min(p.d_out, first + p.height);
    column = item.block * Layout::WIDTH + warp() * PENALTY_COLUMNS;
    first_rank = item.chunk * RP;
    for (int k = thread(); k < RP; k += Layout::THREADS)
      shared[Layout::SCALE + k] = first_rank + k < p.rank ? scale_at(p, first_rank + k) : 0.f;
    sync_block();
    a.load(p, first_rank, column, shared + Layout::A);
    load_rows<RP>(p, first_rank, first, stop, shared, 0);
    sync_block();
  }

  // D of the strip: over all ranks, also those whose gradients other blocks compute.
  FE_DEVICE void product(int row, const float* scaled, float (&d)[TILES][4]) const {
    const int g = lane() / 4;
    if constexpr (CHUNKED) {
      for (int start = 0; start < p.rank; start += 16) {
        float v[8], w[4];
        FE_UNROLL for (int i = 0; i < 8; ++i) {
          const int k = start + slot(i % 4);
          v[i] = k < p.rank ? b_at(p, row + g + i / 4 * 8, k, stop) * scale_at(p, k) : 0.f;
        }
        const auto left = FragmentA<P>::of(v);
        FE_UNROLL for (int n = 0; n < TILES; ++n) {
          FE_UNROLL for (int i = 0; i < 4; ++i) w[i] = a_at(p, start + slot(i), column + place<FisherStrip<L>::V>(n, g));
          mma<P>(d[n], left, FragmentB<P>::of(w));
        }
      }
    } else {
      FE_UNROLL for (int step = 0; step < RP / 16; ++step) {
        float v[8];
        FE_UNROLL for (int i = 0; i < 8; ++i) v[i] = scaled[(g + i / 4 * 8) * Layout::LDB + 16 * step + slot(i % 4)];
        const auto left = FragmentA<P>::of(v);
        FE_UNROLL for (int n = 0; n < TILES; ++n) mma<P>(d[n], left, a.of_ranks(step, n));
      }
    }
  }

  // H A^T of the strip and the warp's columns, for the block to add up.
  FE_DEVICE void times_a(const float (&h)[TILES][4], float* part) const {
    float ha[RP / 8][4] = {};
    FE_UNROLL for (int step = 0; step < COLUMN_STEPS; ++step) {
      const float (&l)[4] = h[2 * step], (&r)[4] = h[2 * step + 1];
      const float v[8] = {l[0], l[1], r[0], r[1], l[2], l[3], r[2], r[3]};
      const auto left = FragmentA<P>::of(v);
      FE_UNROLL for (int n = 0; n < RP / 8; ++n) mma<P>(ha[n], left, a.of_columns(step, n));
    }
    FE_UNROLL for (int n = 0; n < RP / 8; ++n) {
      FE_UNROLL for (int i = 0; i < 4; ++i) part[(lane() / 4 + i / 2 * 8) * RP + n * 8 + lane() % 4 * 2 + i % 2] = ha[n][i];
    }
  }

  // (B s)^T H of the strip, on top of earlier ones.
  FE_DEVICE void times_b(const float (&h)[TILES][4], const float* scaled, float* tile) {
    FragmentA<P> left[RP / 16];
    FE_UNROLL for (int m = 0; m < RP / 16; ++m) {
      float v[8];
      FE_UNROLL for (int i = 0; i < 8; ++i) v[i] = scaled[slot(i % 4) * Layout::LDB + 16 * m + lane() / 4 + i / 4 * 8];
      left[m] = FragmentA<P>::of(v);
    }
    FE_UNROLL for (int n = 0; n < TILES; ++n) {
      const auto right = transposed<P>(h[n], tile + 8 * n, Layout::LDH);
      FE_UNROLL for (int m = 0; m < RP / 16; ++m) mma<P>(da[m][n], left[m], right);
    }
  }

  // H A^T of a strip over all warps, to the workspace, and its share of ds.
  FE_DEVICE void add_warps(int row, int buffer) {
    const float* parts = shared + Layout::PARTS + buffer * Layout::WARPS * ROWS * RP;
    const float* b = shared + Layout::B + buffer * ROWS * Layout::LDB;
    float* to = all.work + p.part_b + int64_t(item.block) * p.d_out * p.rank;
    for (int i = thread(); i < ROWS * RP; i += Layout::THREADS) {
      const int m = i / RP, k = i % RP;
      float total = 0.f;
      FE_UNROLL for (int w = 0; w < Layout::WARPS; ++w) total += parts[w * ROWS * RP + i];
      // RP divides the number of threads: this thread's k is the same in every strip.
      if (all.need_s) ds += total * b[m * Layout::LDB + k];
      if (all.need_b && row + m < stop && first_rank + k < p.rank)
        to[int64_t(row + m) * p.rank + first_rank + k] = total * shared[Layout::SCALE + k];
    }
  }

  FE_DEVICE void run() {
    FisherStrip<L> next;
    next.load(p, first, stop, column);
    int buffer = 0;
    for (int row = first; row < stop; row += ROWS, buffer ^= 1) {
      float f[TILES][4], d[TILES][4] = {};
      next.get(f);
      if (row + ROWS < stop) next.load(p, row + ROWS, stop, column);
      const float* scaled = shared + Layout::SCALED + buffer * ROWS * Layout::LDB;
      product(row, scaled, d);
      FE_UNROLL for (int n = 0; n < TILES; ++n) {
        FE_UNROLL for (int i = 0; i < 4; ++i) {
          f[n][i] *= d[n][i];
          value += f[n][i] * d[n][i];
        }
      }
      if (all.need_b || all.need_s) times_a(f, shared + Layout::PARTS + (buffer * Layout::WARPS + warp()) * ROWS * RP);
      if (all.need_a) times_b(f, scaled, shared + Layout::H + warp() * ROWS * Layout::LDH);
      if (row + ROWS < stop) load_rows<RP>(p, first_rank, row + ROWS, stop, shared, buffer ^ 1);
      sync_block();
      if (all.need_b || all.need_s) add_warps(row, buffer);
    }
  }
};

// Sum of `count` numbers, `stride` apart, in order.
FE_DEVICE float add_up(const float* parts, int count, int64_t stride) {
  float total = 0.f;
  for (int i = 0; i < count; ++i) total += load_shared_by_blocks(parts + i * stride);
  return total;
}

template <int RP>
FE_DEVICE void finish_a(const Penalty& all, const PenaltyAdapter& p, const PenaltyItem& item) {
  constexpr int WIDTH = PenaltyLayout<RP>::WIDTH;
  const int ranks = min(RP, p.rank - item.chunk * RP);
  for (int i = thread(); i < ranks * WIDTH; i += threads()) {
    const int j = item.block * WIDTH + i % WIDTH;
    if (j >= p.d_in) continue;
    const int64_t at = int64_t(item.chunk * RP + i / WIDTH) * p.d_in + j;
    all.grads[p.grad_a + at] = all.lambda * add_up(all.work + p.part_a + at, p.regions, int64_t(p.rank) * p.d_in);
  }
}

template <int RP>
FE_DEVICE void finish_b(const Penalty& all, const PenaltyAdapter& p, const PenaltyItem& item) {
  const int first = item.region * p.height, rows = min(p.height, p.d_out - first), ranks = min(RP, p.rank - item.chunk * RP);
  for (int i = thread(); i < rows * ranks; i += threads()) {
    const int64_t at = int64_t(first + i / ranks) * p.rank + item.chunk * RP + i % ranks;
    all.grads[p.grad_b + at] = all.lambda * add_up(all.work + p.part_b + at, p.blocks, int64_t(p.d_out) * p.rank);
  }
}

// ds: lambda times factor times the sum over the adapter's items; for a scale of one number over ranks as well.
template <int RP>
FE_DEVICE void finish_s(const Penalty& all, const PenaltyAdapter& p, float* scratch) {
  const int count = p.regions * p.blocks;
  float sum = 0.f;
  for (int k = thread(); k < p.rank; k += threads()) {
    const float total = add_up(all.work + p.part_s + int64_t(k / RP) * count * RP + k % RP, count, RP) * (p.factor * all.lambda);
    if (!p.scalar) all.grads[p.grad_s + k] = total;
    sum += total;
  }
  sum = block_sum(sum, scratch);
  if (p.scalar && thread() == 0) all.grads[p.grad_s] = sum;
}

// The loss in fp64: it may be a sum of millions of terms. `scratch`: a double per thread.
FE_DEVICE void finish_loss(const Penalty& all, double* scratch) {
  double sum = 0.0;
  for (int i = thread(); i < all.n_items; i += threads()) sum += load_shared_by_blocks(all.work + i);
  scratch[thread()] = sum;
  for (int half = threads() / 2; half > 0; half /= 2) {
    sync_block();
    if (thread() < half) scratch[thread()] += scratch[thread() + half];
  }
  if (thread() == 0) *all.loss = float(0.5 * double(all.lambda) * scratch[0]);
}

template <Precision P, int RP, FisherLoads L, bool CHUNKED>
FE_KERNEL(PenaltyLayout<RP>::THREADS, 1)
ewc_penalty_kernel(FE_PARAMETER Penalty all) {
  using Layout = PenaltyLayout<RP>;
  float* shared = reinterpret_cast<float*>(shared_memory());
  float* scratch = shared + Layout::SCRATCH;
  uint32_t* flag = reinterpret_cast<uint32_t*>(scratch + 32);
  const PenaltyItem item = all.items[block_x()];
  Walk<P, RP, L, CHUNKED> walk(all, item, shared);
  walk.run();
  const PenaltyAdapter& p = walk.p;

  const float value = block_sum(walk.value, scratch);
  if (thread() == 0) all.work[block_x()] = item.chunk == 0 ? value : 0.f;
  if (all.need_a) {
    float* part = all.work + p.part_a + int64_t(item.region) * p.rank * p.d_in;
    FE_UNROLL for (int m = 0; m < RP / 16; ++m) {
      FE_UNROLL for (int n = 0; n < TILES; ++n) {
        FE_UNROLL for (int i = 0; i < 4; ++i) {
          const int k = walk.first_rank + 16 * m + lane() / 4 + i / 2 * 8;
          const int j = walk.column + place<FisherStrip<L>::V>(n, lane() % 4 * 2 + i % 2);
          if (k < p.rank && j < p.d_in) part[int64_t(k) * p.d_in + j] = walk.da[m][n][i];
        }
      }
    }
    if (last_to_arrive(all.counters + p.count_a + item.chunk * p.blocks + item.block, p.regions, flag)) finish_a<RP>(all, p, item);
  }
  if (all.need_b && last_to_arrive(all.counters + p.count_b + item.chunk * p.regions + item.region, p.blocks, flag))
    finish_b<RP>(all, p, item);
  if (all.need_s && p.grad_s >= 0) {
    // Threads of one rank, in order.
    shared[Layout::PARTS + thread()] = walk.ds;
    sync_block();
    float* part = all.work + p.part_s + int64_t((item.chunk * p.regions + item.region) * p.blocks + item.block) * RP;
    if (thread() < RP) part[thread()] = add_up(shared + Layout::PARTS + thread(), Layout::THREADS / RP, RP);
    if (last_to_arrive(all.counters + p.count_s, p.regions * p.blocks * p.chunks, flag)) finish_s<RP>(all, p, scratch);
  }
  if (last_to_arrive(all.counters, all.n_items, flag)) finish_loss(all, reinterpret_cast<double*>(shared + Layout::PARTS));
}

template <Precision P, int RP, FisherLoads L, bool CHUNKED = false>
cudaError_t start(const Penalty& penalty, cudaStream_t stream) {
  using Layout = PenaltyLayout<RP>;
  return launch(ewc_penalty_kernel<P, RP, L, CHUNKED>, Launch{dim3(penalty.n_items), Layout::THREADS, Layout::BYTES, stream}, penalty);
}

template <Precision P>
cudaError_t start(const Penalty& penalty, int rp, FisherLoads loads, cudaStream_t stream) {
  switch (loads) {
    case FisherLoads::f32:
      return rp == 16   ? start<P, 16, FisherLoads::f32>(penalty, stream)
             : rp == 32 ? start<P, 32, FisherLoads::f32>(penalty, stream)
                        : start<P, 64, FisherLoads::f32>(penalty, stream);
    case FisherLoads::bf16:
      return rp == 16   ? start<P, 16, FisherLoads::bf16>(penalty, stream)
             : rp == 32 ? start<P, 32, FisherLoads::bf16>(penalty, stream)
                        : start<P, 64, FisherLoads::bf16>(penalty, stream);
    default:
      return start<P, 64, FisherLoads::elements, true>(penalty, stream);
  }
}

}  // namespace

cudaError_t launch_ewc_penalty(const Penalty& penalty, int rp, Precision precision, FisherLoads loads, cudaStream_t stream) {
  switch (precision) {
    case Precision::tf32x3:
      return start<Precision::tf32x3>(penalty, rp, loads, stream);
    case Precision::tf32:
      return start<Precision::tf32>(penalty, rp, loads, stream);
    default:
      return start<Precision::bf16>(penalty, rp, loads, stream);
  }
}

}  // namespace fe::cuda
