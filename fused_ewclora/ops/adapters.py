# SPDX-License-Identifier: Apache-2.0
"""The adapters of one call, as they travel from the public functions to the implementations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..reference.adapters import by_kind as by_kind
from ..reference.adapters import row_ranges as row_ranges

Scale = float | Tensor


class Adapter(NamedTuple):
    """One low-rank adapter of a linear layer.

    Attributes:
        lora_a: A `[r, d_in]`.
        lora_b: B `[rows, r]`.
        scale: s, a float, or a tensor 0-d or `[r]`.
        rows: the (start, stop) ranges of output rows that the rows of lora_b belong to, in order.

    Examples:
        >>> FE.Adapter(torch.ones(2, 8), torch.ones(3, 2), 1.0, rows=((0, 3),)).rows
        ((0, 3),)
    """

    lora_a: Tensor
    lora_b: Tensor
    scale: Scale
    rows: tuple[tuple[int, int], ...]


class Adapters(NamedTuple):
    """All adapters of a call, in the order of the arguments of every op that has them.

    The scale of adapter i is `scales[i] * scale_factors[i]`, `scale_factors[i]` alone where `scales[i]` is
    None.
    """

    lora_as: list[Tensor]
    lora_bs: list[Tensor]
    scales: list[Tensor | None]
    scale_factors: list[float]

    @classmethod
    def of(cls, lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], scales: Sequence[Scale]) -> Adapters:
        """The adapters of a call from scales that are tensors or numbers."""
        if {type(scale) for scale in scales} == {float}:  # the common form, of hundreds
            return cls(list(lora_as), list(lora_bs), [None] * len(scales), list(scales))  # type: ignore[arg-type]
        tensors = [scale if isinstance(scale, Tensor) else None for scale in scales]
        numbers = [1.0 if isinstance(scale, Tensor) else float(scale) for scale in scales]
        return cls(list(lora_as), list(lora_bs), tensors, numbers)

    def tensors(self) -> list[Tensor | None]:
        """Every A, every B, every s, as autograd takes them; `by_kind` takes such a list apart."""
        return [*self.lora_as, *self.lora_bs, *self.scales]
