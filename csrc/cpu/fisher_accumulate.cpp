// Fisher accumulation on the CPU: cuts F into blocks of equal size, enough of them to keep all threads busy.
#include "tensors.h"

namespace fe {
namespace {

struct Grid {
  int64_t rows, columns, row_size, column_size;
};

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Fewest blocks of at most fisher_block per side whose number leaves no thread idle for more than a tenth of the time.
Grid grid_for(int64_t d_out, int64_t d_in, int64_t threads) {
  const Kernels& k = kernels();
  auto size = [](int64_t n, int64_t blocks, int64_t unit) { return ceil_div(ceil_div(n, blocks), unit) * unit; };
  Grid best{};
  double best_waste = 1e9;
  const int64_t rows0 = ceil_div(d_out, k.fisher_block), columns0 = ceil_div(d_in, k.fisher_block);
  for (int64_t extra = 0; extra < 2 * threads && best_waste > 1.1; ++extra) {
    for (int64_t wide = 0; wide < 2; ++wide) {
      const int64_t row_size = size(d_out, rows0 + (wide ? 0 : extra), k.fisher_tile_rows);
      const int64_t column_size = size(d_in, columns0 + (wide ? extra : 0), k.fisher_tile_columns);
      const Grid grid{ceil_div(d_out, row_size), ceil_div(d_in, column_size), row_size, column_size};
      const double rounds = double(ceil_div(grid.rows * grid.columns, threads));
      const double waste = rounds * threads * double(row_size * column_size) / (double(d_out) * double(d_in));
      if (waste < best_waste * 0.999) best_waste = waste, best = grid;
    }
  }
  return best;
}

std::vector<int64_t> sample_bounds(const at::Tensor& x, const std::string& squares, const std::optional<at::Tensor>& cu_seqlens,
                                   int64_t rows, bool one_token) {
  if (squares == "batch" || one_token) return {0, rows};
  if (cu_seqlens) {
    const at::Tensor offsets = cu_seqlens->to(at::kLong).contiguous();
    return {offsets.data_ptr<int64_t>(), offsets.data_ptr<int64_t>() + offsets.numel()};
  }
  std::vector<int64_t> bounds(x.size(0) + 1);
  for (int64_t n = 0; n <= x.size(0); ++n) bounds[n] = n * x.size(1);
  return bounds;
}

}  // namespace

void fisher_accumulate(at::Tensor fisher, const at::Tensor& x, const at::Tensor& dy, const std::string& squares, double weight,
                       const std::optional<at::Tensor>& cu_seqlens) {
  arguments::fisher_accumulate(DEVICE, fisher, x, dy, squares, cu_seqlens);
  if (x.numel() == 0 || dy.numel() == 0 || (cu_seqlens && cu_seqlens->numel() < 2)) return;
  const at::Tensor x2 = as_rows(x), dy2 = as_rows(dy);
  const int64_t rows = x2.size(0), d_out = fisher.size(0), d_in = fisher.size(1);
  at::Tensor target = fisher.stride(1) == 1 || d_in == 1 ? fisher : fisher.contiguous();
  const bool one_token = squares == "sample" && !cu_seqlens && rows == x.size(0);
  const std::vector<int64_t> bounds = sample_bounds(x, squares, cu_seqlens, rows, one_token);
  FisherBlock p;
  p.x = matrix(x2), p.dy = matrix(dy2), p.fisher = matrix(target);
  p.bounds = bounds.data(), p.samples = int64_t(bounds.size()) - 1;
  p.square_inputs = one_token;
  p.weight = float(weight);
  const int64_t threads = at::get_num_threads();
  const Grid grid = grid_for(d_out, d_in, threads);
  auto block = [&](int64_t index) {
    FisherBlock b = p;
    b.i0 = index / grid.columns * grid.row_size, b.i1 = std::min(d_out, b.i0 + grid.row_size);
    b.j0 = index % grid.columns * grid.column_size, b.j1 = std::min(d_in, b.j0 + grid.column_size);
    return b;
  };
  const int64_t blocks = grid.rows * grid.columns, parts = std::min(threads, blocks);
  const int64_t scratch = kernels().fisher_scratch(block(0));
  at::Tensor memory = floats(parts * scratch);
  over_parts(parts, blocks, [&](int64_t part, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels().fisher(block(i), memory.data_ptr<float>() + part * scratch);
  });
  if (!target.is_same(fisher)) fisher.copy_(target);
}

}  // namespace fe
