// SPDX-License-Identifier: Apache-2.0
// Checks of the arguments of every op, the same for both extensions: wrong sizes, lengths and devices are ValueErrors, wrong dtypes are
// TypeErrors, and messages name the argument, what was expected and what came. fused_ewclora/reference/arguments.py does the same in Python.
//
// Kernels read memory by the sizes of a few arguments; every other size has to be known to agree before one starts.
#pragma once
#include <ATen/ATen.h>

#include <optional>
#include <ostream>
#include <string>
#include <vector>

namespace fe::arguments {

using Tensors = std::vector<at::Tensor>;
using OptionalTensors = std::vector<std::optional<at::Tensor>>;

// An argument, or one entry of a list, in messages.
struct Name {
  const char* argument;
  int64_t entry = -1;
};
inline std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.argument;
  return name.entry < 0 ? out : out << '[' << name.entry << ']';
}

// As Python prints the dtypes that occur.
inline std::string described(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "torch.float32";
    case at::kBFloat16:
      return "torch.bfloat16";
    case at::kHalf:
      return "torch.float16";
    case at::kDouble:
      return "torch.float64";
    case at::kByte:
      return "torch.uint8";
    case at::kInt:
      return "torch.int32";
    case at::kLong:
      return "torch.int64";
    default:
      return c10::toString(dtype);
  }
}

inline const at::Tensor* pointer(const at::Tensor& t) {
  return t.defined() ? &t : nullptr;
}
inline const at::Tensor* pointer(const std::optional<at::Tensor>& t) {
  return t && t->defined() ? &*t : nullptr;
}

inline void present(const at::Tensor& t, const Name& name) {
  TORCH_CHECK_TYPE(t.defined(), name, ": expected a tensor, got None");
}

inline void matrix(const at::Tensor& t, const Name& name) {
  present(t, name);
  TORCH_CHECK_VALUE(t.dim() == 2, name, ": expected a matrix, got shape ", t.sizes());
}

inline void shape(const at::Tensor& t, const Name& name, at::IntArrayRef expected, const char* why) {
  TORCH_CHECK_VALUE(t.sizes() == expected, name, ": expected shape ", expected, " (", why, "), got ", t.sizes());
}

inline void count(size_t length, const char* name, size_t expected, const char* other) {
  TORCH_CHECK_VALUE(length == expected, name, ": expected ", expected, " entries, as in ", other, ", got ", length);
}

// A tensor that kernels can run on: `device` is theirs.
inline void defining(const at::Tensor& t, const Name& name, at::DeviceType device) {
  present(t, name);
  TORCH_CHECK_VALUE(t.device().type() == device, name, ": expected device ", at::Device(device), " (of the kernels), got ", t.device());
  const at::ScalarType dtype = t.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, name,
                   ": expected torch.float32, torch.bfloat16 or torch.float16, got ", described(dtype));
}

inline void same_device(const at::Tensor& t, const Name& name, const at::Tensor& like, const Name& like_name) {
  TORCH_CHECK_VALUE(t.device() == like.device(), name, ": expected device ", like.device(), " (of ", like_name, "), got ", t.device());
}

inline void same(const at::Tensor& t, const Name& name, const at::Tensor& like, const Name& like_name) {
  same_device(t, name, like, like_name);
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), name, ": expected ", described(like.scalar_type()), " (of ", like_name, "), got ",
                   described(t.scalar_type()));
}

// What belongs to an adapter has the dtype of `like`, or is an fp32 master beside it.
inline void factor(const at::Tensor& t, const Name& name, const at::Tensor& like, const Name& like_name) {
  same_device(t, name, like, like_name);
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type() || t.scalar_type() == at::kFloat, name, ": expected ",
                   described(like.scalar_type()), " (of ", like_name, ") or torch.float32, got ", described(t.scalar_type()));
}

// A Fisher [d_out, d_in] beside the tensors that it is summed or weighted with.
inline void fisher_matrix(const at::Tensor& t, const Name& name, const at::Tensor& like, const Name& like_name) {
  matrix(t, name);
  same_device(t, name, like, like_name);
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16, name,
                   ": expected torch.float32 or torch.bfloat16, got ", described(t.scalar_type()));
}

