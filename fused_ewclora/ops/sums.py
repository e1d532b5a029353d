# SPDX-License-Identifier: Apache-2.0
"""What a Fisher pass adds to: sums over samples from which Fishers are made."""

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
    """Inputs and gradients of all calls of a layer in one forward pass, for some rows of its Fisher.

    Args:
        x: inputs `[N, T, d_in]` or `[N, d_in]`; the windows of a convolution, which are made piece by piece.
        dy: gradients of the loss with respect to the outputs, likewise with the columns of `rows`.
        offsets: None, or of packed samples `[N + 1]`: x and dy are `[tokens, d]`, those of sample n from
            offsets[n] to offsets[n + 1].
        row: the first of the rows.

    Examples:
        >>> term = fe.structures.Term(torch.randn(4, 3, 8), torch.randn(4, 3, 2), None, row=4)
        >>> term.rows
        slice(4, 6, None)
    """

    x: Tensor | Windows
    dy: Tensor
    offsets: Tensor | None
    row: int = 0

    @property
    def rows(self) -> slice:
        """The rows of the Fisher that dy has the columns of."""
        return slice(self.row, self.row + self.dy.shape[-1])

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The inputs as tensors, also those of a convolution, of which few samples are made at a time.

        Yields:
            Pairs (x, dy), which have all tokens of their samples.
        """
        if isinstance(self.x, Windows):
            yield from self.x.pieces(self.dy)
        else:
            yield self.x, self.dy


class Sums(Protocol):
    """Sums over the samples of a task, of one adapter: what `Structure.sums` returns."""

    def add(self, term: Term, mode: str, weight: float) -> None:
        """Adds weight times what the squared gradients of the samples (mode "sample") or their squared sum
        (mode "batch") give to the sums. It is called in the backward pass, once for every forward pass.

        Args:
            term: inputs and gradients.
            mode: the `fisher_mode` of `EWC`.
            weight: of this term.
        """


class DenseSums(Sums):
    """The squares themselves.

    Args:
        fisher: `[rows, d_in]`, which they are added to.

    Examples:
        >>> sums = fe.structures.DenseSums(torch.zeros(2, 8))
        >>> sums.add(fe.structures.Term(torch.ones(4, 3, 8), torch.ones(4, 3, 2), None), "sample", 1.0)
        >>> sums.fisher[0, 0]  # of 4 samples, whose gradients are sums over 3 tokens
        tensor(36.)
    """

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


class MarginalSums(Sums):
    """Row sums and column sums of the squares, without forming these.

    Args:
        rows: `[rows]`, which row sums are added to.
        columns: `[d_in]`, which column sums are added to.

    Examples:
        >>> sums = fe.structures.MarginalSums(torch.zeros(2), torch.zeros(8))
        >>> sums.add(fe.structures.Term(torch.ones(4, 3, 8), torch.ones(4, 3, 2), None), "sample", 1.0)
        >>> sums.rows  # 8 times 36
        tensor([288., 288.])
    """

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


class CovarianceSums(Sums):
    """dy^T dy, x^T x and their number of tokens, over all tokens of all samples with a gradient: padding is
    none of them. Mode "sample" alone.

    Args:
        outputs: `[rows, rows]`, which dy^T dy is added to.
        inputs: `[d_in, d_in]`, which x^T x is added to.
        count: `[1]`, which the number of tokens is added to.

    Examples:
        >>> sums = fe.structures.CovarianceSums(torch.zeros(2, 2), torch.zeros(8, 8), torch.zeros(1))
        >>> sums.add(fe.structures.Term(torch.ones(4, 3, 8), torch.ones(4, 3, 2), None), "sample", 1.0)
        >>> sums.count
        tensor([12.])
    """

    __slots__ = ("count", "inputs", "outputs")

    def __init__(self, outputs: Tensor, inputs: Tensor, count: Tensor) -> None:
        self.outputs, self.inputs, self.count = outputs, inputs, count

    def add(self, term: Term, mode: str, weight: float) -> None:
        """As `Sums.add`, mode "sample"."""
        block = self.outputs[term.rows, term.rows]
        for x, dy in term.pieces():
            x2, dy2 = (t.reshape(-1, t.shape[-1]).to(block.dtype) for t in (x, dy))
            reached = (dy2 != 0.0).any(1, keepdim=True)
            self.count += reached.sum()
            x2 = x2 * reached
            self.inputs.addmm_(x2.T, x2)
            block.addmm_(dy2.T, dy2, alpha=weight)


class GradientSums(Sums):
    """The gradients themselves, sum of dy^T x `[rows, d_in]` over all tokens: one product per call, without a
    temporary of that size."""

    __slots__ = ("gradient",)

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def add(self, term: Term, mode: str, weight: float) -> None:
        """As `Sums.add`, mode "gradient"."""
        rows = self.gradient[term.rows]
        for x, dy in term.pieces():
            x2, dy2 = (t.reshape(-1, t.shape[-1]).to(rows.dtype) for t in (x, dy))
            rows.addmm_(dy2.T, x2, alpha=weight)


def sums_of(fisher: Tensor | Sums) -> Sums:
    """The sums that a tensor stands for: the squares."""
    return DenseSums(fisher) if isinstance(fisher, Tensor) else fisher
