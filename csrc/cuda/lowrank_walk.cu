// SPDX-License-Identifier: Apache-2.0
// Skinny products of a tall matrix that is read once. Eight warps of a block own 32 columns each and walk down a range of rows, a strip at a
// time; the next strip is on its way while one is multiplied. Sums over columns meet in shared memory, sums over rows stay in registers.
#include <algorithm>

#include "lowrank.cuh"
#include "philox.cuh"

namespace fe::cuda {

constexpr int WALK_WARPS = 8, WALK_THREADS = 32 * WALK_WARPS;
constexpr int WARP_COLUMNS = WALK_COLUMNS / WALK_WARPS;  // two steps of the matrix units
constexpr int STEPS = 2;

// RB ranks at a time; U: u is wanted; G: g is wanted.
template <Precision P, int RB, bool U, bool G, bool WIDE>
struct WalkShape {
  using T = Number<P>;
  static constexpr int STRIP = IS_HALF<P> && RB <= 32 ? 32 : 16;
  static constexpr int TILES = STRIP / 16, OCTETS = STRIP / 8, RANK_TILES = RB / 8;
  static constexpr int ROW_WORDS = STEPS * FOUR<P>;  // of a row that a lane holds
  static constexpr int UNITS = ROW_WORDS / 4;        // of 16 bytes
  static constexpr int COUNT = Wide<T>::COUNT;
  static constexpr int P_WORDS = U ? RANK_TILES * ROW_WORDS * 32 : 0;  // per warp
  static constexpr int PARTIAL = U ? TILES * RANK_TILES * 32 * 4 : 0;  // floats per warp
  static constexpr int C_WORDS = G ? TILES * RANK_TILES * 32 * FOUR<P> : 0;
  static constexpr int C_EACH = G ? C_WORDS / WALK_THREADS : 1;
  static constexpr int PITCH = WARP_COLUMNS + 4;                  // lanes of a transposed read hit 32 different banks
  static constexpr int TURN = G && !IS_HALF<P> ? 16 * PITCH : 0;  // floats per warp
  static constexpr size_t SHARED = 4 * (WALK_WARPS * (P_WORDS + PARTIAL + TURN) + C_WORDS);
  static constexpr int BLOCKS = WIDE && (RB == 16 || STRIP == 32) ? 2 : 1;  // side by side; addresses of odd strides take registers
  static_assert(!G || C_WORDS % WALK_THREADS == 0);
  static_assert(SHARED <= 99 << 10);
};

template <Precision P, int RB, bool U, bool G, bool WIDE>
struct Walk : WalkShape<P, RB, U, G, WIDE> {
  using S = WalkShape<P, RB, U, G, WIDE>;
  using T = typename S::T;

  const WalkParams& p;
  const int g = lane() / 4, t = lane() % 4;
  const int64_t column = int64_t(block_y()) * WALK_COLUMNS + warp() * WARP_COLUMNS;
  const int64_t begin = block_x() * p.region_rows, end = min(p.rows, begin + p.region_rows);
  const int rank = block_z() * RB;
  uint32_t* const packed = reinterpret_cast<uint32_t*>(shared_memory()) + warp() * S::P_WORDS;
  float* const partials = reinterpret_cast<float*>(shared_memory()) + WALK_WARPS * S::P_WORDS;
  uint32_t* const c_words = reinterpret_cast<uint32_t*>(partials + WALK_WARPS * S::PARTIAL);
  float* const turn = reinterpret_cast<float*>(c_words + S::C_WORDS) + warp() * S::TURN;
  const Philox philox = Philox::of(p.dropout);

  uint32_t x[S::OCTETS][S::ROW_WORDS];  // rows g, g + 8, ... of the strip
  float sum_g[G ? 2 : 1][S::RANK_TILES][4] = {};
  float sums[G ? S::UNITS : 1][S::COUNT] = {};

  FE_DEVICE explicit Walk(const WalkParams& params) : p(params) {}

  // First of the four columns, in the warp's, that a lane has of a step.
  FE_DEVICE int step_column(int step) const { return IS_HALF<P> ? 8 * t + 4 * step : 16 * step + 4 * t; }

  // This lane's part of p: the units that it alone reads.
  FE_DEVICE void keep_p() {
    const T* from = static_cast<const T*>(p.p) + column;
    FE_UNROLL for (int q = 0; q < S::RANK_TILES; ++q) FE_UNROLL for (int unit = 0; unit < S::UNITS; ++unit) {
      const Words words = load_words(from + (rank + 8 * q + g) * p.p_pitch + (4 * unit + t) * S::COUNT);
      store_words(packed + ((q * S::UNITS + unit) * 32 + lane()) * 4, words);
    }
  }

