// SPDX-License-Identifier: Apache-2.0
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

// What all blocks of a call share, and the grid of them.
struct Work {
  at::Tensor x, dy;  // kept alive for the pointers in `shared`
  std::vector<int64_t> bounds;
  FisherBlock shared;
  int64_t d_out, d_in, threads = at::get_num_threads();
  Grid grid;

  Work(const at::Tensor& x_, const at::Tensor& dy_, const std::string& squares, const std::optional<at::Tensor>& cu_seqlens, bool one_token)
      : x(as_rows(x_)), dy(as_rows(dy_)), d_out(dy.size(1)), d_in(x.size(1)), grid(grid_for(d_out, d_in, threads)) {
    bounds = sample_bounds(x_, squares, cu_seqlens, x.size(0), one_token);
    shared.x = matrix(x), shared.dy = matrix(dy);
    shared.bounds = bounds.data(), shared.samples = int64_t(bounds.size()) - 1;
    shared.square_inputs = one_token;
  }
  Work(const Work&) = delete;

  int64_t blocks() const { return grid.rows * grid.columns; }

  // The block at (row, column) of the grid.
  FisherBlock block(int64_t row, int64_t column) const {
    FisherBlock b = shared;
    b.i0 = row * grid.row_size, b.i1 = std::min(d_out, b.i0 + grid.row_size);
    b.j0 = column * grid.column_size, b.j1 = std::min(d_in, b.j0 + grid.column_size);
    return b;
  }

  // f(block) makes the block of a place in the grid what the kernel is to do.
  template <class F>
  void run(const F& block_at) const {
    const int64_t parts = std::min(threads, blocks()), scratch = kernels().fisher_scratch(block_at(0, 0));
    at::Tensor memory = floats(parts * scratch);
    over_parts(parts, blocks(), [&](int64_t part, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        kernels().fisher(block_at(i / grid.columns, i % grid.columns), memory.data_ptr<float>() + part * scratch);
    });
  }
};

bool has_one_token(const at::Tensor& x, const std::string& squares, const std::optional<at::Tensor>& cu_seqlens) {
  return squares == "sample" && !cu_seqlens && empty::rows_of(x) == x.size(0);
}

bool nothing(const at::Tensor& x, const at::Tensor& dy, const std::optional<at::Tensor>& cu_seqlens) {
  return x.numel() == 0 || dy.numel() == 0 || (cu_seqlens && cu_seqlens->numel() < 2);
}

}  // namespace

void fisher_accumulate(at::Tensor fisher, const at::Tensor& x, const at::Tensor& dy, const std::string& squares, double weight,
                       const std::optional<at::Tensor>& cu_seqlens) {
  arguments::fisher_accumulate(DEVICE, fisher, x, dy, squares, cu_seqlens);
  if (nothing(x, dy, cu_seqlens)) return;
  at::Tensor target = fisher.stride(1) == 1 || fisher.size(1) == 1 ? fisher : fisher.contiguous();
  Work work(x, dy, squares, cu_seqlens, has_one_token(x, squares, cu_seqlens));
  work.shared.fisher = matrix(target);
  work.shared.weight = float(weight);
  work.run([&](int64_t row, int64_t column) { return work.block(row, column); });
  if (!target.is_same(fisher)) fisher.copy_(target);
}

void fisher_sums(at::Tensor rows, at::Tensor columns, const at::Tensor& x, const at::Tensor& dy, const std::string& squares, double weight,
                 const std::optional<at::Tensor>& cu_seqlens) {
  arguments::fisher_sums(DEVICE, rows, columns, x, dy, squares, cu_seqlens);
  if (nothing(x, dy, cu_seqlens)) return;
  if (has_one_token(x, squares, cu_seqlens)) {  // sum_ij (dy_i x_j)^2 has its sums in a closed form
    const at::Tensor x_squares = as_rows(x).to(at::kFloat).square(), dy_squares = as_rows(dy).to(at::kFloat).square();
    const at::Tensor of_rows = dy_squares.t().mv(x_squares.sum(1)), of_columns = x_squares.t().mv(dy_squares.sum(1));
    rows.add_(of_rows, weight);
    columns.add_(of_columns, weight);
    return;
  }
  Work work(x, dy, squares, cu_seqlens, /*one_token=*/false);
  // Every block has sums of its own, added in the order of the blocks.
  at::Tensor of_rows = floats(work.grid.columns * work.d_out), of_columns = floats(work.grid.rows * work.d_in);
  work.run([&](int64_t row, int64_t column) {
    FisherBlock b = work.block(row, column);
    b.row_sums = of_rows.data_ptr<float>() + column * work.d_out + b.i0;
    b.column_sums = of_columns.data_ptr<float>() + row * work.d_in + b.j0;
    return b;
  });
  sum_parts(of_rows.data_ptr<float>(), work.grid.columns, work.d_out);
  sum_parts(of_columns.data_ptr<float>(), work.grid.rows, work.d_in);
  rows.add_(of_rows.narrow(0, 0, work.d_out), weight);
  columns.add_(of_columns.narrow(0, 0, work.d_in), weight);
}

}  // namespace fe
