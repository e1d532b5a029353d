# SPDX-License-Identifier: Apache-2.0
"""A CUDA driver that is missing, old, or fails: Triton's own launcher instead, with a reason, or a clear
error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from launcher import stub
from ptx import separately

from fused_ewclora.backends import native

pytestmark = [
    separately.needed,
    pytest.mark.skipif(stub.missing() is not None, reason=str(stub.missing())),
    pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable())),
]
FALLBACKS = {
    "missing library": "the CUDA driver cannot be loaded: /nonexistent/libcuda.so.1: ",
    "missing function": "has no function cuTensorMapReplaceAddress: expected one of CUDA 12.0 or newer",
    "old driver": "the CUDA driver is of CUDA 11.8: expected one of CUDA 12.0 or newer",
    "no version": "does not tell its version: error 3",
}
WORDS = {
    "cuLaunchKernelEx": "unspecified launch failure (719)",
    "cuTensorMapEncodeTiled": "a tensor map: invalid argument (1)",
    "cuModuleLoadData": "does not load: no kernel image is available for execution on the device (209)",
    "cuModuleGetFunction": "not in its machine code: named symbol not found (500)",
    "cuFuncSetAttribute": "invalid argument (1)",
    "cuDeviceGetAttribute": "invalid device ordinal (101)",
    "cuFuncGetAttribute": "invalid resource handle (400)",
    "cuCtxGetCurrent": "initialization error (3)",
    "backward": "unspecified launch failure (719)",
    "unknown error": "unknown error (98765)",
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return dict(json.loads(separately.run("launcher.faults")))


@pytest.mark.parametrize("name", FALLBACKS)
def test_fallback(found: dict[str, Any], name: str) -> None:
    """Calls are served, and `explain` says who launches and why."""
    outcome = found[name]
    assert outcome["raises"] == ["NOTHING"] * 4
    assert FALLBACKS[name] in outcome["reason"] and "\n" not in outcome["reason"]
    assert outcome["explained"]
    for algorithm in outcome["explained"]:
        assert algorithm.endswith(f"; launched by Triton's launcher: {outcome['reason']}")


@pytest.mark.parametrize("name", WORDS)
def test_failures(found: dict[str, Any], name: str) -> None:
    """A function that fails is a BackendError that names the op, the kernel, its configuration, the shapes
    and what the driver says; afterwards calls are served again."""
    outcome = found[name]
    assert outcome["before"] == ["NOTHING"] * 2
    op = "lora_linear_backward_prologue" if name == "backward" else "lora_linear_prologue"
    assert outcome["error"].startswith(f"backend 'triton', {op}: ")
    for word in ("_kernel: grid (", "num_warps=", "[159, ", "[208, 176] bfloat16", WORDS[name]):
        assert word in outcome["error"], word
    assert outcome["after"] == "NOTHING"
    assert outcome["launches"] > 0


def test_other_context(found: dict[str, Any]) -> None:
    """A context that is not that of the kernels is an error; none is made current."""
    assert found["other context"]["before"] == ["NOTHING"] * 3
    assert "invalid resource handle (400)" in found["other context"]["error"]
    assert found["no context"]["error"] == "NOTHING"


def test_other_thread(found: dict[str, Any]) -> None:
    """Threads that never used a GPU launch as well, and raise there."""
    assert found["thread"]["before"] == ["NOTHING"] * 3
    assert found["thread"]["worked"] == "NOTHING"
    assert "unspecified launch failure (719)" in found["thread"]["error"]


def test_left_to_triton(found: dict[str, Any]) -> None:
    """While a graph is captured plans neither launch nor are made, and hooks on Triton's launches see all
    of them."""
    assert found["left to Triton"] == {
        "planned": 3, "captured": 0, "after capture 0": 0, "after capture 1": 0, "after capture 2": 3,
        "hooked": 0, "unhooked": 3,
    }  # fmt: skip
