// SPDX-License-Identifier: Apache-2.0
// Samples of a Fisher, from tensors to what the kernels take.
#pragma once
#include "../fisher_accumulate.h"
#include "tensors.h"

namespace fe::cuda {

// Tiles that do not fill the device are multiplied by splitting the samples.
constexpr int64_t MAX_SPLITS = 32, TOKENS_OF_A_PRODUCT = 16;

// The number of splits with the least modelled time: whole waves of blocks, and what each split costs besides, `turn`, as the 16-bit
// products of that many tokens. `work` is that of a sample in tokens.
inline int64_t choose_splits(int64_t tiles, int64_t samples, int64_t work, int64_t turn, int64_t multiprocessors) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t splits = 1; splits <= std::min(samples, MAX_SPLITS); ++splits) {
    const int64_t waves = ceil_div(tiles * splits, multiprocessors);
    const int64_t cost = waves * ceil_div(samples, splits) * work + (waves + splits - 1) * turn;
    if (cost < least) best = splits, least = cost;
  }
  return best;
}

// How much longer products take than those of 16-bit numbers.
inline int64_t relative_cost(Dtype dtype, Precision precision, bool single) {
  if (dtype != Dtype::f32) return single ? 6 : 1;
  return precision == Precision::tf32x3 ? 6 : 2;
}

inline int64_t tiles_of(const FisherSamples& p) {
  return ceil_div(p.d_out, FISHER_TILE) * ceil_div(p.d_in, FISHER_TILE);
}

// Whether samples have one token each.
inline bool single_tokens(const at::Tensor& x, const std::optional<at::Tensor>& cu_seqlens) {
  return !cu_seqlens && (x.dim() == 2 || x.size(1) == 1);
}

// Tokens of single rows are samples of one token, as the kernels that square them take them.
inline FisherTokens tokens_of(const at::Tensor& t, bool single) {
  if (t.dim() == 3 && !single) return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
  return {t.data_ptr(), 0, t.stride(0), t.stride(t.dim() - 1)};
}

inline bool wide(const FisherTokens& t, int64_t columns, int64_t element_size) {
  const int64_t count = 16 / element_size;
  return t.column == 1 && columns % count == 0 && t.token % count == 0 && t.sample % count == 0 &&
         reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
}

// All that does not depend on the result, in one split. `offsets` are contiguous, or undefined; `single`: see above. Otherwise a matrix
// without offsets is the tokens of one sample.
inline void describe(FisherSamples& p, const at::Tensor& x, const at::Tensor& dy, double weight, const at::Tensor& offsets, bool single) {
  p.x = tokens_of(x, single), p.dy = tokens_of(dy, single);
  p.d_out = int32_t(dy.size(-1)), p.d_in = int32_t(x.size(-1));
  p.weight = float(weight);
  p.dtype = dtype_of(x), p.precision = float_precision(Precision::tf32);
  p.wide = wide(p.x, p.d_in, x.element_size()) && wide(p.dy, p.d_out, x.element_size());
  p.splits = 1;
  if (offsets.defined()) p.cu_seqlens = offsets.data_ptr(), p.long_offsets = offsets.scalar_type() == at::kLong;
  p.samples = offsets.defined() ? offsets.numel() - 1 : x.dim() == 2 || single ? 1 : x.size(0);
  p.tokens = x.dim() == 2 || single ? x.size(0) : x.size(1);
}

// What a sample costs: multiples of the tokens of a product.
inline int64_t work_of(const FisherSamples& p, bool single) {
  const int64_t tokens = p.cu_seqlens != nullptr ? ceil_div(p.tokens, p.samples) : p.tokens;
  const int64_t products = single ? 1 : ceil_div(tokens, TOKENS_OF_A_PRODUCT) * TOKENS_OF_A_PRODUCT;
  return products * relative_cost(p.dtype, p.precision, single);
}

}  // namespace fe::cuda
