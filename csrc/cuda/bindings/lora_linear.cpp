// SPDX-License-Identifier: Apache-2.0
// LoRA linear: the low-rank terms by kernels, the base products by BLAS on top of them.
#include <algorithm>
#include <cmath>

#include "../lowrank.h"
#include "tensors.h"

namespace fe::cuda {
namespace {

constexpr int EXPAND_ROWS = 32, MIN_REGION = 32;

// Parts of one allocation.
struct Workspace {
  int64_t bytes = 0;
  at::Tensor memory;

  int64_t take(int64_t size) {
    const int64_t at = bytes;
    bytes += ceil_div(size, 256) * 256;
    return at;
  }
  void allocate(const at::Tensor& like) { memory = at::empty({bytes}, like.options().dtype(at::kByte)); }
  template <class T = void>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(memory.data_ptr()) + offset);
  }
};

Dropout dropout_of(double p, const std::optional<at::Tensor>& seed) {
  if (p == 0.0 || !seed) return {};
  const double rounded = std::nearbyint(p * 4294967296.0);
  return {seed->data_ptr<int64_t>(), rounded >= 4294967295.0 ? 0xFFFFFFFFu : uint32_t(rounded), p >= 1.0 ? 0.f : float(1.0 / (1.0 - p))};
}

// An adapter with more ranges of rows than a launch takes: its B on all rows, zero where it owns none.
struct Spread {
  size_t adapter;
  at::Tensor b, db;     // [d_out, rank]
  at::Tensor gradient;  // of the adapter's own B
};

// The adapters of one call, in tables of as many as a launch takes.
struct Adapters {
  const Tensors &lora_as, &lora_bs;
  const OptionalTensors& scales;
  std::vector<std::vector<RowRange>> ranges;
  std::vector<AdapterTable> tables;
  std::vector<Spread> spread;
  int64_t d_out, lo, hi = 0;  // output rows outside [lo, hi) have no owner
  int32_t rank = 0, ranks;

  Adapters(const at::Tensor& weight, const Tensors& as, const Tensors& bs, const OptionalTensors& ss, const std::vector<double>& factors,
           const std::vector<int64_t>& rows)
      : lora_as(as), lora_bs(bs), scales(ss), ranges(as.size()), d_out(weight.size(0)), lo(d_out) {
    std::vector<int32_t> used(as.size(), 0);
    for (size_t i = 0; i + 2 < rows.size(); i += 3) {
      const int64_t start = rows[i + 1], stop = rows[i + 2];
      ranges[rows[i]].push_back({int32_t(start), int32_t(stop), used[rows[i]]});
      used[rows[i]] += int32_t(stop - start);
      lo = std::min(lo, start), hi = std::max(hi, stop);
    }
    hi = std::max(lo, hi);
    for (size_t i = 0; i < as.size(); ++i) add(i, factors[i]);
    ranks = padded_rank(rank);
    tables.back().last = ranks;  // with the padding
  }

  void add(size_t i, double factor) {
    at::Tensor b = lora_bs[i];
    std::vector<RowRange> own = ranges[i];
    if (own.size() > LOWRANK_RANGES) {
      b = at::zeros({d_out, b.size(1)}, b.options());
      for (const RowRange& r : own) b.slice(0, r.start, r.stop).copy_(owned(lora_bs[i], r));
      own = {{0, int32_t(d_out), 0}};
      spread.push_back({i, b, {}, {}});
    }
    if (tables.empty() || tables.back().count == LOWRANK_ADAPTERS || used_ranges() + own.size() > LOWRANK_RANGES) {
      tables.push_back({});
      tables.back().first = rank;
    }
    AdapterTable& table = tables.back();
    LowrankAdapter& e = table.adapters[table.count];
    e.a = matrix(lora_as[i]), e.b = matrix(b);
    const Scale s = scale_of(scales[i], factor);
    e.scale = s.data, e.scale_dtype = s.dtype, e.scale_stride = s.stride, e.factor = s.factor;
    e.one_scale = scales[i] && scales[i]->dim() == 0;
    e.first = rank, e.rank = int32_t(lora_as[i].size(0));
    e.first_range = int32_t(used_ranges()), e.ranges = int32_t(own.size());
    std::copy(own.begin(), own.end(), table.ranges + e.first_range);
    ++table.count;
    rank += e.rank;
    table.last = rank;
  }
  size_t used_ranges() const {
    const AdapterTable& table = tables.back();
    if (table.count == 0) return 0;
    const LowrankAdapter& last = table.adapters[table.count - 1];
    return last.first_range + last.ranges;
  }

