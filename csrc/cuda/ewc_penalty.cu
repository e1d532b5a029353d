// SPDX-License-Identifier: Apache-2.0
// EWC penalty: loss, dA, dB and ds from one read of F (docs/mathematics.md, section 2).
//   D = (B s) A;  H = F * D;  loss = lambda/2 sum H * D;  dB = lambda (H A^T) s;  dA = lambda (B s)^T H;  ds = lambda sum_i B (H A^T)
// The l1 norm of D (section 13) is the same with H = sign(D), loss = lambda sum H * D, and no F.
//
// A block walks down a region of rows in strips; each of its warps owns 32 columns. D of a strip comes out of the matrix units in the very
// layout in which H enters them for H A^T, so H is transposed (in shared memory; bf16: by an instruction) only for (B s)^T H. dA of the
// warp's columns stays in its registers; H A^T of a strip is added over the warps. What is complete only when other blocks are done goes to
// the workspace, and the last of them adds it up in a fixed order.
#include "ewc_penalty.h"
#include "penalty_tiles.cuh"
#include "reduce.cuh"

namespace fe::cuda {
namespace {

// 0 where `d` is no number, as torch.sign; the loss is no number then.
FE_DEVICE float sign(float d) {
  return d > 0.f ? 1.f : d < 0.f ? -1.f : 0.f;
}

// A thread block's share, and its sums.
template <Precision P, int RP, FisherLoads L, bool CHUNKED>
struct Walk {
  using Layout = PenaltyLayout<P, RP, L>;
  using Reader = Fisher<L, Layout::STAGES>;
  using Strip = float[TILES][4];
  static constexpr bool L1 = L == FisherLoads::none;
  // Of H in products: signs are exact in tf32.
  static constexpr Precision OF_H = L1 && P == Precision::tf32x3 ? Precision::tf32 : P;
  const PenaltyAdapter& p;
  float* shared;
  const int first, stop, column, first_rank;
  const bool need_a, need_b, need_s;
  int own, put, take;  // where the lane's numbers are in tiles, and where in that of H it writes and reads first
  Factor<P, RP, L> a;
  float da[TILES / 2][RP / 8][4] = {};  // transposed
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
    const int g = lane() / 4, t = lane() % 4, tile = Layout::H + warp() * Layout::TILE;
    own = lane_place(g, t), put = tile + in_strip(g, t), take = tile + in_strip(2 * t, g) + g / 2 % 2 * 2;
    opaque(own), opaque(put), opaque(take);  // kept, not computed in every strip
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
          FE_UNROLL for (int i = 0; i < 4; ++i) w[i] = a_at(p, start + slot(i), column + place<Reader::V>(n, g));
          mma(d[n], left, FragmentB<P>::of(w));
        }
      }
    } else {
      FE_UNROLL for (int step = 0; step < RP / 16; ++step) {
        const auto left = load_left<P>(scaled + SQUARE * step + own);
        FE_UNROLL for (int n = 0; n < TILES; ++n) mma(d[n], left, a.of_ranks(step, n));
      }
    }
  }

  // A H^T of the strip and the warp's columns, for the block to add up.
  FE_DEVICE void times_a(const Strip& h, float* part) const {
    float ah[RP / 16][2][4] = {};
    FE_UNROLL for (int step = 0; step < COLUMN_STEPS; ++step) {
      const float (&l)[4] = h[2 * step], (&r)[4] = h[2 * step + 1];
      FragmentB<OF_H> right[2];
      FE_UNROLL for (int half = 0; half < 2; ++half) {
        const float v[4] = {l[2 * half], l[2 * half + 1], r[2 * half], r[2 * half + 1]};
        right[half] = FragmentB<OF_H>::of_prepared(v);
      }
      FE_UNROLL for (int m = 0; m < RP / 16; ++m) {
        const auto left = a.of_columns(m, step);
        FE_UNROLL for (int half = 0; half < 2; ++half) mma(ah[m][half], left, right[half]);
      }
    }
    part += own;
    FE_UNROLL for (int m = 0; m < RP / 16; ++m) {
      FE_UNROLL for (int half = 0; half < 2; ++half) store_words(part + m * SQUARE + half * HALF_TILE, unit_of<float>(ah[m][half]));
    }
  }

  // H of the strip, transposed on its way through shared memory; bf16: from one register to the other.
  FE_DEVICE void hand_over(const Strip& h) const {
    if constexpr (P == Precision::bf16) return;
    FE_UNROLL for (int n = 0; n < TILES; n += 2) {
      FE_UNROLL for (int half = 0; half < 2; ++half) {
        const float v[4] = {h[n][2 * half], h[n][2 * half + 1], h[n + 1][2 * half], h[n + 1][2 * half + 1]};
        store_words(shared + (put ^ in_strip(0, 2 * n)) + half * in_strip(8, 0), unit_of<float>(v));
      }
    }
    sync_warp();  // the tile is written again only after the block has synchronised
  }
  FE_DEVICE FragmentA<OF_H> transposed(const Strip& h, int m) const {
    if constexpr (P == Precision::bf16) {
      FragmentA<OF_H> to;
      FE_UNROLL for (int i = 0; i < 4; ++i) {
        const float (&from)[4] = h[2 * m + i / 2];
        to.word[i] = transpose_8x8(pack<bf16>(from[i % 2 * 2], from[i % 2 * 2 + 1]));
      }
      return to;
    } else {
      float v[8];
      FE_UNROLL for (int i = 0; i < 4; ++i) {
        const Pair two = load_pair(shared + (take ^ (i % 2 * in_strip(0, 4) + m * 2)) + (i % 2 + i / 2 * 8) * PENALTY_COLUMNS);
        v[i] = two.low, v[4 + i] = two.high;
      }
      return FragmentA<OF_H>::of_prepared(v);
    }
  }
  // The warp's column in row g + 8 half of transposed tile m.
  FE_DEVICE static int transposed_column(int m, int half) {
    const int g = lane() / 4;
    if constexpr (P == Precision::bf16) return place<Reader::V>(2 * m + half, g);
    return place<Reader::V>(g / 4 * 2 + (m ^ g / 2 % 2), g % 4 * 2 + half);
  }

  // H^T (B s) of the strip, on top of earlier ones.
  FE_DEVICE void times_b(const Strip& h, const float* turned) {
    constexpr int M = TILES / 2, N = RP / 8;
    const auto right = [&](int n) { return load_right<P>(turned + n * HALF_TILE + own); };
    hand_over(h);
    if constexpr (N <= M) {  // registers keep the smaller one of both sides
      FragmentB<P> kept[N];
      FE_UNROLL for (int n = 0; n < N; ++n) kept[n] = right(n);
      FE_UNROLL for (int m = 0; m < M; ++m) {
        const auto left = transposed(h, m);
        FE_UNROLL for (int n = 0; n < N; ++n) mma(da[m][n], left, kept[n]);
      }
    } else {
      FragmentA<OF_H> kept[M];
      FE_UNROLL for (int m = 0; m < M; ++m) kept[m] = transposed(h, m);
      FE_UNROLL for (int n = 0; n < N; ++n) {
        const auto some = right(n);
        FE_UNROLL for (int m = 0; m < M; ++m) mma(da[m][n], kept[m], some);
      }
    }
  }

  // H A^T of a strip over all warps: its share of ds, and times the scale to the workspace at `to`, rows of which are `ld` apart.
  FE_DEVICE void add_warps(int buffer, int left, const Rows<P, RP, L>& rows, float* to, int ld) {
    const int k = thread() % RP;
    const float* parts = shared + Layout::PARTS + (buffer * Layout::WARPS * RP + k / 16 * 16) * ROWS;
    FE_UNROLL for (int e = 0; e < rows.COUNT; ++e) {
      const int m = thread() / RP + e * rows.STEP;
      float total = parts[as_product(k % 16, m)];
      FE_UNROLL for (int w = 1; w < Layout::WARPS; ++w) total += parts[w * ROWS * RP + as_product(k % 16, m)];
      if (need_s) ds += total * rows.value[e];
      if (need_b && rows.own + e * rows.STEP < left) to[int64_t(e * rows.STEP) * ld] = total * rows.scale;
    }
  }

  // `part_b`: the parts of dB of this block of columns.
  FE_DEVICE void run(float* part_b) {
    const int k = first_rank + thread() % RP, rank = p.rank;
    float* to = part_b + int64_t(first + thread() / RP) * rank + k;
    Reader fisher(p, first, column, shared + Layout::F);
    fisher.start(stop - first);
    Rows<P, RP, L> rows(p, first, k);
    rows.fetch(stop - first);
    a.load(p, first_rank, column, shared + Layout::A);
    rows.store(shared, 0);
    sync_block();
    int buffer = 0;
    for (int left = stop - first; left > 0; left -= ROWS, buffer ^= 1) {
      Strip h, d = {};  // h: F first
      a.keep_whole();
      fisher.next(h, left);
      rows.advance();
      rows.fetch(left - ROWS);
      product(stop - left, shared + Layout::SCALED + buffer * ROWS * RP, d);
      FE_UNROLL for (int n = 0; n < TILES; ++n) {
        FE_UNROLL for (int i = 0; i < 4; ++i) {
          const float slope = L1 ? sign(d[n][i]) : h[n][i] * d[n][i];
          value += slope * d[n][i];
          h[n][i] = prepared<P>(slope);
        }
      }
      if (need_b || need_s) times_a(h, shared + Layout::PARTS + (buffer * Layout::WARPS + warp()) * ROWS * RP);
      if (need_a) times_b(h, shared + Layout::TURNED + buffer * ROWS * RP);
      rows.store(shared, buffer ^ 1);
      sync_block();
      if (need_b || need_s) add_warps(buffer, left, rows, to, rank);
      to += int64_t(ROWS) * rank;
    }
    copy_async_wait<0>();  // a thread does not end before the copies it started, of strips past the end as well
  }
};

