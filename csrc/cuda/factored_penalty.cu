// SPDX-License-Identifier: Apache-2.0
// Penalty of factored Fishers (docs/mathematics.md, section 10), with S = diag(s):
//   M = B^T diag(r) B;  N = A diag(c) A^T / sum(c);  loss = lambda/2 sum_kl s_k s_l M_kl N_kl;  ds_k = lambda sum_l s_l M_kl N_kl
//   dB = lambda diag(r) B (S N S);  dA = lambda (S M S) A diag(c) / sum(c)
//
// Nothing is as large as F, and A and B are small: products are those of fp32 numbers. Blocks draw tickets. Those with low ones compute M and
// N, part by part; the last block of an adapter adds up its loss and ds, and opens the way for those that compute dA and dB.
#include "factored_penalty.h"
#include "reduce.cuh"

namespace fe::cuda {
namespace factored {

constexpr int THREADS = FACTORED_THREADS;
constexpr int EACH = 4;    // a thread computes 4 x 4 numbers
constexpr int INPUTS = 1;  // the second side

template <int RP>
struct Layout {  // floats of shared memory
  static constexpr int STEP = factored_step(RP), ROWS = factored_rows(RP), IN_ROW = RP / EACH, LD = RP + 4, LDX = ROWS + 4;
  static constexpr int TILE = IN_ROW * IN_ROW, GROUPS = THREADS / TILE;  // threads of a tile of products; groups share the indices
  static constexpr int SCRATCH = 64;
  static constexpr int FIRST = SCRATCH, SECOND = FIRST + STEP * LD;  // of products, then [GROUPS][RP][RP] of their sums at FIRST
  static constexpr int X = SCRATCH, Q = X + RP * LDX;                // of gradients
  static constexpr int OF_PRODUCTS = SECOND + STEP * LD, OF_GRADIENTS = Q + RP * LD;
  static constexpr int BYTES = 4 * (OF_PRODUCTS > OF_GRADIENTS ? OF_PRODUCTS : OF_GRADIENTS);
  static_assert(FIRST + GROUPS * RP * RP <= BYTES / 4 && BYTES <= int(48 << 10));
};

FE_DEVICE float scale_at(const FactoredAdapter& p, int k) {
  return p.scale == nullptr ? p.factor : p.factor * load_number(p.scale, p.scale_dtype, k * p.scale_stride);
}
// c / sum(c), or what contains c as a factor: zeros where the sum is zero, NaN where it is.
FE_DEVICE float share(float value, float total) {
  return total <= 0.f ? 0.f : value / total;
}

// Calls put(i, k, number) for the thread's numbers of COUNT indices start + i, below `stop`, and ranks first + k for k < RP; zero outside.
// Neighbouring threads take neighbours in memory.
template <int RP, int COUNT, class Put>
FE_DEVICE void each_number(const FactoredSide& s, int rank, int start, int stop, int first, const Put& put) {
  constexpr int TOGETHER = 8;  // on their way at once
  const bool by_rank = s.rank <= s.along;
  for (int from = thread(); from < COUNT * RP; from += TOGETHER * THREADS) {
    float held[TOGETHER];
    FE_UNROLL for (int e = 0; e < TOGETHER; ++e) {
      const int at = from + e * THREADS, i = start + (by_rank ? at / RP : at % COUNT), k = first + (by_rank ? at % RP : at / COUNT);
      held[e] = i < stop && k < rank ? load_number(s.factor, s.dtype, i * s.along + k * s.rank) : 0.f;
    }
    FE_UNROLL for (int e = 0; e < TOGETHER; ++e) {
      const int at = from + e * THREADS;
      put(by_rank ? at / RP : at % COUNT, by_rank ? at % RP : at / COUNT, held[e]);
    }
  }
}
FE_DEVICE float sum_at(const FactoredSide& s, int i, int stop) {
  return i < stop ? s.sums[i * s.sum] : 0.f;
}

// sum[a][b] += left[a] right[b].
FE_DEVICE void multiply(const float* left, const float* right, float (&sum)[EACH][EACH]) {
  const Words l = load_shared_words(left), r = load_shared_words(right);
  FE_UNROLL for (int a = 0; a < EACH; ++a) {
    FE_UNROLL for (int b = 0; b < EACH; ++b) sum[a][b] += float_of(l.w[a]) * float_of(r.w[b]);
  }
}

// The sum over the block in fp64, the same bits in every thread. `scratch`: a double per thread. All threads call it.
FE_DEVICE double block_total(double value, double* scratch) {
  scratch[thread()] = value;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    sync_block();
    if (thread() < half) scratch[thread()] += scratch[thread() + half];
  }
  sync_block();
  const double total = scratch[0];
  sync_block();
  return total;
}

// What remains once M and N are there: the adapter's value and ds. Of the last adapter, the loss.
FE_DEVICE void finish(const FactoredPenalty& all, const FactoredAdapter& p, double* scratch, uint32_t* flag) {
  const float *m = all.work + p.products, *n = m + int64_t(p.rank) * p.rank;
  double value = 0.0, sum = 0.0;
  for (int k = thread(); k < p.rank; k += THREADS) {
    double of_rank = 0.0;
    for (int l = 0; l < p.rank; ++l) {
      const int64_t at = int64_t(l) * p.rank + k;
      of_rank += double(scale_at(p, l)) * (double(load_shared_by_blocks(m + at)) * load_shared_by_blocks(n + at));
    }
    value += scale_at(p, k) * of_rank;
    const double ds = double(all.lambda) * p.factor * of_rank;
    if (p.grad_s >= 0 && !p.scalar) all.grads[p.grad_s + k] = float(ds);
    sum += ds;
  }
  value = block_total(value, scratch);
  sum = block_total(sum, scratch);
  if (thread() == 0) {
    all.work[p.value] = float(value);
    if (p.grad_s >= 0 && p.scalar) all.grads[p.grad_s] = float(sum);
  }
  if (p.gradients > 0) pass_turn(all.counters + p.ready, 0, 2);
  if (!last_to_arrive(all.counters + 1, all.n_adapters, flag)) return;
  double total = 0.0;
  for (int i = thread(); i < all.n_adapters; i += THREADS) total += load_shared_by_blocks(all.work + all.adapters[i].value);
  total = block_total(total, scratch);
  if (thread() == 0) *all.loss = float(0.5 * double(all.lambda) * total);
}

// Two tiles of ranks of M or N over a chunk of indices; the last block of the pair adds up the chunks.
template <int RP>
FE_DEVICE void products(const FactoredPenalty& all, const FactoredAdapter& p, const FactoredItem& item, float* shared) {
  using L = Layout<RP>;
  const FactoredSide& s = p.sides[item.side];
  const int begin = item.chunk * s.length, stop = min(s.size, begin + s.length);
  const int own = thread() % L::TILE, group = thread() / L::TILE, k = own / L::IN_ROW * EACH, l = own % L::IN_ROW * EACH;
  float *first = shared + L::FIRST, *second = shared + L::SECOND;
  float sum[EACH][EACH] = {}, sums = 0.f;
  for (int start = begin; start < stop; start += L::STEP) {
    const bool same = item.first == item.second;
    each_number<RP, L::STEP>(s, p.rank, start, stop, item.first, [&](int i, int rank, float number) {
      first[i * L::LD + rank] = number;
      if (same) second[i * L::LD + rank] = number * sum_at(s, start + i, stop);
    });
    if (!same)
      each_number<RP, L::STEP>(s, p.rank, start, stop, item.second,
                               [&](int i, int rank, float number) { second[i * L::LD + rank] = number * sum_at(s, start + i, stop); });
    sync_block();
    for (int i = group; i < L::STEP; i += L::GROUPS) multiply(first + i * L::LD + k, second + i * L::LD + l, sum);
    for (int i = thread(); i < L::STEP; i += THREADS) sums += sum_at(s, start + i, stop);
    sync_block();
  }
  FE_UNROLL for (int a = 0; a < EACH; ++a) {
    FE_UNROLL for (int b = 0; b < EACH; ++b) first[group * RP * RP + (k + a) * RP + l + b] = sum[a][b];
  }
  sums = block_sum(sums, shared);
  float* parts = all.work + s.part + int64_t(item.pair) * s.chunks * factored_part(RP);
  float* part = parts + int64_t(item.chunk) * factored_part(RP);
  for (int e = thread(); e < RP * RP; e += THREADS) {
    float total = first[e];
    FE_UNROLL for (int i = 1; i < L::GROUPS; ++i) total += first[i * RP * RP + e];
    part[e] = total;
  }
  if (thread() == 0) part[RP * RP] = sums;
  uint32_t* flag = reinterpret_cast<uint32_t*>(shared);
  if (!last_to_arrive(all.counters + s.count + item.pair, s.chunks, flag)) return;

  const auto added = [&](int e) {
    float total = 0.f;
    for (int chunk = 0; chunk < s.chunks; ++chunk) total += load_shared_by_blocks(parts + int64_t(chunk) * factored_part(RP) + e);
    return total;
  };
  const bool inputs = item.side == INPUTS;
  const float total = added(RP * RP);
  float* matrix = all.work + p.products + (inputs ? int64_t(p.rank) * p.rank : 0);
  for (int e = thread(); e < RP * RP; e += THREADS) {
    const int row = item.first + e / RP, column = item.second + e % RP;
    if (row >= p.rank || column >= p.rank) continue;
    const float number = inputs ? share(added(e), total) : added(e);
    matrix[int64_t(row) * p.rank + column] = number;
    if (item.first != item.second) matrix[int64_t(column) * p.rank + row] = number;  // symmetric: the mirrored pair is no item
  }
  if (inputs && item.pair == 0 && thread() == 0) all.work[p.total] = total;
  if (last_to_arrive(all.counters + p.count, 2 * p.pairs, flag)) finish(all, p, reinterpret_cast<double*>(shared + L::FIRST), flag);
}

// The gradient of ROWS indices of A or B and a tile of ranks: X Q, times the sums.
template <int RP>
FE_DEVICE void gradients(const FactoredPenalty& all, const FactoredAdapter& p, const FactoredItem& item, float* shared) {
  using L = Layout<RP>;
  const FactoredSide& s = p.sides[item.side];
  const bool inputs = item.side == INPUTS;
  const int start = item.chunk * L::ROWS, stop = min(s.size, start + L::ROWS);
  // Neighbouring threads store neighbours: indices of dA, ranks of dB.
  constexpr int DOWN = L::ROWS / EACH;
  const int i = (inputs ? thread() % DOWN : thread() / L::IN_ROW) * EACH, l = (inputs ? thread() / DOWN : thread() % L::IN_ROW) * EACH;
  float *x = shared + L::X, *q = shared + L::Q;
  uint32_t* ready = all.counters + p.ready;
  take_turn(ready, 1);
  const float* matrix = all.work + p.products + (inputs ? 0 : int64_t(p.rank) * p.rank);  // of the other side
  float sum[EACH][EACH] = {};
  for (int first = 0; first < p.rank; first += RP) {
    each_number<RP, L::ROWS>(s, p.rank, start, stop, first, [&](int row, int k, float number) { x[k * L::LDX + row] = number; });
    for (int e = thread(); e < RP * RP; e += THREADS) {
      const int k = first + e / RP, column = item.first + e % RP;
      const bool there = k < p.rank && column < p.rank;
      const float number = there ? load_shared_by_blocks(matrix + int64_t(k) * p.rank + column) : 0.f;
      q[e / RP * L::LD + e % RP] = there ? scale_at(p, k) * number * scale_at(p, column) : 0.f;
    }
    sync_block();
    for (int k = 0; k < min(RP, p.rank - first); ++k) multiply(x + k * L::LDX + i, q + k * L::LD + l, sum);
    sync_block();
  }
  const float total = inputs ? load_shared_by_blocks(all.work + p.total) : 0.f;
  FE_UNROLL for (int a = 0; a < EACH; ++a) {
    const int index = start + i + a;
    const float own = sum_at(s, index, stop), weight = inputs ? share(own, total) : own;
    FE_UNROLL for (int b = 0; b < EACH; ++b) {
      const int rank = item.first + l + b;
      if (index < stop && rank < p.rank) all.grads[s.grad + index * s.grad_along + rank * s.grad_rank] = all.lambda * (weight * sum[a][b]);
    }
  }
  if (last_to_arrive(all.counters + p.done, p.gradients, reinterpret_cast<uint32_t*>(shared))) pass_turn(ready, 1, 2);
}

template <int RP>
FE_KERNEL(FACTORED_THREADS, 2)
factored_penalty_kernel(FE_PARAMETER FactoredPenalty all) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const uint32_t ticket = draw_ticket(all.counters, uint32_t(all.n_items), reinterpret_cast<uint32_t*>(shared));
  const FactoredItem item = all.items[ticket];
  const FactoredAdapter& p = all.adapters[item.adapter];
  item.gradient ? gradients<RP>(all, p, item, shared) : products<RP>(all, p, item, shared);
}

template <int RP>
cudaError_t start(const FactoredPenalty& penalty, cudaStream_t stream) {
  return launch(factored_penalty_kernel<RP>, Launch{dim3(penalty.n_items), THREADS, Layout<RP>::BYTES, stream}, penalty);
}

}  // namespace factored

cudaError_t launch_factored_penalty(const FactoredPenalty& penalty, int rp, cudaStream_t stream) {
  return rp == 16   ? factored::start<16>(penalty, stream)
         : rp == 32 ? factored::start<32>(penalty, stream)
                    : factored::start<64>(penalty, stream);
}

}  // namespace fe::cuda
