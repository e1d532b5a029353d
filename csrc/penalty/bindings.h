// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <torch/csrc/utils/pybind.h>

namespace fe::penalty {

// Adds to the extension module what checks the arguments of plain eager calls, and what hands out the gradients of a penalty.
void bind(pybind11::module_& m);

}  // namespace fe::penalty