// Sums of `count` numbers each, `stride` apart, in order: those at `parts` + at[i]. Eight sums at a time have eight loads under way.
constexpr int TOGETHER = 8;
FE_DEVICE void add_up(const float* parts, const int64_t (&at)[TOGETHER], int count, int64_t stride, float (&total)[TOGETHER]) {
  for (int part = 0; part < count; ++part, parts += stride) {
    FE_UNROLL for (int i = 0; i < TOGETHER; ++i) total[i] += load_shared_by_blocks(parts + at[i]);
  }
}

// lambda times the sums of `count` parts, `stride` apart, of a matrix of rows of `ld`: `rows` of them, `width` columns from `first` on.
FE_DEVICE void finish(const Penalty& all, int64_t part, int64_t grad, int64_t first, int rows, int width, int ld, int count,
                      int64_t stride) {
  const int size = rows * width;
  for (int start = thread(); start < size; start += TOGETHER * threads()) {
    int64_t at[TOGETHER];
    float total[TOGETHER] = {};
    FE_UNROLL for (int i = 0; i < TOGETHER; ++i) {
      const int e = min(start + i * threads(), size - 1);
      at[i] = first + int64_t(e / width) * ld + e % width;
    }
    add_up(all.work + part, at, count, stride, total);
    FE_UNROLL for (int i = 0; i < TOGETHER; ++i) {
      if (start + i * threads() < size) all.grads[grad + at[i]] = all.lambda * total[i];
    }
  }
}
template <int RP>
FE_DEVICE void finish_a(const Penalty& all, const PenaltyAdapter& p, const PenaltyItem& item) {
  const int column = item.block * penalty_width(RP), rank = item.chunk * RP;
  finish(all, p.part_a, p.grad_a, int64_t(rank) * p.d_in + column, min(RP, p.rank - rank), min(penalty_width(RP), p.d_in - column), p.d_in,
         p.regions, int64_t(p.rank) * p.d_in);
}
template <int RP>
FE_DEVICE void finish_b(const Penalty& all, const PenaltyAdapter& p, const PenaltyItem& item) {
  const int row = item.region * p.height, rank = item.chunk * RP;
  finish(all, p.part_b, p.grad_b, int64_t(row) * p.rank + rank, min(p.height, p.d_out - row), min(RP, p.rank - rank), p.rank, p.blocks,
         int64_t(p.d_out) * p.rank);
}

