// SPDX-License-Identifier: Apache-2.0
// From tensors to what launchers take: pointers, sizes, the current stream. Needs no CUDA header of PyTorch, so that it compiles, and runs on the
// emulator, against any build of it.
#pragma once
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <optional>
#include <string>
#include <vector>

#include "../../arguments.h"
#include "../../empty.h"
#include "../numbers.h"
#include "../runtime.h"

namespace fe::cuda {

using arguments::OptionalTensors;
using arguments::Tensors;

// Of the tensors that kernels take.
#ifdef FE_EMULATED
constexpr at::DeviceType DEVICE = at::kCPU;
#else
constexpr at::DeviceType DEVICE = at::kCUDA;
#endif

// The stream that PyTorch launches on now, on the device of `like`.
cudaStream_t current_stream(const at::Tensor& like);
// A lower bound on the number of blocks that run side by side.
int multiprocessors(const at::Tensor& like);

// `size` numbers at zero for launches that leave them so; two that could run at the same time never share them. `used` keeps them until the
// launch is made.
uint32_t* counters(const at::Tensor& like, int64_t size, at::Tensor& used);

// Raises with the op, what it was launched on, and what CUDA says.
void check(cudaError_t status, const char* op, const std::string& shape);

// "[197, 768] float32" for messages.
std::string described(const at::Tensor& t);

inline Dtype dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Dtype::f32;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    default:
      TORCH_CHECK_TYPE(false, "the CUDA kernels take float32, bfloat16 and float16, got ", t.scalar_type());
  }
}

// A 2-d tensor.
inline Matrix matrix(const at::Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), dtype_of(t)};
}

// [..., d] as [rows, d], a view wherever the strides allow one.
inline at::Tensor as_rows(const at::Tensor& t) {
  return t.dim() == 2 ? t : t.reshape({empty::rows_of(t), t.size(-1)});
}

// Whether 16-byte accesses that begin at multiples of 16 bytes of a row stay inside rows of a 2-d tensor and are aligned.
inline bool wide(const at::Tensor& t) {
  const int64_t count = 16 / t.element_size();
  return (t.stride(1) == 1 || t.size(1) == 1) && t.size(1) % count == 0 && (t.stride(0) % count == 0 || t.size(0) == 1) &&
         reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
}

// How products of fp32 factors are computed, by torch.get_float32_matmul_precision(); "medium" means `medium`.
inline Precision float_precision(Precision medium) {
  switch (at::globalContext().float32MatmulPrecision()) {
    case at::Float32MatmulPrecision::HIGHEST:
      return Precision::tf32x3;
    case at::Float32MatmulPrecision::HIGH:
      return Precision::tf32;
    default:
      return medium;
  }
}

// The scale of an adapter as the kernels read it: a pointer (or none), its dtype, a stride that is 0 for one number for all ranks, and a factor.
struct Scale {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t stride = 0;
  float factor = 1.f;
};
inline Scale scale_of(const std::optional<at::Tensor>& scale, double factor) {
  if (!scale) return {nullptr, Dtype::f32, 0, float(factor)};
  return {scale->data_ptr(), dtype_of(*scale), scale->dim() ? scale->stride(0) : 0, float(factor)};
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
void fisher_accumulate(at::Tensor fisher, const at::Tensor& x, const at::Tensor& dy, const std::string& squares, double weight,
                       const std::optional<at::Tensor>& cu_seqlens);
void fisher_sums(at::Tensor rows, at::Tensor columns, const at::Tensor& x, const at::Tensor& dy, const std::string& squares, double weight,
                 const std::optional<at::Tensor>& cu_seqlens);
void merge(const Tensors& weights, const Tensors& lora_as, const Tensors& lora_bs, const OptionalTensors& scales,
           const std::vector<double>& factors);
void soft_threshold(const Tensors& scales, double kappa);

}  // namespace fe::cuda