  FE_DEVICE void load_strip(int64_t row, uint32_t (&to)[S::OCTETS][S::ROW_WORDS]) const {
    FE_UNROLL for (int octet = 0; octet < S::OCTETS; ++octet) {
      const int64_t m = row + 8 * octet + g;
      const T* from = static_cast<const T*>(p.x.data) + m * p.x.row;
      FE_UNROLL for (int unit = 0; unit < S::UNITS; ++unit) {
        const int64_t n = column + (4 * unit + t) * S::COUNT;
        Words words{};
        if (WIDE) {
          if (m < end && n < p.columns) words = load_words(from + n);
        } else {
          FE_UNROLL for (int i = 0; i < S::COUNT; ++i) if (m < end && n + i < p.columns) {
            const uint32_t bits = raw_bits(from[(n + i) * p.x.column]);
            words.w[i * 4 / S::COUNT] |= IS_HALF<P> && i % 2 ? bits << 16 : bits;
          }
        }
        FE_UNROLL for (int i = 0; i < 4; ++i) to[octet][4 * unit + i] = words.w[i];
      }
    }
  }

  // Words of c [STRIP, RB] in the order of B fragments, rounded to T.
  FE_DEVICE void load_c(int64_t row, uint32_t (&to)[S::C_EACH]) const {
    FE_UNROLL for (int i = 0; i < S::C_EACH; ++i) {
      const int word = thread() + i * WALK_THREADS, at = word / FOUR<P> % 32;
      const int slot = word % FOUR<P> * (4 / FOUR<P>), tile = word / FOUR<P> / 32;
      const int64_t m = row + tile / S::RANK_TILES * 16 + inner_index(at % 4, slot);
      const int k = rank + tile % S::RANK_TILES * 8 + at / 4;
      const float first = m < end && k < p.c_columns ? load_number(p.c, p.c_dtype, m * p.c_columns + k) : 0.f;
      if constexpr (IS_HALF<P>) {
        to[i] = pack<T>(first, m + 1 < end && k < p.c_columns ? load_number(p.c, p.c_dtype, (m + 1) * p.c_columns + k) : 0.f);
      } else {
        to[i] = bits_of(first);
      }
    }
  }
  FE_DEVICE void store_c(const uint32_t (&from)[S::C_EACH]) {
    FE_UNROLL for (int i = 0; i < S::C_EACH; ++i) c_words[thread() + i * WALK_THREADS] = from[i];
  }

  FE_DEVICE void add_columns() {
    FE_UNROLL for (int octet = 0; octet < S::OCTETS; ++octet) FE_UNROLL for (int unit = 0; unit < S::UNITS; ++unit) {
      Words words;
      FE_UNROLL for (int i = 0; i < 4; ++i) words.w[i] = x[octet][4 * unit + i];
      float v[S::COUNT];
      unpack(words, v, T());
      FE_UNROLL for (int i = 0; i < S::COUNT; ++i) sums[unit][i] += v[i];
    }
  }

  FE_DEVICE void drop(int64_t row) {
    FE_UNROLL for (int octet = 0; octet < S::OCTETS; ++octet) FE_UNROLL for (int step = 0; step < STEPS; ++step) {
      bool kept[4];
      philox.keep(row + 8 * octet + g, column + step_column(step), kept);
      uint32_t* words = x[octet] + step * FOUR<P>;
      FE_UNROLL for (int i = 0; i < 4; ++i) if (!kept[i]) words[i * FOUR<P> / 4] &= IS_HALF<P> ? (i % 2 ? 0xffffu : 0xffff0000u) : 0u;
    }
  }

