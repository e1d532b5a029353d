# SPDX-License-Identifier: Apache-2.0
"""What property tests vary: backends, shapes, ranks, dtypes, strides.

Structure comes from hypothesis, values from a generator whose seed does. Nothing is imported here that a
machine with a GPU alone (no compiled extension, no process pool) lacks.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import seeding
import torch
from budgets import EXAMPLES, FACTOR, INTERPRETED_EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fused_ewclora as fe
from fused_ewclora.ops.dispatch import Call, LinearShape, algorithms, arch_of, bucket, explain

BACKENDS = [name for name, why in fe.available_backends().items() if why is None]
# The LoRA linear has several algorithms on some backends; each is tested by its name.
LINEAR_BACKENDS = [
    name if key is None else f"{name}:{key}" for name in BACKENDS for key in algorithms(name) or (None,)
]
ON_GPU = ("triton", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOW_PRECISION = (torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "every other column", "columns of a wider matrix", "expanded")

# 1, primes, both sides of vector lengths and of register tiles; never only multiples of 16
WIDTHS = (1, 2, 3, 5, 7, 13, 15, 16, 17, 24, 31, 33, 47, 48, 61, 64, 97, 131)
RANKS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 13, 17, 30, 31, 33, 64, 70)

widths = st.sampled_from(WIDTHS)
ranks = st.sampled_from(RANKS)
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 2**32 - 1)
leading_shapes = st.one_of(
    st.just(()),
    st.tuples(st.sampled_from((0, 1, 2, 5, 29, 50, 67))),
    st.tuples(st.integers(0, 4), st.integers(1, 9)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5)),
)


def family(backend: str) -> str:
    """The backend of a name that may carry an algorithm."""
    return backend.partition(":")[0]


def device_of(backend: str) -> str:
    """Where tensors for `backend` live; without a GPU its kernels are interpreted or emulated on the CPU."""
    return "cuda" if family(backend) in ON_GPU and torch.cuda.is_available() else "cpu"


def interpreted(backend: str) -> bool:
    """Whether its kernels run on the CPU, in Triton's interpreter or in the emulator of CUDA."""
    return family(backend) in ON_GPU and not torch.cuda.is_available()


def skip_if_interpreted(backend: str, why: str) -> None:
    """For sizes that take minutes on the CPU; a GPU runs them."""
    if interpreted(backend):
        pytest.skip(f"GPU kernels on the CPU are too slow: {why}")


def set_threads(backend: str, count: int) -> None:
    """For tests over numbers of threads, which mean nothing to a GPU."""
    if family(backend) in ON_GPU and count > 1:
        pytest.skip("the number of threads is the CPU's")
    torch.set_num_threads(count)


