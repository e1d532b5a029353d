# SPDX-License-Identifier: Apache-2.0
"""A case as data, before anything is allocated, and the bytes and FLOPs that it takes at least.

FLOPs are those of matrix products, counting multiplications and additions; elementwise work is not counted.
Bytes count every input once per pass that reads it, and every result once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fused_ewclora.reference.eight_bit import row_bytes

from .shapes import GIANT, LLAMA, RELEASE, SMALL_VIT, T5, TINY, Model, TextModel

Shape = dict[str, int | str]
VITS = (RELEASE.base, RELEASE.large, RELEASE.huge, GIANT)
TEXTS = (LLAMA, T5)
MODELS: dict[str, Model | TextModel] = {
    m.name.split("/")[0]: m for m in (*VITS, *TEXTS, SMALL_VIT, RELEASE.small, TINY)
}
BOTH = "forward+backward"
ALL_LINEARS = "all"  # value of "linears" in the shape of a penalty on every linear of a model
EIGHT_BIT, FACTORED, KRONECKER = "8-bit", "factored", "kronecker"  # values of "fisher" in a shape
STRUCTURES = (EIGHT_BIT, FACTORED, KRONECKER)

# Parts of a plan. Peers that take long to prepare, such as compiled ones, must not delay the other cases of a
# GPU: they are measured LATER, and their records belong to the same case. SMALL cases have few providers. The
# case OP measures a call of the op alone.
WHOLE, MAIN, LATER, SMALL, OP = "whole", "main", "later", "small", "op"


class Work(NamedTuple):
    """The least work of a case."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Workload:
    """A case before it runs, or a part of one. dtype: of the data; "fisher float32" is that of F, the rest is
    fp32."""

    op: str
    shape: Shape
    dtype: str
    part: str = WHOLE

    def size(self, name: str) -> int:
        """A number of the shape."""
        return int(self.shape[name])

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype.removeprefix("fisher "))
        return dtype

    @property
    def which(self) -> str:
        """The passes of a LoRA linear: both, or the one that the shape names."""
        return str(self.shape.get("pass", BOTH))

    @property
    def precision(self) -> str | None:
        """torch.get_float32_matmul_precision() of the case; None leaves it as it is."""
        precision = self.shape.get("precision")
        return None if precision is None else str(precision)

    @property
    def work(self) -> Work:
        return COSTS[self.op](self)

    def __str__(self) -> str:
        return f"{self.op}  {', '.join(f'{k} {v}' for k, v in self.shape.items())}  {self.dtype}"


def model_of(workload: Workload) -> Model | TextModel:
    """The model at the beginning of the label of a shape: "ViT-B k,v", "ViT-B/16"."""
    return MODELS[str(workload.shape["model"]).split()[0].split("/")[0]]


