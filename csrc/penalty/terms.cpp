// SPDX-License-Identifier: Apache-2.0
#include "terms.h"

#include <ATen/ops/_foreach_add.h>

#include "common.h"

namespace fe::penalty {
namespace {

using recorded::variable_list;

// What is added to the gradients of parameters, where all of them have the common form.
struct Gradients {
  variable_list held, added;   // gradients that there are, and what comes on top
  variable_list fresh, first;  // parameters without one, and their first

  bool collect(const recorded::PenaltyOperands& operands, const at::Tensor& flat) {
    if (!is_plain(flat)) return false;
    int64_t start = 0;
    for (size_t i = 0; i < operands.slots.size(); ++i) {
      if (!operands.needed(i)) continue;
      const at::Tensor& t = operands.tensors[i];
      if (t.requires_grad() && !add(t, flat, start)) return false;
      start += t.numel();
    }
    return distinct();
  }

 private:
  bool add(const at::Tensor& t, const at::Tensor& flat, int64_t start) {
    if (!t.is_leaf()) return false;
    const at::Tensor& old = t.grad();
    if (old.defined() && !fits(old, t)) return false;
    (old.defined() ? held : fresh).push_back(old.defined() ? old : t);
    (old.defined() ? added : first).push_back(recorded::part(flat, t.sizes(), start, t.scalar_type()));
    return true;
  }

  static bool fits(const at::Tensor& old, const at::Tensor& t) {
    return is_plain(old) && !old.is_inference() && old.is_contiguous() && old.sizes() == t.sizes() && old.device() == t.device() &&
           old.scalar_type() == t.scalar_type();
  }

  // Whether no element is part of two gradients, of which a joint addition could lose one term, and no parameter is there twice, whose second
  // first gradient would replace the other.
  bool distinct() const {
    std::vector<std::pair<const char*, const char*>> spans;
    for (const at::Tensor& old : held) {
      const auto* begin = static_cast<const char*>(old.const_data_ptr());
      if (old.numel()) spans.emplace_back(begin, begin + old.nbytes());
    }
    for (const at::Tensor& t : fresh) {
      const auto* place = reinterpret_cast<const char*>(t.unsafeGetTensorImpl());
      spans.emplace_back(place, place + 1);
    }
    std::sort(spans.begin(), spans.end());
    const auto meet = [](const auto& one, const auto& next) { return next.first < one.second; };
    return std::adjacent_find(spans.begin(), spans.end(), meet) == spans.end();
  }
};

// The Fishers of an op, whose entries for an adapter fit its product.
struct Fishers {
  const Sequence& all;
  const Common& common;
  Py_ssize_t count;                                     // of adapters
  enum Kind { NONE, DENSE, FACTORED, KRONECKER } kind;  // none: of an l1 norm

  static Kind kind_of(const std::string& op) {
    return op == "l1_penalty" ? NONE : op == "ewc_penalty" ? DENSE : op == "factored_penalty" ? FACTORED : KRONECKER;
  }
  Py_ssize_t expected() const { return kind == NONE ? 0 : kind == DENSE ? count : 2 * count; }

  // Adds those of adapter i, a matrix [d_out, d_in] or a factor of the outputs and one of the inputs; false where they do not fit.
  bool add(Py_ssize_t i, int64_t d_out, int64_t d_in, variable_list& to) const {
    if (kind == NONE) return true;
    if (kind == DENSE) {
      const at::Tensor* f = plain_tensor(all[i]);
      if (!f || !common.fisher(*f, d_out, d_in)) return false;
      to[i] = *f;
      return true;
    }
    const at::Tensor *outputs = plain_tensor(all[i]), *inputs = plain_tensor(all[count + i]);
    const int64_t dims = kind == KRONECKER ? 2 : 1;
    if (!outputs || !inputs || !common.fisher_factor(*outputs, dims, d_out) || !common.fisher_factor(*inputs, dims, d_in)) return false;
    to[i] = *outputs, to[count + i] = *inputs;
    return true;
  }
};

}  // namespace

std::shared_ptr<Terms> Terms::of(const std::string& op, const pybind11::handle& fishers, const pybind11::handle& lora_as,
                                 const pybind11::handle& lora_bs, const pybind11::handle& scales) {
  const Sequence fs{fishers.ptr()}, as{lora_as.ptr()}, bs{lora_bs.ptr()}, ss{scales.ptr()};
  const bool ones = scales.is_none();
  if (!fs.given() || !alike({as, bs}) || !(ones || alike({as, ss}))) return nullptr;
  const Py_ssize_t count = as.size();
  const at::Tensor* first = plain_tensor(as[0]);
  if (!first) return nullptr;
  const Common common{first->scalar_type(), first->device()};
  const Fishers found{fs, common, count, Fishers::kind_of(op)};
  if (!common.floating() || fs.size() != found.expected()) return nullptr;

  auto terms = std::make_shared<Terms>();
  recorded::PenaltyOperands& to = terms->operands;
  std::vector<at::Tensor> bs_found, ss_found;
  std::vector<int64_t> with_scale;
  to.op = op;
  to.fishers.resize(fs.size());
  to.tensors.reserve(2 * count);
  bs_found.reserve(count);
  to.scale_factors.reserve(count);
  to.needs.assign(3, false);
  for (Py_ssize_t i = 0; i < count; ++i) {
    const at::Tensor *a = plain_tensor(as[i]), *b = plain_tensor(bs[i]);
    if (!a || !b || a->dim() != 2 || b->dim() != 2) return nullptr;
    if (a->scalar_type() != common.dtype || a->device() != common.device || !common.factor(*b)) return nullptr;
    const int64_t rank = a->size(0);
    if (rank < 1 || b->size(1) != rank || !found.add(i, b->size(0), a->size(1), to.fishers)) return nullptr;
    std::optional<at::Tensor> scale;
    double factor;
    if (!read_scale(ones ? nullptr : ss[i], common, rank, scale, factor)) return nullptr;
    to.tensors.push_back(*a);
    bs_found.push_back(*b);
    to.scale_factors.push_back(factor);
    to.needs[0] = to.needs[0] || a->requires_grad();
    to.needs[1] = to.needs[1] || b->requires_grad();
    if (scale) {
      to.needs[2] = to.needs[2] || scale->requires_grad();
      ss_found.push_back(*scale);
      with_scale.push_back(2 * count + i);
    }
    terms->rank = std::max(terms->rank, rank);
  }
  to.tensors.insert(to.tensors.end(), bs_found.begin(), bs_found.end());
  to.tensors.insert(to.tensors.end(), ss_found.begin(), ss_found.end());
  to.slots.resize(2 * count);
  for (int64_t slot = 0; slot < 2 * count; ++slot) to.slots[slot] = slot;
  to.slots.insert(to.slots.end(), with_scale.begin(), with_scale.end());
  terms->numbers = with_scale.empty();
  return terms;
}

at::Tensor Terms::record(double ewc_lambda, const at::Tensor& penalty, const at::Tensor& flat) {
  operands.ewc_lambda = ewc_lambda;
  return recorded::EWCPenalty::record(std::move(operands), penalty, flat);
}

bool Terms::add_gradients(const at::Tensor& flat) const {
  const at::NoGradGuard plain;
  Gradients found;
  if (!found.collect(operands, flat)) return false;
  if (!found.held.empty()) at::_foreach_add_(found.held, found.added);
  for (size_t i = 0; i < found.fresh.size(); ++i) found.fresh[i].mutable_grad() = std::move(found.first[i]);
  return true;
}

}  // namespace fe::penalty
