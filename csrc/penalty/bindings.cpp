// SPDX-License-Identifier: Apache-2.0
#include "bindings.h"

#include "common.h"
#include "terms.h"

namespace fe::penalty {
namespace {

// Whether every object in a list is None or a plain tensor.
bool are_plain(const pybind11::list& objects) {
  const Sequence all{objects.ptr()};
  for (Py_ssize_t i = 0; i < all.size(); ++i)
    if (all[i] != Py_None && !plain_tensor(all[i])) return false;
  return true;
}

}  // namespace

void bind(pybind11::module_& m) {
  using Unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("are_plain", &are_plain);
  m.def("is_merge", &is_merge);
  pybind11::class_<Terms, std::shared_ptr<Terms>>(m, "PenaltyTerms", "The checked arguments of a penalty in the common form.")
      .def_static("of", &Terms::of)
      .def_readonly("rank", &Terms::rank)
      .def_readonly("numbers", &Terms::numbers)
      .def_property_readonly("needs", [](const Terms& terms) { return terms.operands.needs; })
      .def("record", &Terms::record, Unlocked())
      .def("add_gradients", &Terms::add_gradients, Unlocked());
}

}  // namespace fe::penalty
