"""What property tests vary: backends, shapes, ranks, dtypes, strides.

Structure comes from hypothesis, values from a generator whose seed does.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import fused_ewclora as fe
from fused_ewclora.ops._dispatch import Call, explain

BACKENDS = [name for name, why in fe.available_backends().items() if why is None]
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


def device_of(backend: str) -> str:
    return "cuda" if backend in ("triton", "cuda") else "cpu"


def serves(backend: str, op: str, dtype: torch.dtype) -> bool:
    """Whether `backend` runs `op` on `dtype`."""
    rows = explain(op, Call(device_of(backend), dtype), backend)
    return any(reason is None for _, _, reason in rows)


def dtypes_of(backend: str, op: str) -> list[torch.dtype]:
    return [dtype for dtype in DTYPES if serves(backend, op, dtype)]


class Values:
    """Normal random tensors of one seed, on the device of one backend."""

    def __init__(self, seed: int, backend: str = "reference") -> None:
        self.generator = torch.Generator().manual_seed(seed)
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

    def fisher(self, *shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
        """Non-negative, over several orders of magnitude, some exactly zero."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64).exp()
        values[torch.rand(shape, generator=self.generator) < 0.1] = 0.0
        return with_layout(values.to(dtype).to(self.device), layout)


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values (if expanded: the first row everywhere) with other strides; between them lies NaN."""
    if layout == "contiguous" or tensor.dim() == 0:
        return tensor
    *leading, columns = tensor.shape
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded" and tensor.dim() >= 2 and tensor.shape[-2]:
        return tensor[..., :1, :].contiguous().expand(tensor.shape)
    step = 2 if layout == "every other column" else 1
    if layout in ("every other column", "columns of a wider matrix"):
        buffer = tensor.new_full((*leading, step * columns + 5), math.nan)
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
