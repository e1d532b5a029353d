# SPDX-License-Identifier: Apache-2.0
"""The compiled CUDA extension: loads it, says why it is missing, and names the calls it cannot serve.

Tests install a build of the same sources for an emulator of the GPU instead (`emulate`); it serves CPU
tensors, slowly, when it is asked for by name.
"""

from __future__ import annotations

import functools
import importlib
import types
import warnings

import torch

from ..reference import kronecker_penalty
from .candidate import Call, Candidate, forget_choices

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = 80  # bf16 and tf32 matrix units, asynchronous copies
NOT_BUILT = (
    "the CUDA extension was not built"
    " (FUSED_EWCLORA_BUILD=cuda builds it, with nvcc and a CUDA build of PyTorch)"
)
_ALGORITHMS = {
    "lora_linear": "CUDA low-rank passes around cuBLAS",
    "lora_linear_backward": "CUDA low-rank passes around cuBLAS",
    "ewc_penalty": "CUDA, one launch, one pass over F",
    "l1_penalty": "CUDA, one launch, B A in registers",
    "factored_penalty": "CUDA, one launch, rank by rank",
    "fisher_accumulate_": "CUDA, squared in registers",
    "fisher_sums_": "CUDA, squares summed in registers",
    "merge_": "CUDA, one pass over W",
    "soft_threshold_": "CUDA, in place",
}

_emulated: types.ModuleType | None = None


def emulate(module: types.ModuleType | None) -> None:
    """Let `module`, compiled for the emulator, serve CPU tensors; None ends it. For tests."""
    global _emulated
    _emulated = module
    forget_choices()


def emulating() -> bool:
    """Whether kernels run in the emulator, on CPU tensors."""
    return _emulated is not None


@functools.cache
def _load() -> tuple[types.ModuleType | None, str | None]:
    try:
        return importlib.import_module("fused_ewclora._C_cuda"), None
    except ModuleNotFoundError:
        return None, NOT_BUILT
    except ImportError as error:
        reason = f"the CUDA extension failed to load: {error}"
        message = f"fused_ewclora: {reason}; other backends serve its calls"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return None, reason


def extension() -> types.ModuleType | None:
    """The module `fused_ewclora._C_cuda` (or the one that `emulate` was given), None when there is none."""
    return _emulated or _load()[0]


def forget_tables() -> None:
    """Let go of the tables of penalties, those of captured graphs included. `ops.dispatch` has waited for the
    GPUs."""
    module = extension()
    if module is not None:
        module.forget_penalty_tables()


def unavailable() -> str | None:
    """Why no call can be served, or None."""
    if emulating():
        return None
    if (reason := _load()[1]) is not None:
        return reason
    return None if torch.cuda.is_available() else "no GPU"


def _supports(call: Call) -> str | None:
    if (reason := unavailable()) is not None:
        return reason
    if call.device != ("cpu" if emulating() else "cuda"):
        return f"tensors are on {call.device}"
    if call.dtype not in DTYPES:
        return f"{call.dtype} runs on the reference"
    arch = call.arch or ""
    if arch.startswith("gfx"):
        return f"{arch} is not a GPU of NVIDIA"
    if arch and int(arch[3:]) < MIN_CAPABILITY:
        return f"compute capability {arch[3:-1]}.{arch[-1]}, 8.0 or newer is needed"
    return None


def _compiled(op: str, call: Call) -> str | None:
    if (reason := _supports(call)) is not None:
        return reason
    return None if hasattr(extension(), op) else f"{op} is not in the extension that was built"


def candidates(op: str) -> tuple[Candidate, ...]:
    """The CUDA implementation of `op`; listed with its reason when the extension is missing."""
    if op == "kronecker_penalty":  # products of whole matrices alone
        plain = kronecker_penalty.penalty_and_grads
        return (Candidate("cuda", "plain PyTorch, products by BLAS", _supports, plain),)
    if op not in _ALGORITHMS:
        return ()
    run = getattr(extension(), op, _missing)
    linear = _linear if op == "lora_linear" and hasattr(extension(), "linear_backend") else None
    supports = functools.partial(_compiled, op)
    return (Candidate("cuda", _ALGORITHMS[op], supports, run, linear=linear),)


def _linear(backward: Candidate) -> int | None:
    """Where forward and backward are computed, if both are to run here."""
    module = extension()
    return None if module is None or backward.backend != "cuda" else int(module.linear_backend())


def _missing(*_: object) -> None:
    raise AssertionError("chosen although the extension is missing")
