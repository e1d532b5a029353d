# SPDX-License-Identifier: Apache-2.0
"""One number per weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ...fishers import EightBitFisher, Fisher
from ...ops.sums import DenseSums
from .structure import Extent, Parts, Structure, Weights

CHUNK = 1 << 22  # values that are fp32 at once while codes are made


class Dense(Structure):
    """The squared gradients themselves, `[rows, d_in]` in fp32 or bf16.

    Examples:
        >>> _ = fe.inject(model, config)
        >>> fe.EWC(model, ewc_lambda=100.0, fisher=fe.structures.Dense()).structure.name
        'dense'
    """

    name = "dense"
    by_rows = frozenset({""})
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16)

    def sum_shapes(self, extent: Extent) -> dict[str, tuple[int, ...]]:
        """The squares."""
        return {"": (extent.count, extent.columns)}

    kept_shapes = sum_shapes

    def sums(self, parts: Mapping[str, Tensor]) -> DenseSums:
        """The squares."""
        return DenseSums(parts[""])

    def joined(
        self,
        old: Mapping[str, Tensor] | None,
        task: Mapping[str, Tensor],
        weights: Weights,
        extent: Extent,
    ) -> tuple[Parts, float]:
        """Exact."""
        return {"": weights.joined(None if old is None else old[""], task[""])}, 0.0

    def value(self, parts: Mapping[str, Tensor], columns: int) -> Fisher:
        """F."""
        return parts[""]

    def of_dense(self, fisher: Tensor, extent: Extent) -> Parts:
        """F."""
        return {"": fisher}

    def packed(self, sums: Mapping[str, Tensor], extent: Extent, dtype: torch.dtype, seed: int) -> Parts:
        """In bf16 where F is kept in it."""
        return {"": sums[""].to(dtype) if dtype.itemsize < sums[""].dtype.itemsize else sums[""]}


class EightBit(Dense):
    """The same in 8 bits with a scale for every 32 of a row (`fishers.EightBitFisher`). Sums of a task are
    fp32; what is kept is added up in fp32 and rounded without bias, so that errors of tasks do not add up.

    Examples:
        >>> fe.structures.EightBit().kept_shapes(fe.structures.Extent.whole(6, 256))
        {'': (6, 272)}
    """

    name = "8bit"
    dtypes = ()
    codes = frozenset({""})

    def kept_shapes(self, extent: Extent) -> dict[str, tuple[int, ...]]:
        """Rows of codes and scales."""
        return {"": (extent.count, EightBitFisher.row_bytes(extent.columns))}

    def joined(
        self,
        old: Mapping[str, Tensor] | None,
        task: Mapping[str, Tensor],
        weights: Weights,
        extent: Extent,
    ) -> tuple[Parts, float]:
        """Exact but for the rounding to 8 bits, in pieces."""
        squares, before = task[""], None if old is None or weights.old == 0.0 else old[""]
        codes = torch.empty(self.kept_shapes(extent)[""], dtype=torch.uint8, device=squares.device)
        step = max(CHUNK // max(extent.columns, 1), 1)
        for first in range(0, extent.count, step):
            rows = slice(first, first + step)
            kept = None if before is None else EightBitFisher(before[rows], extent.columns).dense()
            total = weights.joined(kept, squares[rows].float())
            codes[rows] = EightBitFisher.encode(total, weights.tasks, extent.first + first).codes
        return {"": codes}, 0.0

    def value(self, parts: Mapping[str, Tensor], columns: int) -> Fisher:
        """The codes."""
        return EightBitFisher(parts[""], columns)

    def of_dense(self, fisher: Tensor, extent: Extent) -> Parts:
        """The nearest codes."""
        return {"": EightBitFisher.encode(fisher).codes}

    def packed_shapes(self, extent: Extent) -> dict[str, tuple[int, ...]]:
        """Those of codes."""
        return self.kept_shapes(extent)

    def packed(self, sums: Mapping[str, Tensor], extent: Extent, dtype: torch.dtype, seed: int) -> Parts:
        """Codes, rounded without bias."""
        return {"": EightBitFisher.encode(sums[""], seed, extent.first).codes}

    def unpacked(self, parts: Mapping[str, Tensor], extent: Extent, dtype: torch.dtype) -> Parts:
        """The values of codes."""
        return {"": EightBitFisher(parts[""], extent.columns).dense().to(dtype)}

    def numbers(self, parts: Mapping[str, Tensor], extent: Extent) -> Parts:
        """The scales."""
        return {"": EightBitFisher(parts[""], extent.columns).scales()}
