# SPDX-License-Identifier: Apache-2.0
"""Row sums and column sums: d_out + d_in numbers in place of d_out * d_in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...fishers import FactoredFisher, Fisher
from ...ops.sums import MarginalSums
from .structure import Extent, Parts, Structure, Weights


class Factored(Structure):
    """F = r c^T / sum(c) with the row sums r and the column sums c of the dense F, which are exact: they add
    over samples, batches, tasks and processes (`fishers.FactoredFisher`).

    Examples:
        >>> fe.structures.Factored().kept_shapes(fe.structures.Extent.whole(6, 8))
        {'rows': (6,), 'columns': (8,)}
    """

    name = "factored"
    by_rows = frozenset({"rows"})

    def sum_shapes(self, extent: Extent) -> dict[str, tuple[int, ...]]:
        """The sums; column sums are those of all rows, of every process."""
        return {"rows": (extent.count,), "columns": (extent.columns,)}

    kept_shapes = sum_shapes

    def sums(self, parts: Mapping[str, Tensor]) -> MarginalSums:
        """Both."""
        return MarginalSums(parts["rows"], parts["columns"])

    def joined(
        self,
        old: Mapping[str, Tensor] | None,
        task: Mapping[str, Tensor],
        weights: Weights,
        extent: Extent,
    ) -> tuple[Parts, float]:
        """The sums of the joint F, exactly."""
        return {
            part: weights.joined(None if old is None else old[part], sums) for part, sums in task.items()
        }, 0.0

    def value(self, parts: Mapping[str, Tensor], columns: int) -> Fisher:
        """The sums."""
        return FactoredFisher(parts["rows"], parts["columns"])

    def of_dense(self, fisher: Tensor, extent: Extent) -> Parts:
        """Its sums."""
        return {"rows": fisher.sum(1), "columns": fisher.sum(0)}


class Uniform(Factored):
    """F is its own mean everywhere: one number per adapter, which tells what the diagonal is worth. It is
    kept as a factored one, whose row sums are equal, and whose column sums are.

    Examples:
        >>> structure, extent = fe.structures.Uniform(), fe.structures.Extent.whole(2, 2)
        >>> structure.of_dense(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), extent)
        {'rows': tensor([8., 8.]), 'columns': tensor([8., 8.])}
    """

    name = "uniform"

    def joined(
        self,
        old: Mapping[str, Tensor] | None,
        task: Mapping[str, Tensor],
        weights: Weights,
        extent: Extent,
    ) -> tuple[Parts, float]:
        """The mean of the joint F, exactly."""
        return super().joined(old, levelled(task, extent), weights, extent)

    def of_dense(self, fisher: Tensor, extent: Extent) -> Parts:
        """Its mean."""
        return levelled(super().of_dense(fisher, extent), extent)


def levelled(sums: Mapping[str, Tensor], extent: Extent) -> Parts:
    """Row and column sums of the mean that a Fisher with these sums has."""
    total = sums["columns"].sum()
    sizes = {"rows": max(extent.rows, 1), "columns": max(extent.columns, 1)}
    return {part: torch.ones_like(sums[part]) * (total / size) for part, size in sizes.items()}