  // Allocates the gradients that `needs` asks for, in its order, and makes the tables point to them.
  void gradients(const std::vector<bool>& needs, Tensors& out) {
    size_t need = 3;  // those of x, weight and bias come before
    const auto each_needed = [&](const auto& allocate) {
      size_t i = 0;
      for (AdapterTable& table : tables)
        for (int32_t k = 0; k < table.count; ++k, ++i, ++need)
          if (needs[need]) allocate(table.adapters[k], i);
    };
    const auto dense = [&](const at::Tensor& like) {
      out.push_back(at::empty(like.sizes(), like.options()));
      return out.back().data_ptr();
    };
    each_needed([&](LowrankAdapter& e, size_t i) { e.da = dense(lora_as[i]); });
    each_needed([&](LowrankAdapter& e, size_t i) {
      e.db = dense(lora_bs[i]);
      for (Spread& s : spread)
        if (s.adapter == i) {
          s.gradient = out.back();
          s.db = at::empty_like(s.b);
          e.db = s.db.data_ptr();
        }
    });
    each_needed([&](LowrankAdapter& e, size_t i) { e.ds = dense(*scales[i]); });
  }
  // Rows of spread gradients to where they belong.
  void collect() const {
    for (const Spread& s : spread)
      if (s.db.defined())
        for (const RowRange& r : ranges[s.adapter]) owned(s.gradient, r).copy_(s.db.slice(0, r.start, r.stop));
  }

 private:
  static at::Tensor owned(const at::Tensor& b, const RowRange& r) { return b.narrow(0, r.offset, r.stop - r.start); }
};

// What kernels need to know about a call besides its adapters.
struct Setting {
  Dtype dtype;
  Precision precision;
  Dropout dropout;
  int64_t rows;
  int32_t ranks;
  int processors;
  cudaStream_t stream;

  Setting(const at::Tensor& x, int32_t ranks, double dropout_p, const std::optional<at::Tensor>& seed)
      : dtype(dtype_of(x)),
        precision(dtype == Dtype::f32    ? float_precision(Precision::tf32)
                  : dtype == Dtype::bf16 ? Precision::bf16
                                         : Precision::f16),
        dropout(dropout_of(dropout_p, seed)),
        rows(x.size(0)),
        ranks(ranks),
        processors(multiprocessors(x)),
        stream(current_stream(x)) {}

  int64_t size() const { return element_size(dtype); }
};

void checked(cudaError_t status, const at::Tensor& x) {
  if (status != cudaSuccess) check(status, "lora_linear", described(x));
}

// How a matrix [rows, columns] is walked over.
struct Plan {
  at::Tensor x;
  int64_t blocks, regions, region_rows;
  bool wide;

  // Blocks side by side share the rows, and all of them are under way at once: sums over a region's rows cost memory, `waves` of them.
  Plan(const Setting& s, at::Tensor matrix, int64_t waves)
      : x(std::move(matrix)), blocks(ceil_div(x.size(1), WALK_COLUMNS)), wide(fe::cuda::wide(x)) {
    const int64_t at_once = wide ? std::min(s.ranks, s.dtype == Dtype::f32 ? 32 : 64) : 16;
    const int64_t most = std::max<int64_t>(1, waves * s.processors / (blocks * (s.ranks / at_once)));
    region_rows = ceil_div(std::max<int64_t>(1, ceil_div(s.rows, most)), MIN_REGION) * MIN_REGION;
    regions = ceil_div(s.rows, region_rows);
  }
  WalkParams params(const Setting& s) const {
    WalkParams w{};
    w.x = matrix(x), w.rows = s.rows, w.columns = x.size(1);
    w.p_pitch = blocks * WALK_COLUMNS;
    w.region_rows = region_rows, w.ranks = s.ranks, w.precision = s.precision, w.wide = wide;
    return w;
  }
};
constexpr int64_t WAVES = 2, WAVES_OF_U = 4;  // blocks per multiprocessor

