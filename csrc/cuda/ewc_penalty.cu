// EWC penalty: loss, dA, dB and ds from one read of F (docs/mathematics.md, section 2).
//   D = (B s) A;  H = F * D;  loss = lambda/2 sum H * D;  dB = lambda (H A^T) s;  dA = lambda (B s)^T H;  ds = lambda sum_i B (H A^T)
//
// A block walks down a region of rows in strips; each of its warps owns 32 columns. D of a strip comes out of the matrix units in the very
// layout in which H enters them for H A^T, so H goes to shared memory (bf16: through a transposing instruction) only for (B s)^T H. dA of the
// warp's columns stays in its registers; H A^T of a strip is added over the warps. What is complete only when other blocks are done goes to
// the workspace, and the last of them adds it up in a fixed order.
#include "ewc_penalty.h"
#include "penalty_tiles.cuh"
#include "reduce.cuh"

namespace fe::cuda {
namespace {

// A thread block's share, and its sums.
template <Precision P, int RP, FisherLoads L, bool CHUNKED>
struct Walk {
  using Layout = PenaltyLayout<P, RP>;
  using Strip = float[TILES][4];
  const PenaltyAdapter& p;
  float* shared;
  const int first, stop, column, first_rank;
  const bool need_a, need_b, need_s;
  Factor<P, RP, Fisher<L>::V> a;
  float da[RP / 16][TILES][4] = {};
  float value = 0.f, ds = 0.f;

  FE_DEVICE Walk(const Penalty& all, const PenaltyAdapter& p, const PenaltyItem& item, float* shared)
      : p(p),
        shared(shared),
        first(item.region * p.height),
        stop(min(p.d_out, first + p.height)),
        column(item.block * Layout::WIDTH + warp() * PENALTY_COLUMNS),
        first_rank(item.chunk * RP),
        need_a(all.need_a),
        need_b(all.need_b),
        need_s(all.need_s && p.grad_s >= 0) {
    a.load(p, first_rank, column, shared + Layout::A);
  }

  // D of the strip: over all ranks, also those whose gradients other blocks compute.
  FE_DEVICE void product(int row, const float* scaled, Strip& d) const {
    const int g = lane() / 4;
    if constexpr (CHUNKED) {
      for (int start = 0; start < p.rank; start += 16) {
        float v[8], w[4];
        FE_UNROLL for (int i = 0; i < 8; ++i) {
          const int k = start + slot(i % 4);
          v[i] = k < p.rank ? b_at(p, row + g + i / 4 * 8, k) * scale_at(p, k) : 0.f;
        }
        const auto left = FragmentA<P>::of(v);
        FE_UNROLL for (int n = 0; n < TILES; ++n) {
          FE_UNROLL for (int i = 0; i < 4; ++i) w[i] = a_at(p, start + slot(i), column + place<Fisher<L>::V>(n, g));
          mma<P>(d[n], left, FragmentB<P>::of(w));
        }
      }
    } else {
      FE_UNROLL for (int step = 0; step < RP / 16; ++step) {
        float v[8];
        FE_UNROLL for (int i = 0; i < 8; i += 2) {
          const Pair pair = load_pair(scaled + (g + i / 4 * 8) * Layout::LDB + 16 * step + slot(i % 4));
          v[i] = pair.low, v[i + 1] = pair.high;
        }
        const auto left = FragmentA<P>::of_prepared(v);
        FE_UNROLL for (int n = 0; n < TILES; ++n) mma<P>(d[n], left, a.of_ranks(step, n));
      }
    }
  }

  // H A^T of the strip and the warp's columns, for the block to add up.
  FE_DEVICE void times_a(const Strip& h, float* part) const {
    float ha[RP / 8][4] = {};
    FE_UNROLL for (int step = 0; step < COLUMN_STEPS; ++step) {
      const float (&l)[4] = h[2 * step], (&r)[4] = h[2 * step + 1];
      const float v[8] = {l[0], l[1], r[0], r[1], l[2], l[3], r[2], r[3]};
      const auto left = FragmentA<P>::of_prepared(v);
      FE_UNROLL for (int n = 0; n < RP / 8; ++n) mma<P>(ha[n], left, a.of_columns(step, n));
    }
    part += lane() / 4 * RP + lane() % 4 * 2;
    FE_UNROLL for (int n = 0; n < RP / 8; ++n) {
      FE_UNROLL for (int half = 0; half < 2; ++half) store_pair(part + 8 * half * RP + 8 * n, ha[n][2 * half], ha[n][2 * half + 1]);
    }
  }

  // (B s)^T H of the strip, on top of earlier ones. The strip's rows are inner indices here, so H is transposed on its way.
  FE_DEVICE void times_b(const Strip& h, const float* scaled, float* tile) {
    const int g = lane() / 4;
    FragmentA<P> left[RP / 16];
    FE_UNROLL for (int m = 0; m < RP / 16; ++m) {
      float v[8];
      FE_UNROLL for (int i = 0; i < 8; ++i) v[i] = scaled[slot(i % 4) * Layout::LDB + 16 * m + g + i / 4 * 8];
      left[m] = FragmentA<P>::of_prepared(v);
    }
    if constexpr (P != Precision::bf16) {
      FE_UNROLL for (int n = 0; n < TILES; ++n) {
        FE_UNROLL for (int half = 0; half < 2; ++half)
            store_pair(tile + (g + 8 * half) * Layout::LDH + 8 * n + lane() % 4 * 2, h[n][2 * half], h[n][2 * half + 1]);
      }
      sync_warp();
    }
    FE_UNROLL for (int n = 0; n < TILES; ++n) {
      FragmentB<P> right;
      if constexpr (P == Precision::bf16) {
        FE_UNROLL for (int half = 0; half < 2; ++half) right.word[half] = transpose_8x8(pack<bf16>(h[n][2 * half], h[n][2 * half + 1]));
      } else {
        float v[4];
        FE_UNROLL for (int i = 0; i < 4; ++i) v[i] = tile[slot(i) * Layout::LDH + 8 * n + g];
        right = FragmentB<P>::of_prepared(v);
      }
      FE_UNROLL for (int m = 0; m < RP / 16; ++m) mma<P>(da[m][n], left[m], right);
    }
  }