// ds: lambda times factor times the sum over the adapter's items; for a scale of one number over ranks as well.
template <int RP>
FE_DEVICE void finish_s(const Penalty& all, const PenaltyAdapter& p, float* scratch) {
  const int count = p.regions * p.blocks;
  float sum = 0.f;
  for (int k = thread(); k < p.rank; k += threads()) {
    const float* parts = all.work + p.part_s + int64_t(k / RP) * count * RP + k % RP;
    float total = 0.f;
    for (int i = 0; i < count; ++i) total += load_shared_by_blocks(parts + i * RP);
    total *= p.factor * all.lambda;
    if (!p.scalar) all.grads[p.grad_s + k] = total;
    sum += total;
  }
  sum = block_sum(sum, scratch);
  if (p.scalar && thread() == 0) all.grads[p.grad_s] = sum;
}

// `weight` times lambda times the sum over all items, in fp64: it may have millions of terms. `scratch`: a double per thread.
FE_DEVICE void finish_loss(const Penalty& all, double weight, double* scratch) {
  double sum = 0.0;
  for (int i = thread(); i < all.n_items; i += threads()) sum += load_shared_by_blocks(all.work + i);
  scratch[thread()] = sum;
  for (int half = threads() / 2; half > 0; half /= 2) {
    sync_block();
    if (thread() < half) scratch[thread()] += scratch[thread() + half];
  }
  if (thread() == 0) *all.loss = float(weight * double(all.lambda) * scratch[0]);
}