// A Fisher [rows, columns] in 8 bits, beside the tensors that it is weighted with; its rows are read as vectors of 16 bytes. The format:
// fused_ewclora/reference/eight_bit.py.
constexpr int64_t CODES_OF_A_SCALE = 32, CODES_ALIGNMENT = 16;
inline int64_t row_bytes(int64_t columns) {
  const int64_t blocks = (columns + CODES_OF_A_SCALE - 1) / CODES_OF_A_SCALE;
  return (blocks * (CODES_OF_A_SCALE + 2) + CODES_ALIGNMENT - 1) / CODES_ALIGNMENT * CODES_ALIGNMENT;
}
inline bool has_rows_of_codes(const at::Tensor& t) {
  const bool apart = t.stride(0) % CODES_ALIGNMENT != 0 || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % CODES_ALIGNMENT != 0;
  return t.numel() == 0 || (t.stride(1) == 1 && !apart);
}
inline void codes(const at::Tensor& t, const Name& name, int64_t rows, int64_t columns, const at::Tensor& like, const Name& like_name) {
  matrix(t, name);
  same_device(t, name, like, like_name);
  shape(t, name, {rows, row_bytes(columns)}, "8-bit codes of B A");
  TORCH_CHECK_VALUE(has_rows_of_codes(t), name, ": expected 8-bit codes with contiguous rows at multiples of 16 bytes, got strides ",
                    t.strides());
}

// The row or column sums [size] of a factored Fisher.
inline void sums(const at::Tensor& t, const Name& name, int64_t size, const at::Tensor& like, const Name& like_name) {
  present(t, name);
  TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == size, name, ": expected shape [", size, "] (beside ", like_name, "), got ", t.sizes());
  same_device(t, name, like, like_name);
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat, name, ": expected torch.float32, got ", described(t.scalar_type()));
}

inline void adapter(const at::Tensor& lora_a, const at::Tensor& lora_b, const at::Tensor* scale, int64_t i, const at::Tensor& like,
                    const Name& like_name) {
  const Name name_a{"lora_as", i}, name_b{"lora_bs", i}, name_s{"scales", i};
  matrix(lora_a, name_a);
  matrix(lora_b, name_b);
  const int64_t rank = lora_a.size(0);
  TORCH_CHECK_VALUE(rank >= 1, name_a, ": expected rank (rows) >= 1, got shape ", lora_a.sizes());
  TORCH_CHECK_VALUE(lora_b.size(1) == rank, name_b, ": expected ", rank, " columns (rank of ", name_a, "), got shape ", lora_b.sizes());
  factor(lora_a, name_a, like, like_name);
  factor(lora_b, name_b, like, like_name);
  if (scale == nullptr) return;
  TORCH_CHECK_VALUE(scale->dim() == 0 || (scale->dim() == 1 && scale->size(0) == rank), name_s, ": expected a 0-d tensor or shape [", rank,
                    "], got ", scale->sizes());
  factor(*scale, name_s, like, like_name);
}

template <class Scales>
void adapter_lists(const Tensors& lora_as, const Tensors& lora_bs, const Scales& scales, const std::vector<double>& factors,
                   size_t expected, const char* other) {
  count(lora_as.size(), "lora_as", expected, other);
  count(lora_bs.size(), "lora_bs", expected, other);
  count(scales.size(), "scales", expected, other);
  count(factors.size(), "scale_factors", expected, other);
}