PackParams pack_params(const Setting& s, bool walk_a) {
  PackParams p{};
  p.ranks = s.ranks, p.dtype = s.dtype, p.walk_a = walk_a;
  return p;
}
int64_t expand_pitch(int64_t columns) {
  return ceil_div(columns, EXPAND_COLUMNS) * EXPAND_COLUMNS;
}
void launch_pack(PackParams p, const Adapters& adapters, const Setting& s, const at::Tensor& x) {
  for (const AdapterTable& table : adapters.tables) {
    p.table = table;
    checked(launch_lowrank_pack(p, s.stream), x);
  }
}

ExpandParams expand_params(const Setting& s, const Adapters& adapters, const float* u, int64_t parts, int64_t columns) {
  ExpandParams e{};
  e.u = u, e.parts = parts, e.rows = s.rows, e.columns = columns, e.rank = adapters.rank, e.ranks = s.ranks, e.precision = s.precision;
  // Few rows leave processors idle: then blocks share the columns.
  const int64_t wanted = ceil_div(WAVES_OF_U * s.processors, std::max<int64_t>(1, ceil_div(s.rows, EXPAND_ROWS)));
  e.split = ceil_div(ceil_div(columns, wanted), WALK_COLUMNS) * WALK_COLUMNS;
  return e;
}

std::vector<int64_t> with_last(const at::Tensor& like, int64_t last) {
  std::vector<int64_t> sizes = like.sizes().vec();
  sizes.back() = last;
  return sizes;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> lora_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                               const Tensors& lora_as, const Tensors& lora_bs, const OptionalTensors& scales,
                                               const std::vector<double>& factors, const std::vector<int64_t>& rows, double dropout_p,
                                               const std::optional<at::Tensor>& seed) {
  arguments::lora_linear(DEVICE, x, weight, bias, lora_as, lora_bs, scales, factors, rows, dropout_p, seed);
  const c10::DeviceGuard guard(x.device());
  if (empty::linear(x, weight)) return empty::lora_linear(x, weight, bias, lora_as);
  const Adapters adapters(weight, lora_as, lora_bs, scales, factors, rows);
  const at::Tensor x2 = as_rows(x);
  const int64_t d_out = weight.size(0), d_in = weight.size(1), m = x2.size(0);
  at::Tensor y = at::empty(with_last(x, d_out), x.options());
  at::Tensor z = at::empty({m, adapters.rank}, x.options().dtype(at::kFloat));
  const Setting s(x2, adapters.ranks, dropout_p, seed);
  const Plan plan(s, x2, WAVES_OF_U);

  PackParams pack = pack_params(s, true);
  pack.walk_columns = d_in, pack.walk_pitch = plan.blocks * WALK_COLUMNS, pack.expand_columns = d_out,
  pack.expand_pitch = expand_pitch(d_out);
  Workspace space;
  const int64_t a = space.take(pack.walk_pitch * s.ranks * s.size()), b = space.take(pack.expand_pitch * s.ranks * s.size());
  const int64_t u = space.take(plan.blocks * m * s.ranks * 4);
  space.allocate(x);
  pack.walk = space.at(a), pack.expand = space.at(b);
  launch_pack(pack, adapters, s, x);

  WalkParams walk = plan.params(s);
  walk.p = space.at(a), walk.u = space.at<float>(u), walk.dropout = s.dropout;
  checked(launch_lowrank_walk(walk, s.stream), x);

  const at::Tensor dense_bias = bias ? bias->contiguous() : at::Tensor();
  at::Tensor y2 = y.view({m, d_out});
  ExpandParams expand = expand_params(s, adapters, space.at<float>(u), plan.blocks, d_out);
  expand.z = z.data_ptr<float>(), expand.f = space.at(b), expand.y = y.data_ptr();
  if (bias) expand.bias = dense_bias.data_ptr(), expand.bias_dtype = dtype_of(dense_bias);
  checked(launch_lowrank_expand(expand, s.stream), x);
  y2.addmm_(x2, weight.t());
  return {y, z};
}