def matrices(workload: Workload) -> list[tuple[int, int]]:
    """(d_out, d_in) of every matrix of a penalty or a merge."""
    if workload.shape.get("linears") == ALL_LINEARS:
        block = [(d_out, d_in) for d_in, d_out in model_of(workload).linears().values()]
        return block * (workload.size("adapters") // len(block))
    return [(workload.size("d_out"), workload.size("d_in"))] * workload.size("adapters")


def _linear(workload: Workload, adapters: int, width: int) -> Work:
    """Forward x W^T and z B^T with z = x A^T; backward dy W, and u = dy B with its products u A, dy^T z and
    u^T x. dy and x are read again in the backward pass, z and u stay in cache."""
    rows, d_in, d_out, rank = (workload.size(name) for name in ("rows", "d_in", "d_out", "rank"))
    base = 2.0 * rows * d_in * d_out
    low_rank = 2.0 * rows * rank * adapters * (d_in + width)
    factors = rank * adapters * (d_in + width)
    forward = base + low_rank, rows * (d_in + d_out) + d_in * d_out + d_out + factors
    backward = base + 2 * low_rank, rows * (2 * d_in + d_out) + d_in * d_out + 2 * factors
    each = {"forward": forward, "backward": backward}
    parts = [each[name] for name in workload.which.split("+")]
    moved = sum(elements for _, elements in parts)
    return Work(sum(flops for flops, _ in parts), workload.torch_dtype.itemsize * float(moved))


def _penalty(workload: Workload) -> Work:
    """delta = B A, (F delta) A^T and B^T (F delta), each 2 r FLOPs per element of F; F is read once."""
    rank, sizes = workload.size("rank"), matrices(workload)
    elements = sum(d_out * d_in for d_out, d_in in sizes)
    factors = rank * sum(d_out + d_in for d_out, d_in in sizes)
    return Work(6.0 * rank * elements, float(workload.torch_dtype.itemsize * elements + 4 * 2 * factors))


def _l1(workload: Workload) -> Work:
    """The products of the penalty, with nothing to read but the factors."""
    rank, sizes = workload.size("rank"), matrices(workload)
    elements = sum(d_out * d_in for d_out, d_in in sizes)
    return Work(6.0 * rank * elements, 4.0 * 2 * rank * sum(d_out + d_in for d_out, d_in in sizes))


def _structured(workload: Workload) -> Work:
    """In 8 bits as dense. Otherwise G B and A C, of which those of diagonals are no products, and four
    products of r x r matrices with them; both factors are read once."""
    kind, rank = str(workload.shape["fisher"]), workload.size("rank")
    flops = moved = 0.0
    for d_out, d_in in matrices(workload):
        moved += 4 * 2 * rank * (d_out + d_in)
        if kind == EIGHT_BIT:
            flops += 6.0 * rank * d_out * d_in
            moved += d_out * row_bytes(d_in)
            continue
        flops += 4.0 * rank**2 * (d_out + d_in)
        power = 2 if kind == KRONECKER else 1
        moved += 4 * (d_out**power + d_in**power)
        flops += 2.0 * rank * (d_out**2 + d_in**2) if kind == KRONECKER else 0.0
    return Work(flops, moved)


def _sums(workload: Workload) -> Work:
    """As the dense Fisher, whose row and column sums are all that is read and written; of one token two
    products with a vector, of dy^2 and of x^2."""
    n, t, d_in, d_out = (workload.size(name) for name in ("samples", "tokens", "d_in", "d_out"))
    moved = workload.torch_dtype.itemsize * n * t * (d_in + d_out) + 8 * (d_in + d_out)
    return Work(2.0 * n * (t * d_in * d_out if t > 1 else d_in + d_out), float(moved))


def _fisher(workload: Workload) -> Work:
    """One product dy_n^T x_n per sample; F, fp32, is read and written."""
    n, t, d_in, d_out = (workload.size(name) for name in ("samples", "tokens", "d_in", "d_out"))
    moved = workload.torch_dtype.itemsize * n * t * (d_in + d_out) + 8 * d_in * d_out
    return Work(2.0 * n * t * d_in * d_out, float(moved))


def _merge(workload: Workload) -> Work:
    """W + s B A: W is read and written."""
    elements = sum(d_out * d_in for d_out, d_in in matrices(workload))
    return Work(2.0 * workload.size("rank") * elements, 2.0 * workload.torch_dtype.itemsize * elements)


def _threshold(workload: Workload) -> Work:
    """Elementwise: counted as three FLOPs per element, since there are no products."""
    elements = workload.size("vectors") * workload.size("length")
    return Work(3.0 * elements, 8.0 * elements)


def _blocks(workload: Workload) -> tuple[float, float, float]:
    """Parameters of a block's linears, FLOPs of the linears of all blocks and of their attention, forward."""
    model = model_of(workload)
    parameters = float(sum(d_in * d_out for d_in, d_out in model.linears().values()))
    n, t, blocks = workload.size("samples"), workload.size("tokens"), workload.size("blocks")
    width = model.width if isinstance(model, Model) else model.layers["q"][1]
    return parameters, 2.0 * n * t * blocks * parameters, 4.0 * n * t * t * blocks * width


def _step(workload: Workload) -> Work:
    """Linears forward, and backward to their inputs; attention forward, and 2.5 times that backward. Every
    frozen weight is read in both passes. Adapters and the penalty are the overhead to be judged: not
    counted."""
    parameters, products, attention = _blocks(workload)
    moved = 2.0 * workload.torch_dtype.itemsize * parameters * workload.size("blocks")
    return Work(2 * products + 3.5 * attention, moved)


def _pass(workload: Workload) -> Work:
    """A training step without adapters per batch, and dy_n^T x_n of the two matrices whose Fisher is
    estimated, which is read and written."""
    _, products, attention = _blocks(workload)
    n, t, blocks = workload.size("samples"), workload.size("tokens"), workload.size("blocks")
    matrix = 2.0 * workload.size("width") ** 2
    each = 2 * products + 3.5 * attention + 2.0 * n * t * blocks * matrix
    step = _step(workload).bytes + 8.0 * blocks * matrix
    return Work(workload.size("batches") * each, workload.size("batches") * step)


COSTS: dict[str, Callable[[Workload], Work]] = {
    "lora_linear": lambda workload: _linear(workload, 1, workload.size("d_out")),
    "lora_linear_slices": lambda workload: _linear(workload, 2, workload.size("d_out") // 3),
    "ewc_penalty": _penalty,
    "structured_penalty": _structured,
    "l1_penalty": _l1,
    "fisher_accumulate": _fisher,
    "fisher_sums": _sums,
    "merge": _merge,
    "soft_threshold": _threshold,
    "training_step": _step,
    "adapted_model": _step,
    "fisher_pass": _pass,
}
