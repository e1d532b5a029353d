# SPDX-License-Identifier: Apache-2.0
"""Triton's own launcher, its C code included, on the stand-in for the driver, with tensors of the CPU."""

from __future__ import annotations

import functools
import os
from typing import Any

from fused_ewclora.backends.triton import launch

from . import stub

ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100")


@functools.cache
def _driver_class() -> Any:
    # Triton links its launcher with the libcuda that this names.
    os.environ["TRITON_LIBCUDA_PATH"] = str(stub.library().parent)
    stub.shared()
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class Driver(CudaDriver):  # type: ignore[misc]
        """Triton's, with what it would ask torch.cuda for."""

        def __init__(self, arch: str, stream: int) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            capability = int(arch.removeprefix("sm_"))
            device = ARCHITECTURES.index(arch)  # Triton keeps what it compiled by device
            self.get_device_capability = lambda device=None: divmod(capability, 10)
            self.get_current_stream = lambda device=None: stream
            self.get_current_device = lambda: device
            self.set_current_device = lambda device: None

    return Driver


def activate(arch: str, stream: int = 0) -> stub.Stub:
    """Let Triton launch for `arch` on the stand-in, on a stream."""
    import triton

    found, driver = stub.shared(), _driver_class()
    triton.runtime.driver.set_active(driver(arch, stream))
    found.set(capability=int(arch.removeprefix("sm_")), devices=len(ARCHITECTURES), context=1)
    return found


def run(noted: launch.Launch) -> Any:
    """What `launch.launch` does on a GPU."""
    return noted.kernel[noted.grid](*noted.arguments, **noted.options)