namespace {

// What a backward has to compute.
struct Needs {
  bool x, weight, bias, a, b, s;

  explicit Needs(const std::vector<bool>& needs) : x(needs[0]), weight(needs[1]), bias(needs[2]) {
    const size_t adapters = (needs.size() - 3) / 3;
    const auto any = [&](size_t kind) {
      const auto first = needs.begin() + 3 + kind * adapters, last = first + adapters;
      return std::find(first, last, true) != last;
    };
    a = any(0), b = any(1), s = any(2);
  }
  bool u() const { return x || a; }
  bool g() const { return b || s; }
  bool sums() const { return bias && g(); }  // in the pass over dy that g takes anyway
};

struct Gradients {
  at::Tensor x, bias;
};

// Everything but the base products: dx = drop(u A), dbias if there is a pass over dy for it, and the gradients in the adapters' tables.
void low_rank_backward(const at::Tensor& dy, const std::optional<at::Tensor>& x, const std::optional<at::Tensor>& z, int64_t d_in,
                       const Adapters& adapters, const Needs& needs, const Setting& s, const Gradients& to) {
  const int64_t m = s.rows, d_out = dy.size(1);
  const int64_t lo = needs.sums() ? 0 : adapters.lo, owned = (needs.sums() ? d_out : adapters.hi) - lo;
  const Plan over_dy(s, dy.narrow(1, lo, owned), needs.g() ? WAVES : WAVES_OF_U);

  PackParams pack = pack_params(s, false);
  pack.walk_first = lo, pack.walk_columns = owned, pack.walk_pitch = over_dy.blocks * WALK_COLUMNS;
  pack.expand_columns = d_in, pack.expand_pitch = expand_pitch(d_in);
  std::optional<Plan> over_x;
  if (needs.a) over_x.emplace(s, as_rows(*x), WAVES);
  const int64_t bias_pitch = ceil_div(owned, 4) * 4, groups = finish_groups(owned, s.ranks);
  Workspace space;
  const int64_t counter = space.take(4);
  const int64_t b = space.take(needs.u() ? pack.walk_pitch * s.ranks * s.size() : 0);
  const int64_t a = space.take(needs.x ? pack.expand_pitch * s.ranks * s.size() : 0);
  const int64_t u = space.take(needs.u() ? over_dy.blocks * m * s.ranks * 4 : 0), u_t = space.take(needs.a ? m * s.ranks * s.size() : 0);
  const int64_t g = space.take(needs.g() ? over_dy.regions * owned * s.ranks * 4 : 0);
  const int64_t sums = space.take(needs.sums() ? over_dy.regions * bias_pitch * 4 : 0);
  const int64_t ga = space.take(needs.a ? over_x->regions * d_in * s.ranks * 4 : 0);
  const int64_t dots = space.take(needs.s ? groups * s.ranks * 4 : 0);
  space.allocate(dy);

  pack.counter = space.at<uint32_t>(counter);
  if (needs.u()) pack.walk = space.at(b);
  if (needs.x) pack.expand = space.at(a);
  if (needs.u() || needs.s) launch_pack(pack, adapters, s, dy);

  WalkParams walk = over_dy.params(s);
  if (needs.u()) walk.p = space.at(b), walk.u = space.at<float>(u);
  if (needs.g()) walk.c = z->data_ptr(), walk.c_dtype = Dtype::f32, walk.c_columns = adapters.rank, walk.g = space.at<float>(g);
  if (needs.sums()) walk.sums = space.at<float>(sums), walk.sums_pitch = bias_pitch;
  checked(launch_lowrank_walk(walk, s.stream), dy);

  if (needs.u()) {
    ExpandParams expand = expand_params(s, adapters, space.at<float>(u), over_dy.blocks, d_in);
    if (needs.a) expand.u_t = space.at(u_t);
    if (needs.x) expand.f = space.at(a), expand.y = to.x.data_ptr(), expand.dropout = s.dropout;
    checked(launch_lowrank_expand(expand, s.stream), dy);
  }
  if (needs.a) {
    WalkParams by_x = over_x->params(s);
    by_x.c = space.at(u_t), by_x.c_dtype = s.dtype, by_x.c_columns = s.ranks, by_x.g = space.at<float>(ga), by_x.dropout = s.dropout;
    checked(launch_lowrank_walk(by_x, s.stream), dy);
  }
  if (!needs.a && !needs.g()) return;

  FinishParams finish{};
  if (needs.a) finish.a = {space.at<float>(ga), over_x->regions, d_in * s.ranks, d_in * s.ranks};
  if (needs.g()) finish.b = {space.at<float>(g), over_dy.regions, owned * s.ranks, owned * s.ranks};
  if (needs.sums()) finish.bias = {space.at<float>(sums), over_dy.regions, bias_pitch, bias_pitch};
  if (needs.sums()) finish.dbias = to.bias.data_ptr(), finish.bias_dtype = dtype_of(to.bias);
  if (needs.s) finish.dots = space.at<float>(dots);
  finish.counter = space.at<uint32_t>(counter);
  finish.first_row = lo, finish.columns = d_out, finish.inverse = s.dropout.inverse, finish.ranks = s.ranks;
  for (const AdapterTable& table : adapters.tables) {
    finish.table = table;
    checked(launch_lowrank_finish(finish, s.stream), dy);
  }
}

}  // namespace

