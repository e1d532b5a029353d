# SPDX-License-Identifier: Apache-2.0
"""What a Fisher pass adds to, beside a dense Fisher: sums from which a structured one is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from . import schemas
from .dispatch import current_backend
from .windows import Windows


@dataclass(slots=True)
class Term:
    """x `[N, T, d_in]` and dy of all calls in one forward pass for some rows of a Fisher, `row` the first of
    them; with `offsets` `[rows, d]`, of sample n the rows from offsets[n] to offsets[n + 1]."""

    x: Tensor | Windows
    dy: Tensor
    offsets: Tensor | None
    row: int = 0

    @property
    def rows(self) -> slice:
        """The rows of the Fisher that dy has the columns of."""
        return slice(self.row, self.row + self.dy.shape[-1])


class Sums(Protocol):
    """Sums over the samples of a task, of one adapter."""

    def add(self, term: Term, mode: str, weight: float) -> None:
        """Adds weight times what the squared gradients of the samples (mode "sample"), their squared sum
        (mode "batch") or their sum (mode "gradient") give to the sums."""


class DenseSums:
    """The squares themselves, `[rows, d_in]`."""

    __slots__ = ("fisher",)

    def __init__(self, fisher: Tensor) -> None:
        self.fisher = fisher

    def add(self, term: Term, mode: str, weight: float) -> None:
        """As `Sums.add`."""
        x, dy, fisher = term.x, term.dy, self.fisher
        rows = fisher if dy.shape[-1] == fisher.shape[0] else fisher.narrow(0, term.row, dy.shape[-1])
        if isinstance(x, Windows):
            x.accumulate_into_(rows, dy, mode, weight)
        elif x.shape[:-1].numel():
            schemas.fisher_accumulate_(rows, x, dy, mode, weight, term.offsets, current_backend())


class MarginalSums:
    """Row sums `[rows]` and column sums `[d_in]` of the squares."""

    __slots__ = ("columns", "rows")

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        self.rows, self.columns = rows, columns

    def add(self, term: Term, mode: str, weight: float) -> None:
        """As `Sums.add`."""
        x, dy, rows = term.x, term.dy, self.rows[term.rows]
        if isinstance(x, Windows):
            x.add_sums_into_(rows, self.columns, dy, mode, weight)
        elif x.shape[:-1].numel():
            schemas.fisher_sums_(rows, self.columns, x, dy, mode, weight, term.offsets, current_backend())


class CovarianceSums:
    """dy^T dy `[rows, rows]`, x^T x `[d_in, d_in]` and the number of rows of x in it `[1]`, over all tokens
    of all samples with a gradient: padding is none of them."""

    __slots__ = ("count", "inputs", "outputs")

    def __init__(self, outputs: Tensor, inputs: Tensor, count: Tensor) -> None:
        self.outputs, self.inputs, self.count = outputs, inputs, count

    def add(self, term: Term, mode: str, weight: float) -> None:
        """As `Sums.add`, mode "sample"."""
        block = self.outputs[term.rows, term.rows]
        for x, dy in _pieces(term):
            x2, dy2 = (t.reshape(-1, t.shape[-1]).to(block.dtype) for t in (x, dy))
            reached = (dy2 != 0.0).any(1, keepdim=True)
            self.count += reached.sum()
            x2 = x2 * reached
            self.inputs.addmm_(x2.T, x2)
            block.addmm_(dy2.T, dy2, alpha=weight)


class GradientSums:
    """The gradients themselves, sum of dy^T x `[rows, d_in]` over all tokens: one product per call, without a
    temporary of that size."""

    __slots__ = ("gradient",)

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def add(self, term: Term, mode: str, weight: float) -> None:
        """As `Sums.add`, mode "gradient"."""
        rows = self.gradient[term.rows]
        for x, dy in _pieces(term):
            x2, dy2 = (t.reshape(-1, t.shape[-1]).to(rows.dtype) for t in (x, dy))
            rows.addmm_(dy2.T, x2, alpha=weight)


def _pieces(term: Term) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(term.x, Windows):
        yield from term.x.pieces(term.dy)
    else:
        yield term.x, term.dy


def sums_of(fisher: Tensor | Sums) -> Sums:
    """The sums that a tensor stands for: the squares."""
    return DenseSums(fisher) if isinstance(fisher, Tensor) else fisher
