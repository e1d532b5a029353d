// SPDX-License-Identifier: Apache-2.0
// The arguments of a merge in the common form.
#include <unordered_set>

#include "common.h"
#include "terms.h"

namespace fe::penalty {
namespace {

// Whether each element of `t` has memory of its own that may be written.
bool is_writable(const at::Tensor& t) {
  return t.is_non_overlapping_and_dense() && !t.is_inference();
}

}  // namespace

bool is_merge(const pybind11::handle& weights, const pybind11::handle& lora_as, const pybind11::handle& lora_bs,
              const pybind11::handle& scales) {
  const Sequence ws{weights.ptr()}, as{lora_as.ptr()}, bs{lora_bs.ptr()}, ss{scales.ptr()};
  if (!alike({ws, as, bs, ss})) return false;
  std::unordered_set<const c10::StorageImpl*> read, written;
  std::optional<c10::Device> device;
  for (Py_ssize_t i = 0; i < ws.size(); ++i) {
    const at::Tensor *w = plain_tensor(ws[i]), *a = plain_tensor(as[i]), *b = plain_tensor(bs[i]);
    if (!w || !a || !b || w->dim() != 2 || a->dim() != 2 || b->dim() != 2 || !is_writable(*w)) return false;
    const Common common{w->scalar_type(), device.value_or(w->device())};
    device = common.device;
    if (!common.floating() || w->device() != device || !common.factor(*a) || !common.factor(*b)) return false;
    const int64_t rank = a->size(0);
    if (rank < 1 || b->size(1) != rank || w->size(0) != b->size(0) || w->size(1) != a->size(1)) return false;
    std::optional<at::Tensor> scale;
    double factor;
    if (!read_scale(ss[i], common, rank, scale, factor)) return false;
    written.insert(w->storage().unsafeGetStorageImpl());
    for (const at::Tensor* t : {a, b}) read.insert(t->storage().unsafeGetStorageImpl());
    if (scale) read.insert(scale->storage().unsafeGetStorageImpl());
  }
  return std::none_of(written.begin(), written.end(), [&](const auto* storage) { return read.count(storage) > 0; });
}

}  // namespace fe::penalty