  // The warp's columns of the strip times p, to shared memory.
  FE_DEVICE void contract_columns() {
    FragmentA<P> a[S::TILES][STEPS];
    FE_UNROLL for (int tile = 0; tile < S::TILES; ++tile) FE_UNROLL for (int step = 0; step < STEPS; ++step) {
      uint32_t words[2 * FOUR<P>];
      FE_UNROLL for (int i = 0; i < FOUR<P>; ++i) {
        words[i] = x[2 * tile][step * FOUR<P> + i];
        words[FOUR<P> + i] = x[2 * tile + 1][step * FOUR<P> + i];
      }
      a[tile][step] = fragment_of<P, 8>(words);
    }
    FE_UNROLL for (int q = 0; q < S::RANK_TILES; ++q) {
      uint32_t words[S::ROW_WORDS];
      FE_UNROLL for (int unit = 0; unit < S::UNITS; ++unit) {
        const Words read = *reinterpret_cast<const Words*>(packed + ((q * S::UNITS + unit) * 32 + lane()) * 4);
        FE_UNROLL for (int i = 0; i < 4; ++i) words[4 * unit + i] = read.w[i];
      }
      float sum[S::TILES][4] = {};
      FE_UNROLL for (int step = 0; step < STEPS; ++step) {
        const FragmentB<P> b = fragment_of<P, 4>(words + step * FOUR<P>);
        FE_UNROLL for (int tile = 0; tile < S::TILES; ++tile) mma(sum[tile], a[tile][step], b);
      }
      FE_UNROLL for (int tile = 0; tile < S::TILES; ++tile) {
        float* to = partials + warp() * S::PARTIAL + ((tile * S::RANK_TILES + q) * 32 + lane()) * 4;
        store_words(to, unit_of<float>(sum[tile]));
      }
    }
  }

  // Columns 16 `part` ... of the warp's of a tile of 16 rows, transposed: rows of A are columns of x as g_column says.
  FE_DEVICE FragmentA<P> transposed(int tile, int part) const {
    FragmentA<P> a;
    if constexpr (IS_HALF<P>) {
      FE_UNROLL for (int i = 0; i < 4; ++i) a.word[i] = transpose_8x8(x[2 * tile + i % 2][2 * part + i / 2]);
    } else {
      float v[8];
      FE_UNROLL for (int i = 0; i < 8; ++i) v[i] = turn[inner_index(t, i % 4) * S::PITCH + 16 * part + i / 4 * 8 + g];
      a = FragmentA<P>::of(v);
    }
    return a;
  }
  // Column, in the warp's, of row g (`half` 0) or g + 8 (1) of fragment `part`.
  FE_DEVICE int g_column(int part, int half) const {
    return IS_HALF<P> ? 8 * (g / 2) + 2 * (2 * part + half) + g % 2 : 16 * part + 8 * half + g;
  }

  FE_DEVICE void contract_rows() {
    FE_UNROLL for (int tile = 0; tile < S::TILES; ++tile) {
      if constexpr (!IS_HALF<P>) {
        sync_warp();
        FE_UNROLL for (int octet = 0; octet < 2; ++octet) FE_UNROLL for (int step = 0; step < STEPS; ++step) {
          Words words;
          FE_UNROLL for (int i = 0; i < 4; ++i) words.w[i] = x[2 * tile + octet][4 * step + i];
          store_words(turn + (8 * octet + g) * S::PITCH + step_column(step), words);
        }
        sync_warp();
      }
      const FragmentA<P> a[2] = {transposed(tile, 0), transposed(tile, 1)};
      FE_UNROLL for (int q = 0; q < S::RANK_TILES; ++q) {
        const FragmentB<P> b = fragment_of<P, 4>(c_words + ((tile * S::RANK_TILES + q) * 32 + lane()) * FOUR<P>);
        FE_UNROLL for (int part = 0; part < 2; ++part) mma(sum_g[part][q], a[part], b);
      }
    }
  }

  // Sums over the warps, in order.
  FE_DEVICE void write_u(int64_t row) {
    constexpr int PAIRS = S::PARTIAL / 2;
    float* u = p.u + block_y() * p.rows * p.ranks + rank;
    for (int pair = thread(); pair < PAIRS; pair += WALK_THREADS) {
      float first = 0.f, second = 0.f;
      FE_UNROLL for (int w = 0; w < WALK_WARPS; ++w) {
        first += partials[w * S::PARTIAL + 2 * pair];
        second += partials[w * S::PARTIAL + 2 * pair + 1];
      }
      const int at = pair / 2 % 32, tile = pair / 64;
      const int64_t m = row + tile / S::RANK_TILES * 16 + pair % 2 * 8 + at / 4;
      if (m < end) {
        float* to = u + m * p.ranks + tile % S::RANK_TILES * 8 + at % 4 * 2;
        to[0] = first * p.dropout.inverse;
        to[1] = second * p.dropout.inverse;
      }
    }
  }

