// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <torch/csrc/utils/pybind.h>

namespace fe::eager {

// Adds to the extension module what serves plain eager calls of the public functions without Python.
void bind(pybind11::module_& m);

}  // namespace fe::eager