def property_test(
    examples: int = EXAMPLES, **drawn: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`given(**drawn)` for tests with a parameter `backend`: FACTOR times `examples`, or few where
    `interpreted`."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def test(**fixed: Any) -> None:
            most = INTERPRETED_EXAMPLES if interpreted(fixed["backend"]) else examples
            if (profile := settings().max_examples) < EXAMPLES:  # one for a quick look
                most = min(most, profile)
            settings(max_examples=FACTOR * min(examples, most))(given(**drawn)(function))(**fixed)

        test.__name__, test.__doc__, test.__module__ = (
            function.__name__,
            function.__doc__,
            function.__module__,
        )
        signature = inspect.signature(function)
        fixtures = [p for name, p in signature.parameters.items() if name not in drawn]
        test.__signature__ = signature.replace(parameters=fixtures)  # what pytest has to supply
        return test

    return decorate


def call_for(backend: str, dtype: torch.dtype, **sizes: Any) -> Call:
    """What the choice of an implementation would depend on."""
    device = torch.device(device_of(backend))
    precision = torch.get_float32_matmul_precision() if dtype == torch.float32 else None
    return Call(device.type, dtype, arch_of(device), precision=precision, **sizes)


def refusal(backend: str, op: str, dtype: torch.dtype, **sizes: Any) -> str | None:
    """Why `backend` cannot run `op`, or None."""
    rows = explain(op, call_for(backend, dtype, **sizes), backend)
    reasons = [reason for name, _, reason in rows if name == family(backend)]
    return None if None in reasons else "; ".join(map(str, reasons))


def serves(backend: str, op: str, dtype: torch.dtype, **sizes: Any) -> bool:
    """Whether `backend` runs `op` on `dtype`."""
    return refusal(backend, op, dtype, **sizes) is None


def refused_linear(
    backend: str, rank: int, dropout: bool = False, dtype: torch.dtype = torch.float32, rows: int = 64
) -> str | None:
    """Why `backend` runs no LoRA linear of this total rank, forward and backward, or None."""
    shape = LinearShape(bucket(rows), 64, 64, rank, dropout)
    ops = ("lora_linear", "lora_linear_backward")
    return next(filter(None, (refusal(backend, op, dtype, shape=shape) for op in ops)), None)


def dtypes_of(backend: str, op: str) -> list[torch.dtype]:
    return [dtype for dtype in DTYPES if serves(backend, op, dtype)]


DROPOUT_BACKENDS = [name for name in LINEAR_BACKENDS if refused_linear(name, 1, dropout=True) is None]


class Values:
    """Normal random tensors of one seed, on the device of one backend."""

    def __init__(self, seed: int, backend: str = "reference") -> None:
        self.generator = seeding.generator(seed)
        self.device = device_of(backend)

    def normal(
        self,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        std: float = 1.0,
        layout: str = "contiguous",
    ) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * std
        return with_layout(values.to(dtype).to(self.device), layout)

    def full(self, shape: tuple[int, ...], value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=self.device)

    def zeros(self, *shape: int) -> Tensor:
        return self.full(shape, 0.0)

    def fisher(self, *shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
        """Non-negative, over several orders of magnitude, some exactly zero."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64).exp()
        values[torch.rand(shape, generator=self.generator) < 0.1] = 0.0
        return with_layout(values.to(dtype).to(self.device), layout)


@functools.cache
def gap(dtype: torch.dtype) -> float:
    """What to put between the elements of strided tensors: NaN, which spoils every sum that it enters.

    PyTorch's own 16-bit product reads past the ends of rows on processors with AMX and multiplies what is
    there by zero. Its gaps hold a large finite number, which shows where it counts, not where it is read.
    """
    if torch.cuda.is_available() or dtype not in LOW_PRECISION:
        return math.nan
    # Which of these products does so depends on the number of threads.
    for rows, columns, inner in itertools.product((6, 24, 64), (16, 32, 61), (5, 29, 33)):
        buffer = torch.full((rows, inner + 13), math.nan, dtype=dtype)
        buffer[:, 3 : 3 + inner] = 1.0
        product = buffer[:, 3 : 3 + inner] @ torch.ones(inner, columns, dtype=dtype)
        if bool(product.isnan().any()):
            return 2.0**14
    return math.nan


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values (if expanded: the first row everywhere) with other strides; between them lies `gap`."""
    if layout == "contiguous" or tensor.dim() == 0:
        return tensor
    *leading, columns = tensor.shape
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded" and tensor.dim() >= 2 and tensor.shape[-2]:
        return tensor[..., :1, :].contiguous().expand(tensor.shape)
    step = 2 if layout == "every other column" else 1
    if layout in ("every other column", "columns of a wider matrix"):
        buffer = tensor.new_full((*leading, step * columns + 5), gap(tensor.dtype))
        view = buffer[..., 3 : 3 + step * columns : step]
        return view.copy_(tensor)
    return tensor


@st.composite
def row_ranges(draw: Any, d_out: int, most: int = 5) -> list[tuple[tuple[int, int], ...]]:
    """Disjoint row ranges of [0, d_out) in any order, dealt out to one or more adapters."""
    cuts = sorted(draw(st.sets(st.integers(0, d_out), min_size=2, max_size=min(2 * most, d_out + 1))))
    pieces = draw(st.permutations(list(itertools.pairwise(cuts))))
    pieces = pieces[: draw(st.integers(1, min(most, len(pieces))))]  # some rows belong to nobody
    adapters = draw(st.integers(1, len(pieces)))
    return [tuple(pieces[i::adapters]) for i in range(adapters)]
