# SPDX-License-Identifier: Apache-2.0
"""The Triton backend: which calls its kernels serve, why not the others, and the hosts that launch them.

Importing this module does not import Triton.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ...errors import BackendError
from ...reference import kronecker_penalty
from .. import candidate
from ..candidate import Call, Candidate, pretended, remembers_choices
from . import cost_model, kept, launch, plans, tables

MIN_VERSION = (3, 6)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = 80  # bf16 and tf32 matrix units, asynchronous copies
KERNELS = (  # modules of kernels
    "ewc_penalty", "factored_penalty", "fisher_accumulate", "fisher_sums", "lora_linear", "lowrank", "merge"
)  # fmt: skip
MAX_PENALTY_RANK = 128  # dA of a block of columns stays in registers


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


@remembers_choices
@functools.cache
def unavailable() -> str | None:
    """Why no call can be served, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    version = importlib.metadata.version("triton")
    if (found := _numbers(version)) < MIN_VERSION:
        return f"Triton {version} is installed, {'.'.join(map(str, MIN_VERSION))} or newer is needed"
    if not (torch.cuda.is_available() or simulated()):
        return "no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests)"
    numpy = importlib.metadata.version("numpy")
    if interpreting() and found < (3, 7) and _numbers(numpy) >= (2, 4):
        return f"the interpreter of Triton {version} needs NumPy 2.3 or older, {numpy} is installed"
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken install raises anything
        return f"Triton {version} failed to import: {error}"
    return None


def interpreting() -> bool:
    """Whether Triton is asked to interpret kernels on the CPU, without a GPU."""
    asked = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
    return asked and not torch.cuda.is_available()


def simulated() -> bool:
    """Whether CPU tensors are served, when Triton is asked for by name."""
    return interpreting() or pretended() is not None


def pretend(arch: str | None, library: str = "", prefix: str = "") -> None:
    """Let CPU tensors be served as by a GPU of architecture `arch` whose launches do nothing, when Triton is
    asked for by name: for tests, and to measure what the host does. None ends it.

    library, prefix: the driver that is launched through, and the beginning of its functions' names; the stub
    in the extension where none is given. Results are memory that nothing has written. Raises `BackendError`
    where Triton's interpreter is on.
    """
    if arch is not None and interpreting():
        raise BackendError("pretend: expected TRITON_INTERPRET not to be set: kernels are interpreted")
    plans.forget()
    launch.drive(library, prefix)
    candidate.pretend(arch)


def forget_tables() -> None:
    """Let go of the device memory that hosts keep, that of captured graphs included."""
    plans.forget()
    kept.forget()


def _cannot(call: Call) -> str | None:
    if (reason := unavailable()) is not None:
        return reason
    if call.device != ("cpu" if simulated() else "cuda"):
        return f"tensors are on {call.device}"
    if call.dtype not in DTYPES:
        return f"{call.dtype} runs on the reference"
    arch = call.arch or ""
    if arch.startswith("sm_") and int(arch[3:]) < MIN_CAPABILITY:
        return f"compute capability {arch[3:-1]}.{arch[-1]}, 8.0 or newer is needed"
    return None


def has_penalty(rank: int, arch: str, op: str = "ewc_penalty") -> bool:
    """Whether a penalty has a configuration for `rank`: where every block size would spill registers, none
    is shipped."""
    name = "ewc_penalty" if op == "l1_penalty" else op  # one kernel for both
    kernel = f"{name}_kernel:{launch.precision()}"
    return tables.has(kernel, arch, torch.float32, 1 << (rank - 1).bit_length())


def _cannot_penalty(op: str, call: Call) -> str | None:
    if (reason := _cannot(call)) is not None:
        return reason
    rank = call.rank or 1
    if rank > MAX_PENALTY_RANK:
        return f"rank {rank} > {MAX_PENALTY_RANK}"
    arch = launch.INTERPRETED if interpreting() else str(call.arch)
    if not has_penalty(rank, arch, op):
        return f"no configuration for rank {rank} at matmul precision {call.precision!r} on {arch}"
    return None


