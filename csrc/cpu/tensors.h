// SPDX-License-Identifier: Apache-2.0
// From tensors to what the kernels take, and how work is split over threads.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <optional>
#include <vector>

#include "../arguments.h"
#include "../empty.h"
#include "kernels.h"

namespace fe {

using arguments::OptionalTensors;
using arguments::Tensors;

constexpr int64_t LINE = 16;                 // floats of a cache line: no vector is longer, and buffers begin at one
constexpr at::DeviceType DEVICE = at::kCPU;  // of the tensors that kernels take

inline Dtype dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Dtype::f32;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    default:
      TORCH_CHECK_TYPE(false, "the CPU kernels take float32, bfloat16 and float16, got ", t.scalar_type());
  }
}

inline Matrix matrix(const at::Tensor& t) {
  return {t.data_ptr(), t.stride(0), dtype_of(t)};
}

// [..., d] as [rows, d] with contiguous rows; a view wherever the strides allow one.
inline at::Tensor as_rows(const at::Tensor& t) {
  at::Tensor rows = t.dim() == 2 ? t : t.reshape({empty::rows_of(t), t.size(-1)});
  return rows.size(1) == 1 || rows.stride(1) == 1 ? rows : rows.contiguous();
}

// The part of such a matrix from (row, column) on.
inline Matrix part_of(const at::Tensor& rows, int64_t row, int64_t column) {
  Matrix part = matrix(rows);
  part.data = static_cast<char*>(part.data) + (row * part.stride + column) * bytes_of(part.dtype);
  return part;
}

inline at::Tensor as_float(const at::Tensor& t) {
  return t.to(at::kFloat).contiguous();
}

// The scale of an adapter as one fp32 number per rank.
inline std::vector<float> scale_of(const std::optional<at::Tensor>& scale, double factor, int64_t rank) {
  std::vector<float> values(rank, float(factor));
  if (scale) {
    const at::Tensor s = as_float(*scale);
    const float* p = s.data_ptr<float>();
    for (int64_t k = 0; k < rank; ++k) values[k] *= p[s.dim() ? k : 0];
  }
  return values;
}

// f(part, begin, end) over `parts` equal parts of [0, n). The split depends on `parts` alone, so sums kept per part do not
// depend on which thread computes them.
template <class F>
void over_parts(int64_t parts, int64_t n, const F& f) {
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) f(part, n * part / parts, n * (part + 1) / parts);
  });
}

// Of [0, n), the most that one of `parts` parts has.
inline int64_t most_of(int64_t n, int64_t parts) {
  return (n + parts - 1) / parts;
}

inline int64_t parts_for(int64_t n, int64_t least) {
  return std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), n / least));
}

// Adds parts 1.. of [parts, n] to part 0, in order.
inline void sum_parts(float* data, int64_t parts, int64_t n) {
  if (parts == 1) return;
  at::parallel_for(0, n, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = begin; i < end; ++i) data[i] += data[part * n + i];
  });
}

inline at::Tensor floats(int64_t n) {
  return at::empty({n}, at::kFloat);
}

std::tuple<at::Tensor, at::Tensor> lora_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                               const Tensors& lora_as, const Tensors& lora_bs, const OptionalTensors& scales,
                                               const std::vector<double>& factors, const std::vector<int64_t>& rows, double dropout_p,
                                               const std::optional<at::Tensor>& seed);
Tensors lora_linear_backward(const at::Tensor& dy, const std::optional<at::Tensor>& x, const at::Tensor& weight,
                             const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& z, const Tensors& lora_as,
                             const Tensors& lora_bs, const OptionalTensors& scales, const std::vector<double>& factors,
                             const std::vector<int64_t>& rows, double dropout_p, const std::optional<at::Tensor>& seed,
                             const std::vector<bool>& needs);
std::tuple<at::Tensor, at::Tensor> ewc_penalty(const Tensors& fishers, const Tensors& lora_as, const Tensors& lora_bs,
                                               const OptionalTensors& scales, const std::vector<double>& factors, double ewc_lambda,
                                               const std::vector<bool>& needs);
std::tuple<at::Tensor, at::Tensor> l1_penalty(const Tensors& fishers, const Tensors& lora_as, const Tensors& lora_bs,
                                              const OptionalTensors& scales, const std::vector<double>& factors, double l1_lambda,
                                              const std::vector<bool>& needs);
std::tuple<at::Tensor, at::Tensor> factored_penalty(const Tensors& fishers, const Tensors& lora_as, const Tensors& lora_bs,
                                                    const OptionalTensors& scales, const std::vector<double>& factors, double ewc_lambda,
                                                    const std::vector<bool>& needs);
void fisher_accumulate(at::Tensor fisher, const at::Tensor& x, const at::Tensor& dy, const std::string& squares, double weight,
                       const std::optional<at::Tensor>& cu_seqlens);
void fisher_sums(at::Tensor rows, at::Tensor columns, const at::Tensor& x, const at::Tensor& dy, const std::string& squares, double weight,
                 const std::optional<at::Tensor>& cu_seqlens);
void merge(const Tensors& weights, const Tensors& lora_as, const Tensors& lora_bs, const OptionalTensors& scales,
           const std::vector<double>& factors);
void soft_threshold(const Tensors& scales, double kappa);

}  // namespace fe
