// SPDX-License-Identifier: Apache-2.0
// The prepared penalty as Python sees it.
#pragma once
#include <torch/csrc/utils/pybind.h>

namespace fe::cuda {

void bind_ewc_penalty(pybind11::module& m);

}  // namespace fe::cuda
