// SPDX-License-Identifier: Apache-2.0
// Launches as Python sees them.
#pragma once
#include <pybind11/pybind11.h>

namespace fe::cuda::emulator {

void bind_handing(pybind11::module& m);

}  // namespace fe::cuda::emulator