// What the forward and the backward of a LoRA linear share; `like` is x or dy.
inline void layer(const at::Tensor& like, const Name& like_name, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                  const Tensors& lora_as, const Tensors& lora_bs, const OptionalTensors& scales, const std::vector<double>& factors,
                  const std::vector<int64_t>& rows, double dropout_p, const std::optional<at::Tensor>& seed) {
  matrix(weight, {"weight"});
  same(weight, {"weight"}, like, like_name);
  const int64_t d_out = weight.size(0), d_in = weight.size(1);
  if (const at::Tensor* b = pointer(bias)) {
    shape(*b, {"bias"}, {d_out}, "rows of weight");
    same(*b, {"bias"}, like, like_name);
  }
  TORCH_CHECK_VALUE(!lora_as.empty(), "lora_as: expected at least one adapter, got none");
  adapter_lists(lora_as, lora_bs, scales, factors, lora_as.size(), "lora_as");
  for (size_t i = 0; i < lora_as.size(); ++i) {
    adapter(lora_as[i], lora_bs[i], pointer(scales[i]), int64_t(i), like, like_name);
    TORCH_CHECK_VALUE(lora_as[i].size(1) == d_in, Name{"lora_as", int64_t(i)}, ": expected ", d_in,
                      " columns (columns of weight), got shape ", lora_as[i].sizes());
  }
  TORCH_CHECK_VALUE(rows.size() % 3 == 0, "rows: expected triples (adapter, start, stop), got ", rows.size(), " numbers");
  std::vector<int64_t> owned(lora_as.size(), 0);
  for (size_t q = 0; q < rows.size(); q += 3) {
    const int64_t index = rows[q], start = rows[q + 1], stop = rows[q + 2];
    TORCH_CHECK_VALUE(0 <= index && index < int64_t(owned.size()), "rows: expected an adapter below ", owned.size(), ", got ", index);
    const bool some = start < stop || d_out == 0;  // a weight without rows has one range, without rows
    TORCH_CHECK_VALUE(0 <= start && some && stop <= d_out, "rows: expected 0 <= start < stop <= ", d_out, " (rows of weight), got (", start,
                      ", ", stop, ")");
    owned[index] += stop - start;
  }
  for (size_t i = 0; i < owned.size(); ++i)
    TORCH_CHECK_VALUE(lora_bs[i].size(0) == owned[i], Name{"lora_bs", int64_t(i)}, ": expected ", owned[i],
                      " rows (its output rows), got shape ", lora_bs[i].sizes());
  const at::Tensor* s = pointer(seed);
  TORCH_CHECK_VALUE(s != nullptr || dropout_p == 0.0, "seed: expected one int64 number for dropout, got None");
  if (s == nullptr) return;
  TORCH_CHECK_TYPE(s->scalar_type() == at::kLong, "seed: expected torch.int64, got ", described(s->scalar_type()));
  TORCH_CHECK_VALUE(s->numel() == 1, "seed: expected one number, got shape ", s->sizes());
  same_device(*s, {"seed"}, like, like_name);
}

inline void lora_linear(at::DeviceType device, const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                        const Tensors& lora_as, const Tensors& lora_bs, const OptionalTensors& scales, const std::vector<double>& factors,
                        const std::vector<int64_t>& rows, double dropout_p, const std::optional<at::Tensor>& seed) {
  defining(x, {"x"}, device);
  layer(x, {"x"}, weight, bias, lora_as, lora_bs, scales, factors, rows, dropout_p, seed);
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == weight.size(1), "x: expected ", weight.size(1),
                    " features (columns of weight), got shape ", x.sizes());
}

inline void lora_linear_backward(at::DeviceType device, const at::Tensor& dy, const std::optional<at::Tensor>& x, const at::Tensor& weight,
                                 const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& z, const Tensors& lora_as,
                                 const Tensors& lora_bs, const OptionalTensors& scales, const std::vector<double>& factors,
                                 const std::vector<int64_t>& rows, double dropout_p, const std::optional<at::Tensor>& seed,
                                 const std::vector<bool>& needs) {
  defining(dy, {"dy"}, device);
  layer(dy, {"dy"}, weight, bias, lora_as, lora_bs, scales, factors, rows, dropout_p, seed);
  TORCH_CHECK_VALUE(dy.dim() >= 1 && dy.size(-1) == weight.size(0), "dy: expected ", weight.size(0),
                    " features (rows of weight), got shape ", dy.sizes());
  const size_t expected = 3 + 3 * lora_as.size();
  TORCH_CHECK_VALUE(needs.size() == expected, "needs: expected ", expected,
                    " entries (x, weight, bias, then every A, every B, every s), got ", needs.size());
  const at::Tensor *x_ = pointer(x), *z_ = pointer(z);
  bool need_x = needs[1], need_z = false;
  int64_t ranks = 0;
  const size_t adapters = lora_as.size();
  for (size_t i = 0; i < adapters; ++i) {
    const bool need_s = needs[3 + 2 * adapters + i];
    need_x = need_x || needs[3 + i], need_z = need_z || needs[3 + adapters + i] || need_s;
    ranks += lora_as[i].size(0);
    TORCH_CHECK_VALUE(!need_s || pointer(scales[i]) != nullptr, Name{"scales", int64_t(i)},
                      ": expected a tensor for its gradient, got None");
  }
  TORCH_CHECK_VALUE(!needs[2] || pointer(bias) != nullptr, "bias: expected a tensor for its gradient, got None");
  TORCH_CHECK_VALUE(!need_x || x_ != nullptr, "x: expected a tensor for the gradients of weight or A, got None");
  TORCH_CHECK_VALUE(!need_z || z_ != nullptr, "z: expected a tensor for the gradients of B or s, got None");
  if (x_ != nullptr) {
    same(*x_, {"x"}, dy, {"dy"});
    TORCH_CHECK_VALUE(
        x_->dim() == dy.dim() && x_->sizes().slice(0, x_->dim() - 1) == dy.sizes().slice(0, dy.dim() - 1) && x_->size(-1) == weight.size(1),
        "x: expected the leading shape of dy ", dy.sizes(), " and ", weight.size(1), " features (columns of weight), got shape ",
        x_->sizes());
  }
  if (z_ != nullptr) {
    same_device(*z_, {"z"}, dy, {"dy"});
    TORCH_CHECK_TYPE(z_->scalar_type() == at::kFloat, "z: expected torch.float32, got ", described(z_->scalar_type()));
    shape(*z_, {"z"}, {c10::multiply_integers(dy.sizes().slice(0, dy.dim() - 1)), ranks}, "rows of dy, ranks of all adapters");
  }
}