  // H A^T of a strip over all warps: its share of ds, and times the scale to the workspace at `to`, rows of which are `ld` apart.
  FE_DEVICE void add_warps(int buffer, int rows, float scale, float* to, int ld) {
    const float* parts = shared + Layout::PARTS + buffer * Layout::WARPS * ROWS * RP + thread();
    const float* b = shared + Layout::B + (buffer * ROWS + thread() / RP) * Layout::LDB + thread() % RP;
    FE_UNROLL for (int e = 0; e < Rows<P, RP>::COUNT; ++e) {
      float total = 0.f;
      FE_UNROLL for (int w = 0; w < Layout::WARPS; ++w) total += parts[w * ROWS * RP + e * Layout::THREADS];
      const int m = e * Rows<P, RP>::STEP;
      if (need_s) ds += total * b[m * Layout::LDB];
      if (need_b && thread() / RP + m < rows) to[int64_t(m) * ld] = total * scale;
    }
  }

  // `part_b`: the parts of dB of this block of columns.
  FE_DEVICE void run(float* part_b) {
    const int k = first_rank + thread() % RP, rank = p.rank;
    const float scale = k < rank ? scale_at(p, k) : 0.f;
    float* to = part_b + int64_t(first + thread() / RP) * rank + k;
    Fisher<L> fisher(p, first, column);
    Rows<P, RP> rows(first);
    rows.load(p, k);
    fisher.load(stop - first);
    rows.store(shared, 0, scale);
    sync_block();
    for (int row = first, buffer = 0; row < stop; row += ROWS, buffer ^= 1) {
      Strip h, d = {};
      fisher.get(h);
      const bool more = row + ROWS < stop;
      if (more) {
        fisher.load(stop - row - ROWS);
        rows.load(p, k);
      }
      const float* scaled = shared + Layout::SCALED + buffer * ROWS * Layout::LDB;
      product(row, scaled, d);
      FE_UNROLL for (int n = 0; n < TILES; ++n) {
        FE_UNROLL for (int i = 0; i < 4; ++i) {
          const float product = h[n][i] * d[n][i];
          value += product * d[n][i];
          h[n][i] = prepared<P>(product);
        }
      }
      if (need_b || need_s) times_a(h, shared + Layout::PARTS + (buffer * Layout::WARPS + warp()) * ROWS * RP);
      if (need_a) times_b(h, scaled, shared + Layout::H + warp() * ROWS * Layout::LDH);
      if (more) rows.store(shared, buffer ^ 1, scale);
      sync_block();
      if (need_b || need_s) add_warps(buffer, k < rank ? stop - row : 0, scale, to, rank);
      to += int64_t(ROWS) * rank;
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
  constexpr int WIDTH = PenaltyLayout<Precision::tf32, RP>::WIDTH;
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
FE_KERNEL((PenaltyLayout<P, RP>::THREADS), (PenaltyLayout<P, RP>::BLOCKS))
ewc_penalty_kernel(FE_PARAMETER Penalty all) {
  using Layout = PenaltyLayout<P, RP>;
  float* shared = reinterpret_cast<float*>(shared_memory());
  float* scratch = shared + Layout::SCRATCH;
  uint32_t* flag = reinterpret_cast<uint32_t*>(scratch + 32);
  const PenaltyItem item = all.items[block_x()];
  const PenaltyAdapter& p = all.adapters[item.adapter];
  Walk<P, RP, L, CHUNKED> walk(all, p, item, shared);
  walk.run(all.work + p.part_b + int64_t(item.block) * p.d_out * p.rank);

  const float value = block_sum(walk.value, scratch);
  if (thread() == 0) all.work[block_x()] = item.chunk == 0 ? value : 0.f;
  if (all.need_a) {
    float* part = all.work + p.part_a + int64_t(item.region) * p.rank * p.d_in;
    FE_UNROLL for (int m = 0; m < RP / 16; ++m) {
      FE_UNROLL for (int n = 0; n < TILES; ++n) {
        FE_UNROLL for (int i = 0; i < 4; ++i) {
          const int k = walk.first_rank + 16 * m + lane() / 4 + i / 2 * 8;
          const int j = walk.column + place<Fisher<L>::V>(n, lane() % 4 * 2 + i % 2);
          if (k < p.rank && j < p.d_in) part[int64_t(k) * p.d_in + j] = walk.da[m][n][i];
        }
      }
    }
    if (last_to_arrive(all.counters + p.count_a + item.chunk * p.blocks + item.block, p.regions, flag)) finish_a<RP>(all, p, item);
  }
  if (all.need_b && last_to_arrive(all.counters + p.count_b + item.chunk * p.regions + item.region, p.blocks, flag))
    finish_b<RP>(all, p, item);
  if (walk.need_s) {
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
  using Layout = PenaltyLayout<P, RP>;
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
