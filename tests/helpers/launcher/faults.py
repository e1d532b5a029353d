# SPDX-License-Identifier: Apache-2.0
"""python -m launcher.faults: what plans say when the CUDA driver is missing, old, or fails, as JSON by
name."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_ewclora import functional as FE
from fused_ewclora.backends import triton as backend
from fused_ewclora.backends.triton import plans
from fused_ewclora.errors import BackendError
from fused_ewclora.ops import dispatch

from . import stub

ARCH = "sm_90"
CALL = dispatch.Call("cpu", torch.bfloat16, ARCH, dispatch.LinearShape(256, 176, 208, 10), 10, "highest")
OF_LAUNCHES = {  # functions that fail while something is launched, and with what
    "cuLaunchKernelEx": 719, "cuTensorMapEncodeTiled": 1, "cuModuleLoadData": 209, "cuModuleGetFunction": 500,
    "cuFuncSetAttribute": 1, "cuDeviceGetAttribute": 101, "cuFuncGetAttribute": 400, "cuCtxGetCurrent": 3,
}  # fmt: skip


def linear(trained: bool = False) -> Callable[[], Tensor]:
    """A small call of the LoRA linear, and its backward where adapters are `trained`."""
    normal = torch.Generator().manual_seed(1)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=normal).to(torch.bfloat16)

    x, weight, bias, a, b = make(159, 176), make(208, 176), make(208), make(10, 176), make(208, 10)
    a.requires_grad_(trained), b.requires_grad_(trained)

    def call() -> Tensor:
        y = FE.lora_linear(x, weight, bias, a, b, 0.5, backend="triton:prologue")
        if trained:
            y.sum().backward()
        return y

    return call


@contextlib.contextmanager
def pretending(library: Path, **settings: int) -> Iterator[stub.Stub]:
    """The CPU as a GPU whose driver is `library`, freshly loaded."""
    driver = stub.shared()
    driver.reset()
    driver.set(capability=int(ARCH[3:]), context=1, **settings)
    backend.pretend(ARCH, str(library))
    try:
        yield driver
    finally:
        backend.pretend(None)


def raised(call: Callable[[], Any]) -> str:
    """The message of the `BackendError` that a call raises; what happens instead, in capitals."""
    try:
        call()
    except BackendError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__.upper()} {error}"
    return "NOTHING"


def without_plans(library: Path, fail: str | None = None, **settings: int) -> dict[str, Any]:
    """Why Triton's own launcher is used, what `explain` says of it, and that calls are served."""
    with pretending(library, **settings) as driver:
        if fail is not None:
            driver.fail(fail, 3)
        call = linear(trained=True)
        raises = [raised(call) for _ in range(4)]
        explained = [
            name for _, name, reason in dispatch.explain("lora_linear", CALL, "triton") if reason is None
        ]
        return {"reason": plans.unavailable(), "explained": explained, "raises": raises}


def failing(function: str, result: int, trained: bool = False) -> dict[str, Any]:
    """The error of the first plan that meets a failing function, and what follows once it works."""
    with pretending(stub.library()) as driver:
        call = linear(trained)
        before = [raised(call) for _ in range(2)]
        if trained and function == "cuLaunchKernelEx":
            forward = driver.calls(function)
            with torch.no_grad():
                linear()()
            forward = driver.calls(function) - forward
            driver.fail(function, result, after=forward)
        else:
            driver.fail(function, result)
        error = raised(call)
        driver.fail(function, 0)
        return {
            "before": before,
            "error": error,
            "after": raised(call),
            "launches": driver.calls("cuLaunchKernelEx"),
        }


def context(number: int) -> dict[str, Any]:
    """A plan whose kernels are loaded, in another context than theirs."""
    with pretending(stub.library(), devices=2) as driver:
        call = linear()
        before = [raised(call) for _ in range(3)]
        driver.set(context=number)
        return {"before": before, "error": raised(call)}


def in_thread() -> dict[str, Any]:
    """A failing launch in another thread, which has no context at first."""
    found: list[str] = []
    with pretending(stub.library()) as driver:
        call = linear()
        before = [raised(call) for _ in range(3)]

        def run() -> None:
            found.append(raised(call))
            driver.fail("cuLaunchKernelEx", 719)
            found.append(raised(call))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        driver.fail("cuLaunchKernelEx", 0)
    return {"before": before, "worked": found[0], "error": found[1]}


def left_to_triton() -> dict[str, Any]:
    """How many launches plans make in turn: as usual, while a graph is captured, and while hooks watch
    Triton's launches."""
    from triton import knobs

    def watch(metadata: Any) -> None:
        """What Triton would call at every launch."""

    with pretending(stub.library()) as driver:
        call, captured = linear(), linear()
        found: dict[str, int] = {}

        def count(name: str, called: Callable[[], Any]) -> None:
            before = driver.calls("cuLaunchKernelEx")
            called()
            found[name] = driver.calls("cuLaunchKernelEx") - before

        for _ in range(2):
            call()
        count("planned", call)
        driver.set(capturing=1)
        count("captured", call)
        backend.forget_tables()
        for _ in range(3):
            captured()
        driver.set(capturing=0)
        for number in range(3):
            count(f"after capture {number}", captured)
        knobs.runtime.launch_enter_hook.add(watch)
        count("hooked", captured)
        knobs.runtime.launch_enter_hook.remove(watch)
        count("unhooked", captured)
    return found


def main() -> None:
    lacking = stub.library(without=["cuTensorMapReplaceAddress"])
    found: dict[str, Any] = {
        "missing library": without_plans(Path("/nonexistent/libcuda.so.1")),
        "missing function": without_plans(lacking),
        "old driver": without_plans(stub.library(), version=11080),
        "no version": without_plans(stub.library(), fail="cuDriverGetVersion"),
        "backward": failing("cuLaunchKernelEx", 719, trained=True),
        "unknown error": failing("cuLaunchKernelEx", 98765),
        "other context": context(2),
        "no context": context(0),
        "thread": in_thread(),
        "left to Triton": left_to_triton(),
    }
    found |= {function: failing(function, result) for function, result in OF_LAUNCHES.items()}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
