# SPDX-License-Identifier: Apache-2.0
"""How ops read the flat lists in which the adapters of a call arrive."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

from torch import Tensor

_Value = TypeVar("_Value")


def as_rows(tensor: Tensor) -> Tensor:
    """`[..., d]` as `[rows, d]`; d may be 0, where -1 would not tell the number of rows."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def row_ranges(rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(adapter, start, stop) of every range in `rows`: the next `stop - start` rows of the adapter's B belong
    to the output rows from `start` to `stop`."""
    return zip(rows[0::3], rows[1::3], rows[2::3], strict=True)


def ranges_of(rows: Sequence[int], adapter: int) -> list[tuple[int, int]]:
    """The row ranges of one adapter, in order."""
    return [(start, stop) for index, start, stop in row_ranges(rows) if index == adapter]


def by_kind(values: Sequence[_Value]) -> tuple[list[_Value], list[_Value], list[_Value]]:
    """What belongs to every A, every B and every s, of a list in that order."""
    count = len(values) // 3
    return list(values[:count]), list(values[count : 2 * count]), list(values[2 * count :])
