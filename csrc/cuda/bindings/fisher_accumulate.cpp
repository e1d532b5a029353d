// SPDX-License-Identifier: Apache-2.0
#include "../fisher_accumulate.h"

#include "fisher_samples.h"

namespace fe::cuda {
namespace {

constexpr const char* OP = "fisher_accumulate_";
// What a split costs at F, reading and writing a tile (modelled for an H200).
constexpr int64_t TURN = 256;

void products(const at::Tensor& fisher, const at::Tensor& x, const at::Tensor& dy, double weight,
              const std::optional<at::Tensor>& cu_seqlens) {
  const bool single = single_tokens(x, cu_seqlens);
  const at::Tensor offsets = cu_seqlens ? cu_seqlens->contiguous() : at::Tensor();
  FisherProducts p{};
  describe(p, x, dy, weight, offsets, single);
  p.fisher = matrix(fisher);
  at::Tensor locks;
  if (p.fisher.dtype == Dtype::f32) {  // every split would round
    const int64_t tiles = tiles_of(p), samples = single ? p.tokens : p.samples;
    p.splits = int32_t(choose_splits(tiles, samples, work_of(p, single), TURN, multiprocessors(fisher)));
    if (p.splits > 1) p.locks = counters(fisher, tiles + 1, locks);
  }
  check(single ? launch_fisher_single_tokens(p, current_stream(x)) : launch_fisher_samples(p, current_stream(x)), OP, described(x));
}

// G = sum_n dy_n^T x_n by BLAS, in fp32, then one pass over F.
void square_of_sum(const at::Tensor& fisher, const at::Tensor& x, const at::Tensor& dy, double weight) {
  const at::Tensor rows = as_rows(x), gradients = as_rows(dy).t();
  at::Tensor g;
  if (x.scalar_type() == at::kFloat)
    g = at::mm(gradients, rows);
  else if (x.is_cuda())
    g = at::mm(gradients, rows, at::kFloat);
  else
    g = at::mm(gradients.to(at::kFloat), rows.to(at::kFloat));
  const at::Tensor gradient = g.contiguous();
  const FisherSquare p{matrix(fisher), gradient.data_ptr<float>(), fisher.size(0), fisher.size(1), float(weight)};
  check(launch_fisher_square(p, current_stream(x)), OP, described(x));
}

}  // namespace

void fisher_accumulate(at::Tensor fisher, const at::Tensor& x, const at::Tensor& dy, const std::string& squares, double weight,
                       const std::optional<at::Tensor>& cu_seqlens) {
  arguments::fisher_accumulate(DEVICE, fisher, x, dy, squares, cu_seqlens);
  if (x.numel() == 0 || dy.numel() == 0 || (cu_seqlens && cu_seqlens->numel() < 2)) return;
  const c10::DeviceGuard guard(x.device());
  squares == "batch" ? square_of_sum(fisher, x, dy, weight) : products(fisher, x, dy, weight, cu_seqlens);
}

}  // namespace fe::cuda
