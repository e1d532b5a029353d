# SPDX-License-Identifier: Apache-2.0
"""Kronecker-factored Fishers (K-FAC, arXiv 1503.05671)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...fishers import Fisher, KroneckerFisher
from ...ops.sums import CovarianceSums
from .structure import Extent, Parts, Structure, Weights


class Kronecker(Structure):
    """F, off-diagonal entries too, as G (x) C: G = sum of dy dy^T over the tokens of a sample, C = mean of
    x x^T over tokens with a gradient (`fishers.KroneckerFisher`). Tokens count as independent.

    A sum over tasks is no such product: what is kept is the nearest one in the Frobenius norm, and its
    relative error is in the record of the task. d_out^2 + d_in^2 numbers: no less than dense ones.

    Examples:
        >>> fe.structures.Kronecker().kept_shapes(fe.structures.Extent.whole(6, 8))
        {'outputs': (6, 6), 'inputs': (8, 8)}
    """

    name = "kronecker"
    modes = ("sample",)
    by_rows = frozenset({"outputs"})

    def sum_shapes(self, extent: Extent) -> dict[str, tuple[int, ...]]:
        """The factors, and the number of tokens."""
        return {**self.kept_shapes(extent), "count": (1,)}

    def kept_shapes(self, extent: Extent) -> dict[str, tuple[int, ...]]:
        """The factors."""
        return {"outputs": (extent.count, extent.rows), "inputs": (extent.columns, extent.columns)}

    def sums(self, parts: Mapping[str, Tensor]) -> CovarianceSums:
        """Both, and the number of tokens."""
        return CovarianceSums(parts["outputs"], parts["inputs"], parts["count"])

    def joined(
        self,
        old: Mapping[str, Tensor] | None,
        task: Mapping[str, Tensor],
        weights: Weights,
        extent: Extent,
    ) -> tuple[Parts, float]:
        """The nearest product to the sum of two, and its error."""
        tokens = torch.where(task["count"] > 0.0, task["count"], torch.ones_like(task["count"]))
        outputs = weights.joined(None, task["outputs"])
        new = {"outputs": outputs, "inputs": task["inputs"] / tokens}
        if old is None or weights.old == 0.0:
            return new, 0.0
        return nearest_product({**old, "outputs": old["outputs"] * weights.old}, new, weights.over_rows)

    def value(self, parts: Mapping[str, Tensor], columns: int) -> Fisher:
        """The factors."""
        return KroneckerFisher(parts["outputs"], parts["inputs"])

    def of_dense(self, fisher: Tensor, extent: Extent) -> Parts:
        """Of a diagonal, that of its row sums and of its column sums: nothing is known of the rest."""
        rows, columns = fisher.sum(1), fisher.sum(0)
        total = columns.sum()
        return {
            "outputs": rows.diag(),
            "inputs": (columns / torch.where(total > 0.0, total, torch.ones_like(total))).diag(),
        }

    def numbers(self, parts: Mapping[str, Tensor], extent: Extent) -> Parts:
        """The diagonals."""
        return {"outputs": parts["outputs"].diagonal(extent.first), "inputs": parts["inputs"].diagonal()}


def nearest_product(
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    over_rows: Callable[[Tensor], Tensor] = lambda value: value,
) -> tuple[Parts, float]:
    """G (x) C nearest to the sum of two products, and the relative error, both in the Frobenius norm.

    Rearranged, a product is vec(G) vec(C)^T and the sum has rank 2; its best approximation of rank 1 (Van
    Loan and Pitsianis, 1993) is a combination of the Gs and one of the Cs, whose weights follow from inner
    products and are >= 0, as these are. over_rows sums over the processes that hold the rows of G.
    """
    of_outputs = over_rows(_inner_products(first["outputs"], second["outputs"])).cpu()
    of_inputs = _inner_products(first["inputs"], second["inputs"]).cpu()
    values, vectors = torch.linalg.eig(of_outputs @ of_inputs)
    top = int(values.real.argmax())
    largest, other = float(values.real[top]), max(float(values.real[1 - top]), 0.0)
    if not largest > 0.0:  # both are 0, or not finite
        return {part: first[part] + second[part] for part in ("outputs", "inputs")}, 0.0
    beta = of_inputs.new_tensor(vectors.real[:, top].tolist()).abs()
    beta = beta / beta.sum()  # C stays a mean
    alpha = of_inputs @ beta / (beta @ of_inputs @ beta)
    weights = {"outputs": alpha.tolist(), "inputs": beta.tolist()}
    parts = {part: first[part] * w[0] + second[part] * w[1] for part, w in weights.items()}
    return parts, math.sqrt(other / (largest + other))


def _inner_products(first: Tensor, second: Tensor) -> Tensor:
    """`[2, 2]` fp64."""
    pair = (first, second)
    return torch.stack([(a * b).sum(dtype=torch.float64) for a in pair for b in pair]).reshape(2, 2)
