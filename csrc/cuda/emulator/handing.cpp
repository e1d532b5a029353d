// SPDX-License-Identifier: Apache-2.0
// See handing.h.
#include "handing.h"

#include <dlfcn.h>

#include "emulator.h"

namespace fe::cuda::emulator {
namespace {

namespace py = pybind11;

// Where a function is in this library, as its table of symbols has it.
uintptr_t place_of(const void* function) {
  Dl_info info{};
  if (!dladdr(function, &info)) throw std::runtime_error("a kernel outside of every library");
  return reinterpret_cast<uintptr_t>(function) - reinterpret_cast<uintptr_t>(info.dli_fbase);
}

void hand(const py::function& take, const Handed& launch) {
  py::list arguments;
  for (const auto& bytes : launch.arguments) arguments.append(py::bytes(bytes));
  take(place_of(launch.kernel), py::make_tuple(launch.grid.x, launch.grid.y, launch.grid.z), launch.threads, launch.shared, arguments);
}

}  // namespace

void bind_handing(py::module& m) {
  m.def(
      "hand_launches",
      [](const py::object& take) {
        if (take.is_none()) {
          taker() = nullptr;
          return;
        }
        // Kernels are launched without the interpreter's lock.
        taker() = [function = take.cast<py::function>().release()](const Handed& launch) {
          const py::gil_scoped_acquire locked;
          hand(py::reinterpret_borrow<py::function>(function), launch);
        };
      },
      "From now on launches go to a function: place of the kernel in the library, grid, threads, shared bytes, bytes of the arguments. "
      "None: to the fibers.");
}

}  // namespace fe::cuda::emulator
