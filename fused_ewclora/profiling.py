# SPDX-License-Identifier: Apache-2.0
"""Named ranges around every operation, for torch.profiler, Nsight Systems and whatever else shows them.

Off, nothing of this is on the path of a call: the functions that run are those of the backends themselves.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from .errors import BackendError
from .ops import dispatch, schemas


def _size(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _linear(x: Tensor, weight: Tensor, lora_as: Sequence[Tensor]) -> str:
    ranks = "+".join(str(a.shape[0]) for a in lora_as)
    return f"{_size(x)}, W {_size(weight)}, rank {ranks}, {_dtype(x)}"


def _many(what: str, tensors: Sequence[Tensor]) -> str:
    return f"{what} {len(tensors)}, first {_size(tensors[0])}, {_dtype(tensors[0])}"


def _adapters(what: str, tensors: Sequence[Tensor], lora_as: Sequence[Tensor]) -> str:
    return f"{_many(what, tensors)}, rank {max(a.shape[0] for a in lora_as)}"


def _products(lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor]) -> str:
    size, rank = [lora_bs[0].shape[0], lora_as[0].shape[1]], max(a.shape[0] for a in lora_as)
    return f"adapters {len(lora_as)}, first {size}, {_dtype(lora_as[0])}, rank {rank}"


def _samples(x: Tensor, dy: Tensor, squares: str) -> str:
    return f"x {_size(x)}, dy {_size(dy)}, {_dtype(x)}, {squares}"


# What a range says of the arguments of an op.
_DESCRIBED = schemas.by_name(
    {
        "lora_linear": lambda x, weight, lora_as: "x " + _linear(x, weight, lora_as),
        "lora_linear_backward": lambda dy, weight, lora_as: "dy " + _linear(dy, weight, lora_as),
        "ewc_penalty": lambda fishers, lora_as: _adapters("adapters", fishers, lora_as),
        **dict.fromkeys(("factored_penalty", "kronecker_penalty", "l1_penalty"), _products),
        **dict.fromkeys(("fisher_accumulate_", "fisher_sums_"), _samples),
        "merge_": lambda weights, lora_as: _adapters("weights", weights, lora_as),
        "soft_threshold_": lambda scales: _many("vectors", scales),
    }
)


def _name(op: str, candidate: dispatch.Candidate, args: Sequence[Any]) -> str:
    return f"fused_ewclora.{op}({_DESCRIBED[op](args)}) {candidate.backend}: {candidate.algorithm}"


def _annotated(op: str, candidate: dispatch.Candidate, nvtx: bool) -> dispatch.Candidate:
    @functools.wraps(candidate.run)
    def run(*args: Any) -> Any:
        name = _name(op, candidate, args)
        with record_function(name), _nvtx_range(name) if nvtx else contextlib.nullcontext():
            return candidate.run(*args)

    return candidate._replace(run=run, linear=None)  # which would run without a range


@contextlib.contextmanager
def _nvtx_range(name: str) -> Iterator[None]:
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


class enable:  # lower case: it is used like a function
    """Name a range after every operation that runs from now on, or until the end of a `with` block.

    A range has the op, the shapes and dtype of its arguments, the backend and the algorithm. Ranges are those
    of `torch.profiler.record_function`. Kernels of the backward pass are inside the ranges of their own
    operations. Inside a captured CUDA graph only the capture has ranges.

    Args:
        nvtx: NVTX ranges as well, for Nsight Systems and Nsight Compute.

    Raises:
        BackendError: where PyTorch has no NVTX.

    Examples:
        >>> with profiling.enable():
        ...     y = FE.lora_linear(x, torch.zeros(4, 8), None, torch.ones(2, 8), torch.ones(4, 2))
    """

    def __init__(self, *, nvtx: bool = False) -> None:
        if nvtx:
            try:
                torch.cuda.nvtx.mark("fused_ewclora.profiling")
            except RuntimeError as error:
                raise BackendError(f"nvtx: this build of PyTorch has no NVTX ({error})") from error
        self._previous = dispatch.annotate(functools.partial(_annotated, nvtx=nvtx))

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        dispatch.annotate(self._previous)


def disable() -> None:
    """No ranges any more.

    Examples:
        >>> profiling.disable()
    """
    dispatch.annotate(None)
