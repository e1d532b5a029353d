# SPDX-License-Identifier: Apache-2.0
"""Energy of computations on NVIDIA GPUs, from the driver's counter of consumed energy.

The counter is that of the whole GPU, so every value includes the idle power. It is updated every few tens of
milliseconds: a computation is repeated from one update to a later one.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

LIBRARY = "libnvidia-ml.so.1"  # comes with the driver
NAME = "nvmlDeviceGetTotalEnergyConsumption"
Counter = Callable[[], float]  # millijoules since the driver was loaded


class Unmeasurable(RuntimeError):
    """There is no counter; the message says why."""


def _checked(library: ctypes.CDLL, name: str, *arguments: object) -> None:
    status = getattr(library, name)(*arguments)
    if status:
        text = library.nvmlErrorString
        text.restype = ctypes.c_char_p
        raise Unmeasurable(f"{name}: {text(status).decode(errors='replace')}")


def counter() -> Counter:
    """The counter of CUDA's current device; raises `Unmeasurable` where the driver has none."""
    try:
        library = ctypes.CDLL(LIBRARY)
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        handle, total = ctypes.c_void_p(), ctypes.c_ulonglong()
        _checked(library, "nvmlInit_v2")
        _checked(library, "nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(handle))
        _checked(library, NAME, handle, ctypes.byref(total))
    except (OSError, AttributeError, RuntimeError, AssertionError) as failure:
        raise Unmeasurable(str(failure)) from failure

    def read() -> float:
        _checked(library, NAME, handle, ctypes.byref(total))
        return float(total.value)

    return read


@dataclass
class Meter:
    """Millijoules per call. Seconds: window, the least between the two updates of the counter; limit, the
    most for one measurement; allowance, the most for all measurements together."""

    read: Counter
    window: float = 0.04
    limit: float = 1.0
    allowance: float = 10.0

    def per_call(self, burst: Callable[[], int]) -> float | None:
        """`burst` runs calls, waits until they are done and returns their number. None where the counter is
        not updated in time, or the allowance is spent."""
        if self.allowance <= 0.0:
            return None
        begin = time.perf_counter()
        end = begin + self.limit
        first = self._step(burst, 0.0, end)
        second = self._step(burst, self.window, end) if first else None
        self.allowance -= time.perf_counter() - begin
        if first is None or second is None:
            return None
        return (second[1] - first[1]) / second[0]

    def _step(self, burst: Callable[[], int], least: float, end: float) -> tuple[int, float] | None:
        """Calls until the first update of the counter after `least` seconds, and its value then."""
        begin, calls, before = time.perf_counter(), 0, self.read()
        while (now := time.perf_counter()) < end:
            calls += burst()
            value = self.read()
            if value != before and now - begin >= least:
                return calls, value
            before = value
        return None


def meter(allowance: float = 10.0) -> tuple[Meter | None, str]:
    """A meter for the current GPU, and the text for records: the counter's name, or why there is none."""
    try:
        return Meter(counter(), allowance=allowance), NAME
    except Unmeasurable as reason:
        return None, f"not measured: {reason}"