template <class Scales>
void ewc_penalty(at::DeviceType device, const Tensors& fishers, const Tensors& lora_as, const Tensors& lora_bs, const Scales& scales,
                 const std::vector<double>& factors, const std::vector<bool>& needs) {
  TORCH_CHECK_VALUE(!fishers.empty(), "fishers: expected at least one adapter, got none");
  adapter_lists(lora_as, lora_bs, scales, factors, fishers.size(), "fishers");
  TORCH_CHECK_VALUE(needs.size() == 3, "needs: expected 3 entries (A, B, s), got ", needs.size());
  defining(lora_as[0], {"lora_as", 0}, device);
  for (size_t k = 0; k < fishers.size(); ++k) {
    const int64_t i = int64_t(k);
    const at::Tensor& lora_a = lora_as[k];
    adapter(lora_a, lora_bs[k], pointer(scales[k]), i, lora_a, {"lora_as", i});
    same(lora_a, {"lora_as", i}, lora_as[0], {"lora_as", 0});
    present(fishers[k], {"fishers", i});
    if (fishers[k].scalar_type() == at::kByte) {
      codes(fishers[k], {"fishers", i}, lora_bs[k].size(0), lora_a.size(1), lora_a, {"lora_as", i});
      continue;
    }
    fisher_matrix(fishers[k], {"fishers", i}, lora_a, {"lora_as", i});
    shape(fishers[k], {"fishers", i}, {lora_bs[k].size(0), lora_a.size(1)}, "of B A");
  }
}

template <class Scales>
void l1_penalty(at::DeviceType device, const Tensors& fishers, const Tensors& lora_as, const Tensors& lora_bs, const Scales& scales,
                const std::vector<double>& factors, const std::vector<bool>& needs) {
  TORCH_CHECK_VALUE(fishers.empty(), "fishers: expected none, an l1 norm has no Fisher, got ", fishers.size());
  TORCH_CHECK_VALUE(!lora_as.empty(), "lora_as: expected at least one adapter, got none");
  adapter_lists(lora_as, lora_bs, scales, factors, lora_as.size(), "lora_as");
  TORCH_CHECK_VALUE(needs.size() == 3, "needs: expected 3 entries (A, B, s), got ", needs.size());
  defining(lora_as[0], {"lora_as", 0}, device);
  for (size_t k = 0; k < lora_as.size(); ++k) {
    const int64_t i = int64_t(k);
    adapter(lora_as[k], lora_bs[k], pointer(scales[k]), i, lora_as[k], {"lora_as", i});
    same(lora_as[k], {"lora_as", i}, lora_as[0], {"lora_as", 0});
  }
}

template <class Scales>
void factored_penalty(at::DeviceType device, const Tensors& fishers, const Tensors& lora_as, const Tensors& lora_bs, const Scales& scales,
                      const std::vector<double>& factors, const std::vector<bool>& needs) {
  const size_t adapters = fishers.size() / 2;
  TORCH_CHECK_VALUE(adapters > 0 && fishers.size() % 2 == 0, "fishers: expected two entries per adapter, at least one adapter, got ",
                    fishers.size());
  adapter_lists(lora_as, lora_bs, scales, factors, adapters, "half of fishers");
  TORCH_CHECK_VALUE(needs.size() == 3, "needs: expected 3 entries (A, B, s), got ", needs.size());
  defining(lora_as[0], {"lora_as", 0}, device);
  for (size_t k = 0; k < adapters; ++k) {
    const int64_t i = int64_t(k);
    const Name like_name{"lora_as", i};
    adapter(lora_as[k], lora_bs[k], pointer(scales[k]), i, lora_as[k], like_name);
    same(lora_as[k], like_name, lora_as[0], {"lora_as", 0});
    sums(fishers[k], {"fishers", i}, lora_bs[k].size(0), lora_as[k], like_name);
    sums(fishers[adapters + k], {"fishers", int64_t(adapters + k)}, lora_as[k].size(1), lora_as[k], like_name);
  }
}

