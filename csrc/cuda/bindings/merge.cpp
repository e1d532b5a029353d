// SPDX-License-Identifier: Apache-2.0
// Merging adapters into weights, and soft thresholding, in groups of tensors per launch.
#include "../merge.h"

#include "tensors.h"

namespace fe::cuda {

namespace {

struct Extent {
  uintptr_t begin, end;
};

// From the address of the first element to one past the last.
Extent extent(const at::Tensor& t) {
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  const auto begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  return {begin, begin + (last + 1) * t.element_size()};
}

// run(indices) for groups of up to `most` outputs that have elements, in order. Blocks of one launch run in any order, so outputs that may
// share elements go to different launches.
template <class Run>
void in_groups(const Tensors& outputs, size_t most, const Run& run) {
  std::vector<size_t> group;
  std::vector<Extent> held;
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i].numel() == 0) continue;
    const Extent own = extent(outputs[i]);
    bool full = group.size() == most;
    for (const Extent& other : held) full = full || (own.begin < other.end && other.begin < own.end);
    if (full) {
      run(group);
      group.clear();
      held.clear();
    }
    group.push_back(i);
    held.push_back(own);
  }
  if (!group.empty()) run(group);
}

std::string of_group(const Tensors& outputs, const std::vector<size_t>& group) {
  return described(outputs[group[0]]) + (group.size() > 1 ? " and " + std::to_string(group.size() - 1) + " more" : "");
}

Matrix transposed(const Matrix& m) {
  return {m.data, m.column, m.row, m.dtype};
}

MergeEntry entry(const at::Tensor& weight, const at::Tensor& lora_a, const at::Tensor& lora_b, const Scale& s) {
  MergeEntry e{matrix(weight), matrix(lora_a), matrix(lora_b), s.data,         s.stride, s.dtype,
               s.factor,       weight.size(0), weight.size(1), lora_a.size(0), 0};
  // Kernels go along rows: columns that are contiguous are the rows of W^T += A^T diag(s) B^T.
  if (e.w.column != 1 && e.w.row == 1) {
    std::swap(e.rows, e.columns);
    e.w = transposed(e.w);
    const Matrix a = e.a;
    e.a = transposed(e.b);
    e.b = transposed(a);
  }
  return e;
}

}  // namespace

void merge(const Tensors& weights, const Tensors& lora_as, const Tensors& lora_bs, const OptionalTensors& scales,
           const std::vector<double>& factors) {
  arguments::merge(DEVICE, weights, lora_as, lora_bs, scales, factors);
  if (weights.empty()) return;
  const c10::DeviceGuard guard(weights[0].device());
  const cudaStream_t stream = current_stream(weights[0]);
  in_groups(weights, MERGE_GROUP, [&](const std::vector<size_t>& group) {
    MergeParams params{};
    for (size_t i : group) params.entries[params.count++] = entry(weights[i], lora_as[i], lora_bs[i], scale_of(scales[i], factors[i]));
    check(launch_merge(params, stream), "merge_", of_group(weights, group));
  });
}

void soft_threshold(const Tensors& scales, double kappa) {
  arguments::soft_threshold(DEVICE, scales);
  if (scales.empty()) return;
  const c10::DeviceGuard guard(scales[0].device());
  const cudaStream_t stream = current_stream(scales[0]);
  in_groups(scales, THRESHOLD_GROUP, [&](const std::vector<size_t>& group) {
    ThresholdParams params{};
    params.kappa = float(kappa);
    Tensors flat;  // views where the strides allow it
    for (size_t i : group) {
      const at::Tensor& s = flat.emplace_back(scales[i].reshape({-1}));
      params.entries[params.count++] = {s.data_ptr(), s.numel(), s.stride(0), dtype_of(s), 0};
    }
    check(launch_soft_threshold(params, stream), "soft_threshold_", of_group(scales, group));
    for (size_t j = 0; j < group.size(); ++j) {
      const at::Tensor& given = scales[group[j]];
      if (flat[j].data_ptr() != given.data_ptr()) given.copy_(flat[j].view_as(given));
    }
  });
}

}  // namespace fe::cuda
