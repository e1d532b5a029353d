# SPDX-License-Identifier: Apache-2.0
"""Fishers that need less memory than one number per weight, as values of the operations in `functional`.

A dense Fisher is a tensor `[d_out, d_in]`. What stands for one in its place says what it approximates, and
what is exact about it (docs/mathematics.md, section 10).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .errors import ArgumentError, DtypeError
from .reference import eight_bit

__all__ = ["EightBitFisher", "FactoredFisher", "Fisher", "KroneckerFisher"]


class FactoredFisher(NamedTuple):
    """`F = rows columns^T / sum(columns)`, the rank-one matrix with the row and column sums of a Fisher
    (docs/mathematics.md, section 10).

    The sums are additive over samples, batches, tasks and processes. Of part of the rows, `columns` is that
    of all rows.

    Attributes:
        rows: the row sums `[d_out]`, fp32 (fp64 beside fp64 adapters).
        columns: the column sums `[d_in]`, likewise.

    Examples:
        >>> dense = torch.ones(2, 3)
        >>> fe.FactoredFisher(dense.sum(1), dense.sum(0)).dense()
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """

    rows: Tensor
    columns: Tensor

    def dense(self) -> Tensor:
        """The values.

        Returns:
            `[d_out, d_in]`, a new tensor; zeros where the sums are zero.
        """
        total = self.columns.sum()
        share = torch.where(total <= 0.0, torch.zeros_like(self.columns), self.columns / total)
        return self.rows.unsqueeze(1) * share


class KroneckerFisher(NamedTuple):
    """The Fisher, off-diagonal entries too, as outputs (x) inputs (K-FAC, arXiv 1503.05671): the penalty is
    `(lambda/2) trace(outputs D inputs D^T)` of `D = B diag(s) A` (docs/mathematics.md, section 10).

    Only the product of the two has a meaning.

    Attributes:
        outputs: `[d_out, d_out]`, symmetric positive semidefinite, fp32 (fp64 beside fp64 adapters).
        inputs: `[d_in, d_in]`, likewise.

    Examples:
        >>> fe.KroneckerFisher(torch.eye(2), 2 * torch.eye(3)).dense()
        tensor([[2., 2., 2.],
                [2., 2., 2.]])
    """

    outputs: Tensor
    inputs: Tensor

    def dense(self) -> Tensor:
        """The diagonal of the Fisher as a matrix.

        Returns:
            `[d_out, d_in]`, a new tensor.
        """
        return self.outputs.diagonal().unsqueeze(1) * self.inputs.diagonal()


class EightBitFisher(NamedTuple):
    """A dense Fisher in 8 bits, with a bf16 scale for every 32 values of a row: at most 1.07 bytes per value
    where d_in is a multiple of 256. Code c of a block with scale s is `s c^2` (docs/mathematics.md, section
    10).

    Attributes:
        codes: uint8 `[d_out, bytes]`, with the scales.
        columns: d_in.

    Examples:
        >>> fisher = fe.EightBitFisher.encode(torch.ones(4, 64))
        >>> fisher.dense().shape
        torch.Size([4, 64])
    """

    codes: Tensor
    columns: int

    @classmethod
    def encode(cls, fisher: Tensor, seed: int | None = None, first_row: int = 0) -> EightBitFisher:
        """The nearest levels to a Fisher; with a seed one of the two levels beside each value, whose
        expectation is the value.

        The random choice depends on the seed and the place of a value alone. Blocks with NaN or Inf become
        NaN.

        Args:
            fisher: `[d_out, d_in]`, of values >= 0.
            seed: of the random choice; None takes the nearest level.
            first_row: the place of the first row, of part of a Fisher.

        Returns:
            The Fisher in 8 bits.

        Raises:
            ArgumentError: for another shape.
            DtypeError: for integers.
        """
        if fisher.dim() != 2:
            raise ArgumentError(f"fisher: expected a matrix, got shape {list(fisher.shape)}")
        if not fisher.is_floating_point():
            raise DtypeError(f"fisher: expected a floating-point tensor, got {fisher.dtype}")
        return cls(eight_bit.encode(fisher, seed, first_row), fisher.shape[1])

    @staticmethod
    def row_bytes(columns: int) -> int:
        """Bytes of a row of codes with its scales.

        Args:
            columns: d_in.

        Returns:
            The number of bytes.

        Examples:
            >>> fe.EightBitFisher.row_bytes(1024)
            1088
        """
        return eight_bit.row_bytes(columns)

    def scales(self) -> Tensor:
        """The scales of the blocks.

        Returns:
            bf16 `[d_out, blocks]`, a new tensor; NaN of blocks that are not finite.
        """
        return eight_bit.scales(self.codes)

    def largest(self) -> float:
        """The last level of the largest block, which no value exceeds.

        Returns:
            That number; 0 without values.
        """
        scales = self.scales().float()
        return float(scales.max()) * eight_bit.LEVELS**2 if scales.numel() else 0.0

    def dense(self) -> Tensor:
        """The values.

        Returns:
            `[d_out, d_in]` fp32, a new tensor.
        """
        return eight_bit.decode(self.codes, self.columns)


Fisher = Tensor | EightBitFisher | FactoredFisher | KroneckerFisher