// The samples of a Fisher.
inline void samples(at::DeviceType device, const at::Tensor& x, const at::Tensor& dy, const std::string& squares,
                    const std::optional<at::Tensor>& cu_seqlens) {
  TORCH_CHECK_VALUE(squares == "sample" || squares == "batch", "squares: expected 'sample' or 'batch', got '", squares, "'");
  defining(x, {"x"}, device);
  present(dy, {"dy"});
  same(dy, {"dy"}, x, {"x"});
  const at::Tensor* offsets = pointer(cu_seqlens);
  TORCH_CHECK_VALUE(x.dim() == 2 || (x.dim() == 3 && offsets == nullptr), "x: expected ", offsets ? "2" : "2 or 3",
                    " dimensions, got shape ", x.sizes());
  TORCH_CHECK_VALUE(dy.dim() == x.dim() && dy.sizes().slice(0, dy.dim() - 1) == x.sizes().slice(0, x.dim() - 1),
                    "dy: expected the leading shape of x ", x.sizes(), ", got shape ", dy.sizes());
  if (offsets == nullptr) return;
  TORCH_CHECK_VALUE(squares == "sample", "cu_seqlens: expected None for squares 'batch', which does not tell samples apart, got a tensor");
  TORCH_CHECK_TYPE(offsets->scalar_type() == at::kInt || offsets->scalar_type() == at::kLong,
                   "cu_seqlens: expected torch.int32 or torch.int64, got ", described(offsets->scalar_type()));
  TORCH_CHECK_VALUE(offsets->dim() == 1, "cu_seqlens: expected shape [N + 1], got ", offsets->sizes());
  same_device(*offsets, {"cu_seqlens"}, x, {"x"});
}

inline void fisher_accumulate(at::DeviceType device, const at::Tensor& fisher, const at::Tensor& x, const at::Tensor& dy,
                              const std::string& squares, const std::optional<at::Tensor>& cu_seqlens) {
  samples(device, x, dy, squares, cu_seqlens);
  fisher_matrix(fisher, {"fisher"}, x, {"x"});
  shape(fisher, {"fisher"}, {dy.size(-1), x.size(-1)}, "features of dy and x");
}

inline void fisher_sums(at::DeviceType device, const at::Tensor& rows, const at::Tensor& columns, const at::Tensor& x, const at::Tensor& dy,
                        const std::string& squares, const std::optional<at::Tensor>& cu_seqlens) {
  samples(device, x, dy, squares, cu_seqlens);
  sums(rows, {"rows"}, dy.size(-1), dy, {"dy"});
  sums(columns, {"columns"}, x.size(-1), x, {"x"});
}

inline void merge(at::DeviceType device, const Tensors& weights, const Tensors& lora_as, const Tensors& lora_bs,
                  const OptionalTensors& scales, const std::vector<double>& factors) {
  adapter_lists(lora_as, lora_bs, scales, factors, weights.size(), "weights");
  for (size_t k = 0; k < weights.size(); ++k) {
    const Name name{"weights", int64_t(k)};
    defining(weights[k], name, device);
    matrix(weights[k], name);
    same_device(weights[k], name, weights[0], {"weights", 0});
    adapter(lora_as[k], lora_bs[k], pointer(scales[k]), int64_t(k), weights[k], name);
    shape(weights[k], name, {lora_bs[k].size(0), lora_as[k].size(1)}, "of B A");
  }
}

inline void soft_threshold(at::DeviceType device, const Tensors& scales) {
  for (size_t k = 0; k < scales.size(); ++k) {
    const Name name{"scales", int64_t(k)};
    defining(scales[k], name, device);
    same_device(scales[k], name, scales[0], {"scales", 0});
  }
}

}  // namespace fe::arguments