template <Precision P, int RP, FisherLoads L, bool CHUNKED>
FE_KERNEL((PenaltyLayout<P, RP, L>::THREADS), (PenaltyLayout<P, RP, L>::BLOCKS))
ewc_penalty_kernel(FE_PARAMETER Penalty all) {
  using Layout = PenaltyLayout<P, RP, L>;
  float* shared = reinterpret_cast<float*>(shared_memory());
  float* scratch = shared + Layout::SCRATCH;
  const PenaltyItem item = all.items[block_x()];
  const PenaltyAdapter& p = all.adapters[item.adapter];
  Walk<P, RP, L, CHUNKED> walk(all, p, item, shared);
  walk.run(all.work + p.part_b + int64_t(item.block) * p.d_out * p.rank);

  const float value = block_sum(walk.value, scratch);
  if (thread() == 0) all.work[block_x()] = item.chunk == 0 ? value : 0.f;
  if (all.need_a) {
    float* part = all.work + p.part_a + int64_t(item.region) * p.rank * p.d_in;
    FE_UNROLL for (int m = 0; m < TILES / 2; ++m) {
      FE_UNROLL for (int n = 0; n < RP / 8; ++n) {
        FE_UNROLL for (int i = 0; i < 4; ++i) {
          const int k = walk.first_rank + 8 * n + lane() % 4 * 2 + i % 2, j = walk.column + walk.transposed_column(m, i / 2);
          if (k < p.rank && j < p.d_in) part[int64_t(k) * p.d_in + j] = walk.da[m][n][i];
        }
      }
    }
  }
  if (walk.need_s) {
    // Threads of one rank, in order.
    shared[Layout::PARTS + thread()] = walk.ds;
    sync_block();
    float* part = all.work + p.part_s + int64_t((item.chunk * p.regions + item.region) * p.blocks + item.block) * RP;
    if (thread() < RP) {
      float total = 0.f;
      FE_UNROLL for (int i = thread(); i < Layout::THREADS; i += RP) total += shared[Layout::PARTS + i];
      part[thread()] = total;
    }
  }

  const Arrival arrivals[4] = {
      {all.need_a ? all.counters + p.count_a + item.chunk * p.blocks + item.block : nullptr, p.regions},
      {all.need_b ? all.counters + p.count_b + item.chunk * p.regions + item.region : nullptr, p.blocks},
      {walk.need_s ? all.counters + p.count_s : nullptr, p.regions * p.blocks * p.chunks},
      {all.counters, all.n_items},
  };
  bool last[4];
  last_to_arrive(arrivals, last, reinterpret_cast<uint32_t*>(scratch + 32));
  if (last[0]) finish_a<RP>(all, p, item);
  if (last[1]) finish_b<RP>(all, p, item);
  if (last[2]) finish_s<RP>(all, p, scratch);
  if (last[3]) finish_loss(all, walk.L1 ? 1.0 : 0.5, reinterpret_cast<double*>(shared + Layout::PARTS));
}

template <Precision P, int RP, FisherLoads L, bool CHUNKED = false>
cudaError_t start(const Penalty& penalty, cudaStream_t stream) {
  using Layout = PenaltyLayout<P, RP, L>;
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
    case FisherLoads::codes:
      return rp == 16   ? start<P, 16, FisherLoads::codes>(penalty, stream)
             : rp == 32 ? start<P, 32, FisherLoads::codes>(penalty, stream)
                        : start<P, 64, FisherLoads::codes>(penalty, stream);
    case FisherLoads::none:
      return rp == 16   ? start<P, 16, FisherLoads::none>(penalty, stream)
             : rp == 32 ? start<P, 32, FisherLoads::none>(penalty, stream)
                        : start<P, 64, FisherLoads::none>(penalty, stream);
    case FisherLoads::codes_of_any_rank:
      return start<P, 64, FisherLoads::codes, true>(penalty, stream);
    case FisherLoads::none_of_any_rank:
      return start<P, 64, FisherLoads::none, true>(penalty, stream);
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