def _tensors(argument: Any) -> Iterable[Any]:
    """Those of one argument, which is a tensor or a list of some."""
    return (argument,) if isinstance(argument, torch.Tensor) else argument


def _host(module: str, function: str) -> Callable[..., Any]:
    """A function of a host module, which imports Triton, found at the first call; runs on the device of the
    call's tensors."""

    @functools.cache
    def found() -> Callable[..., Any]:
        host = importlib.import_module(f"{__name__}.{module}")
        for name in KERNELS:
            launch.settle(importlib.import_module(f"fused_ewclora.kernels.{name}"))
        return getattr(host, function)

    def run(*arguments: Any) -> Any:
        first = next((t for argument in arguments for t in _tensors(argument)), None)
        # Launches go to the current device.
        if first is not None and first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return found()(*arguments)
        return found()(*arguments)

    return run


_OTHERS: dict[str, tuple[str, str, Callable[[Call], str | None]]] = {
    "ewc_penalty": (
        "ewc_penalty", "Triton, one launch, one pass over F",
        functools.partial(_cannot_penalty, "ewc_penalty"),
    ),
    "factored_penalty": (
        "factored_penalty", "Triton, one launch, a program per adapter",
        functools.partial(_cannot_penalty, "factored_penalty"),
    ),
    "l1_penalty": (
        "ewc_penalty", "Triton, one launch, B A in tiles",
        functools.partial(_cannot_penalty, "l1_penalty"),
    ),
    "fisher_accumulate_": ("fisher_accumulate", "Triton, squared in registers", _cannot),
    "fisher_sums_": ("fisher_sums", "Triton, squared and summed in registers", _cannot),
    "merge_": ("merge", "Triton, one pass over W", _cannot),
    "soft_threshold_": ("merge", "Triton, in place", _cannot),
}  # fmt: skip
_ALGORITHMS = {
    "full": "Triton, z in the K loop of the product",
    "prologue": "Triton, product on top of the low-rank term",
    "addmm": "Triton low-rank term, BLAS product on top",
    "concat": "BLAS product of [x, z] and [W, sB]",
}


def candidates(op: str) -> tuple[Candidate, ...]:
    """The Triton implementations of `op`, each with its reasons."""
    if op in _OTHERS:
        module, algorithm, supports = _OTHERS[op]
        run = plans.planned(op, _host(module, op))
        return (Candidate("triton", algorithm, supports, run, remark=plans.remark),)
    if op == "kronecker_penalty":
        run = kronecker_penalty.penalty_and_grads
        return (Candidate("triton", "PyTorch, products by BLAS", _cannot, run),)
    backward = op == "lora_linear_backward"
    found = []
    for key, algorithm in _ALGORITHMS.items():
        if backward and key == "full":
            continue  # u comes out of the pass that dB needs anyway
        keys = ("prologue", "full") if backward and key == "prologue" else (key,)
        supports = functools.partial(_cannot_linear, op, key)
        outperformed = functools.partial(cost_model.slower, op, key)
        name = f"{op}_{key}"
        host = _host("lora_linear", name)
        run = plans.planned_linear(name, host)
        planned = (name, host)
        linear = None if backward else functools.partial(_linear, planned)
        found.append(
            Candidate(
                "triton", algorithm, supports, run, keys, outperformed, linear, planned, remark=plans.remark
            )
        )
    return tuple(found)


def _linear(forward: tuple[str, Callable[..., Any]], backward: Candidate) -> int | None:
    """Where forward and backward are computed by plans, or None."""
    return None if backward.planned is None else plans.linear_backend(forward, backward.planned)


def _cannot_linear(op: str, algorithm: str, call: Call) -> str | None:
    if (reason := _cannot(call)) is not None:
        return reason
    return cost_model.impossible(op, algorithm, call)
