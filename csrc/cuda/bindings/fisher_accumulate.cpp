#include "../fisher_accumulate.h"

#include "tensors.h"

namespace fe::cuda {
namespace {

constexpr const char* OP = "fisher_accumulate_";
// Tiles that do not fill the device are multiplied by splitting the samples. TURN is what a split costs at F, reading and writing a tile, as
// the 16-bit products of that many tokens (modelled for an H200).
constexpr int64_t TURN = 256, MAX_SPLITS = 32;
constexpr int64_t TOKENS_OF_A_PRODUCT = 16;

// The number of splits with the least modelled time: whole waves of blocks, and turns at F. `work` is that of a sample in tokens.
int64_t choose_splits(int64_t tiles, int64_t samples, int64_t work, int64_t multiprocessors) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t splits = 1; splits <= std::min(samples, MAX_SPLITS); ++splits) {
    const int64_t waves = ceil_div(tiles * splits, multiprocessors);
    const int64_t cost = waves * ceil_div(samples, splits) * work + (waves + splits - 1) * TURN;
    if (cost < least) best = splits, least = cost;
  }
  return best;
}

// How much longer products take than those of 16-bit numbers.
int64_t relative_cost(Dtype dtype, Precision precision, bool single) {
  if (dtype != Dtype::f32) return single ? 6 : 1;
  return precision == Precision::tf32x3 ? 6 : 2;
}

// Tokens of single rows are samples of one token, as the kernel that squares them takes them.
FisherTokens tokens_of(const at::Tensor& t, bool single) {
  if (t.dim() == 3 && !single) return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
  return {t.data_ptr(), 0, t.stride(0), t.stride(t.dim() - 1)};
}

bool wide(const FisherTokens& t, int64_t columns, int64_t element_size) {
  const int64_t count = 16 / element_size;
  return t.column == 1 && columns % count == 0 && t.token % count == 0 && t.sample % count == 0 &&
         reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
}

void products(const at::Tensor& fisher, const at::Tensor& x, const at::Tensor& dy, double weight,
              const std::optional<at::Tensor>& cu_seqlens) {
  const bool single = !cu_seqlens && (x.dim() == 2 || x.size(1) == 1);
  const at::Tensor offsets = cu_seqlens ? cu_seqlens->contiguous() : at::Tensor();
  FisherProducts p{};
  p.fisher = matrix(fisher);
  p.x = tokens_of(x, single), p.dy = tokens_of(dy, single);
  p.d_out = int32_t(fisher.size(0)), p.d_in = int32_t(fisher.size(1));
  p.weight = float(weight);
  p.dtype = dtype_of(x), p.precision = float_precision(Precision::tf32);
  p.wide = wide(p.x, p.d_in, x.element_size()) && wide(p.dy, p.d_out, x.element_size());
  if (cu_seqlens) p.cu_seqlens = offsets.data_ptr(), p.long_offsets = offsets.scalar_type() == at::kLong;
  p.samples = cu_seqlens ? offsets.numel() - 1 : single ? 1 : x.size(0);
  p.tokens = cu_seqlens || single ? x.size(0) : x.size(1);

  at::Tensor locks;
  p.splits = 1;
  if (p.fisher.dtype == Dtype::f32) {  // every split would round
    const int64_t tiles = ceil_div(p.d_out, FISHER_TILE) * ceil_div(p.d_in, FISHER_TILE);
    const int64_t tokens =
        single ? 1 : ceil_div(cu_seqlens ? ceil_div(p.tokens, p.samples) : p.tokens, TOKENS_OF_A_PRODUCT) * TOKENS_OF_A_PRODUCT;
    const int64_t work = tokens * relative_cost(p.dtype, p.precision, single);
    p.splits = int32_t(choose_splits(tiles, single ? p.tokens : p.samples, work, multiprocessors(fisher)));
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