  FE_DEVICE void write_g() {
    float* to = p.g + block_x() * p.columns * p.ranks + rank + 2 * t;
    FE_UNROLL for (int part = 0; part < 2; ++part) FE_UNROLL for (int half = 0; half < 2; ++half) {
      const int64_t n = column + g_column(part, half);
      if (n >= p.columns) continue;
      FE_UNROLL for (int q = 0; q < S::RANK_TILES; ++q) {
        to[n * p.ranks + 8 * q] = sum_g[part][q][2 * half];
        to[n * p.ranks + 8 * q + 1] = sum_g[part][q][2 * half + 1];
      }
    }
  }

  FE_DEVICE void write_sums() {
    FE_UNROLL for (int unit = 0; unit < S::UNITS; ++unit) FE_UNROLL for (int i = 0; i < S::COUNT; ++i) {
      float total = sums[unit][i];
      FE_UNROLL for (int mask = 4; mask < 32; mask *= 2) total += shuffle_xor(total, mask);
      const int64_t n = column + (4 * unit + t) * S::COUNT + i;
      if (g == 0 && n < p.columns) p.sums[block_x() * p.sums_pitch + n] = total;
    }
  }

  FE_DEVICE void run() {
    if (U) keep_p();
    load_strip(begin, x);
    uint32_t c[S::C_EACH];
    if constexpr (G) {
      load_c(begin, c);
      store_c(c);
      sync_block();
    }
    const bool want_sums = G && p.sums != nullptr && block_z() == 0;
    for (int64_t row = begin; row < end; row += S::STRIP) {
      uint32_t next[S::OCTETS][S::ROW_WORDS];
      load_strip(row + S::STRIP, next);
      if constexpr (G) load_c(row + S::STRIP, c);
      if (want_sums) add_columns();
      if constexpr (!(U && G))
        if (p.dropout.seed != nullptr) drop(row);
      if constexpr (U) contract_columns();
      if constexpr (G) contract_rows();
      sync_block();
      if constexpr (U) write_u(row);
      if constexpr (G) store_c(c);
      sync_block();
      FE_UNROLL for (int octet = 0; octet < S::OCTETS; ++octet) FE_UNROLL for (int i = 0; i < S::ROW_WORDS; ++i) x[octet][i] =
          next[octet][i];
    }
    if constexpr (G) write_g();
    if (want_sums) write_sums();
  }
};

// Block (i, j, k) owns region i of the rows, columns j of WALK_COLUMNS and ranks k of RB.
template <Precision P, int RB, bool U, bool G, bool WIDE>
FE_KERNEL(WALK_THREADS, (WalkShape<P, RB, U, G, WIDE>::BLOCKS))
walk_kernel(FE_PARAMETER WalkParams p) {
  Walk<P, RB, U, G, WIDE>(p).run();
}

template <Precision P, int RB, bool U, bool G, bool WIDE>
cudaError_t launch_walk(const WalkParams& p, cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(p.rows, p.region_rows)), unsigned(ceil_div(p.columns, WALK_COLUMNS)), unsigned(p.ranks / RB));
  return launch(walk_kernel<P, RB, U, G, WIDE>, {grid, WALK_THREADS, WalkShape<P, RB, U, G, WIDE>::SHARED, stream}, p);
}

template <Precision P, int RB, bool WIDE>
cudaError_t launch_wanted(const WalkParams& p, cudaStream_t stream) {
  if (p.u == nullptr) return launch_walk<P, RB, false, true, WIDE>(p, stream);
  return p.g == nullptr ? launch_walk<P, RB, true, false, WIDE>(p, stream) : launch_walk<P, RB, true, true, WIDE>(p, stream);
}

template <Precision P>
cudaError_t launch_width(const WalkParams& p, cudaStream_t stream) {
  if (!p.wide) return launch_wanted<P, 16, false>(p, stream);
  if (p.ranks == 16) return launch_wanted<P, 16, true>(p, stream);
  if constexpr (IS_HALF<P>)
    if (p.ranks >= 64) return launch_wanted<P, 64, true>(p, stream);
  return launch_wanted<P, 32, true>(p, stream);
}

cudaError_t launch_lowrank_walk(const WalkParams& p, cudaStream_t stream) {
  switch (p.precision) {
    case Precision::tf32x3:
      return launch_width<Precision::tf32x3>(p, stream);
    case Precision::tf32:
      return launch_width<Precision::tf32>(p, stream);
    case Precision::bf16:
      return launch_width<Precision::bf16>(p, stream);
    default:
      return launch_width<Precision::f16>(p, stream);
  }
}

}  // namespace fe::cuda
