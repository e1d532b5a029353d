# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU extension: loads it, says why it is missing, and names the calls it cannot serve."""

from __future__ import annotations

import functools
import importlib
import types
import warnings

import torch

from ..errors import EWCLoRAWarning
from ..reference import kronecker_penalty
from . import built
from .candidate import Call, Candidate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALGORITHMS = {
    "lora_linear": "C++ prologue into BLAS addmm",
    "lora_linear_backward": "C++ row passes around BLAS addmm",
    "ewc_penalty": "C++ one pass over F",
    "l1_penalty": "C++ one pass over B A, in tiles",
    "factored_penalty": "C++, products of rank columns",
    "fisher_accumulate_": "C++ tiled product, squared in cache",
    "fisher_sums_": "C++ tiled product, squares summed in registers",
    "merge_": "C++ one pass over W",
    "soft_threshold_": "C++ in place",
}


@functools.cache
def _load() -> tuple[types.ModuleType | None, str | None]:
    try:
        return importlib.import_module("fused_ewclora._C"), None
    except ModuleNotFoundError:
        if (unwanted := built.unwanted()) is not None:
            warnings.warn(f"fused_ewclora: {unwanted}", EWCLoRAWarning, stacklevel=2)
            return None, unwanted
        reason = "the C++ extension was not built (FUSED_EWCLORA_BUILD=none, or no compiler at install time)"
        return None, reason
    except ImportError as error:
        reason = f"the C++ extension failed to load: {error}"
        message = f"fused_ewclora: {reason}; falling back to the reference backend"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return None, reason


def extension() -> types.ModuleType | None:
    """The module `fused_ewclora._C`, or None when it is not available."""
    return _load()[0]


def unavailable() -> str | None:
    """Why the CPU backend cannot be used, or None."""
    return _load()[1]


def _supports(call: Call) -> str | None:
    if (reason := unavailable()) is not None:
        return reason
    if call.device != "cpu":
        return f"tensors are on {call.device}"
    return None if call.dtype in DTYPES else f"{call.dtype} runs on the reference"


def candidates(op: str) -> tuple[Candidate, ...]:
    """The C++ implementation of `op`; listed with its reason when the extension is missing."""
    module = extension()
    if op == "kronecker_penalty":  # a pass over two matrices by BLAS, which nothing beats
        return (Candidate("cpu", "BLAS products", _supports, kronecker_penalty.penalty_and_grads),)
    if op not in _ALGORITHMS:
        return ()
    run = getattr(module, op, _missing)
    linear = _linear if op == "lora_linear" and module is not None else None
    return (Candidate("cpu", _ALGORITHMS[op], _supports, run, linear=linear),)


def _linear(backward: Candidate) -> int | None:
    """What computes forward and backward in C++, where the backward is to run here as well."""
    module = extension()
    assert module is not None
    return int(module.linear_backend()) if backward.backend == "cpu" else None


def _missing(*_: object) -> None:
    raise AssertionError("chosen although the extension is missing")
