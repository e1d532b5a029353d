// SPDX-License-Identifier: Apache-2.0
#include "../fisher_sums.h"

#include "fisher_samples.h"

namespace fe::cuda {
namespace {

constexpr const char* OP = "fisher_sums_";
// What a split costs: sums of a tile to the workspace and back (modelled for an H200).
constexpr int64_t TURN = 32;
// Blocks for each multiprocessor where samples have one token.
constexpr int64_t SINGLE_BLOCKS = 4;

void products(FisherSums& p, const at::Tensor& x) {
  const int64_t tiles = tiles_of(p), groups = ceil_div(p.d_out, FISHER_TILE) + ceil_div(p.d_in, FISHER_TILE);
  p.splits = int32_t(choose_splits(tiles, p.samples, work_of(p, false), TURN, multiprocessors(x)));
  const at::Tensor work = at::empty({fisher_sums_work(tiles, p.splits)}, x.options().dtype(at::kFloat));
  at::Tensor used;
  p.work = work.data_ptr<float>(), p.counters = counters(x, groups, used);
  check(launch_fisher_sums(p, current_stream(x)), OP, described(x));
}

void singles(FisherSums& p, const at::Tensor& x) {
  const int64_t columns = single_sums_columns(p.dtype, p.wide), groups = ceil_div(p.d_in, columns) + ceil_div(p.d_out, columns);
  const int64_t most = ceil_div(p.tokens, SINGLE_SUMS_TOKENS);
  p.chunks = int32_t(std::min(most, ceil_div(SINGLE_BLOCKS * multiprocessors(x), groups)));
  const at::Tensor work = at::empty({single_sums_work(p.tokens, groups, p.chunks, columns)}, x.options().dtype(at::kFloat));
  at::Tensor used;
  p.work = work.data_ptr<float>(), p.counters = counters(x, groups, used);
  check(launch_single_sums(p, current_stream(x)), OP, described(x));
}

}  // namespace

void fisher_sums(at::Tensor rows, at::Tensor columns, const at::Tensor& x, const at::Tensor& dy, const std::string& squares, double weight,
                 const std::optional<at::Tensor>& cu_seqlens) {
  arguments::fisher_sums(DEVICE, rows, columns, x, dy, squares, cu_seqlens);
  if (x.numel() == 0 || dy.numel() == 0 || (cu_seqlens && cu_seqlens->numel() < 2)) return;
  const c10::DeviceGuard guard(x.device());
  const bool batch = squares == "batch", single = !batch && single_tokens(x, cu_seqlens);
  const at::Tensor offsets = cu_seqlens ? cu_seqlens->contiguous() : at::Tensor();
  const at::Tensor of_x = batch ? as_rows(x) : x, of_dy = batch ? as_rows(dy) : dy;  // a batch is one sample
  FisherSums p{};
  describe(p, of_x, of_dy, weight, offsets, single);
  p.rows = rows.data_ptr<float>(), p.columns = columns.data_ptr<float>();
  p.row = rows.stride(0), p.column = columns.stride(0);
  single ? singles(p, of_x) : products(p, of_x);
}

}  // namespace fe::cuda