Tensors lora_linear_backward(const at::Tensor& dy, const std::optional<at::Tensor>& x, const at::Tensor& weight,
                             const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& z, const Tensors& lora_as,
                             const Tensors& lora_bs, const OptionalTensors& scales, const std::vector<double>& factors,
                             const std::vector<int64_t>& rows, double dropout_p, const std::optional<at::Tensor>& seed,
                             const std::vector<bool>& needed) {
  arguments::lora_linear_backward(DEVICE, dy, x, weight, bias, z, lora_as, lora_bs, scales, factors, rows, dropout_p, seed, needed);
  const c10::DeviceGuard guard(dy.device());
  if (empty::linear(dy, weight)) return empty::lora_linear_backward(dy, weight, bias, lora_as, lora_bs, scales, needed);
  const Needs needs(needed);
  Adapters adapters(weight, lora_as, lora_bs, scales, factors, rows);
  const at::Tensor dy2 = as_rows(dy);
  const int64_t m = dy2.size(0), d_in = weight.size(1);
  Tensors out;
  Gradients to;
  if (needs.x) out.push_back(to.x = at::empty(with_last(dy, d_in), dy.options()));
  if (needs.weight) out.push_back(at::mm(dy2.t(), as_rows(*x)));
  if (needs.bias) {
    to.bias = needs.sums() ? at::empty(bias->sizes(), bias->options()) : dy2.sum(0, false, at::kFloat).to(bias->scalar_type());
    out.push_back(to.bias);
  }
  adapters.gradients(needed, out);
  if (!needs.u() && !needs.g()) return out;
  const Setting s(dy2, adapters.ranks, dropout_p, seed);
  low_rank_backward(dy2, x, z, d_in, adapters, needs, s, to);
  if (needs.x) to.x.view({m, d_in}).addmm_(dy2, weight);
  adapters.collect();
  return out;
}

}  // namespace fe::cuda
