// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <torch/csrc/utils/pybind.h>

namespace fe::plans {

// Adds plans, their hosts and the driver to the extension module.
void bind(pybind11::module_& m);

}  // namespace fe::plans
