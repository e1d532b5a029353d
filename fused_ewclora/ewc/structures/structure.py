# SPDX-License-Identifier: Apache-2.0
"""The protocol of a structure of the Fisher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ...fishers import Fisher
from ...ops.sums import Sums
from ..settings import FISHER_MODES

Parts = dict[str, Tensor]
SEPARATOR = ":"  # in no name of a parameter


def part_key(key: str, part: str) -> str:
    """The name of one tensor of the Fisher `key`; a Fisher that is one tensor has the part ""."""
    return f"{key}{SEPARATOR}{part}" if part else key


def split_key(name: str) -> tuple[str, str]:
    """The Fisher and the part that `part_key` has joined."""
    key, _, part = name.partition(SEPARATOR)
    return key, part


@dataclass(frozen=True)
class Extent:
    """Which rows of a Fisher a process holds: all of them, unless FSDP2 shards the model.

    Args:
        rows: how many rows the Fisher has, d_out.
        columns: how many columns, d_in.
        first: the first row that this process holds.
        count: how many it holds.

    Examples:
        >>> fe.structures.Extent.whole(6, 8)
        Extent(rows=6, columns=8, first=0, count=6)
    """

    rows: int
    columns: int
    first: int
    count: int

    @classmethod
    def whole(cls, rows: int, columns: int) -> Extent:
        """The extent of all rows.

        Args:
            rows: d_out.
            columns: d_in.

        Returns:
            The extent.
        """
        return cls(rows, columns, 0, rows)


def _own(value: Tensor) -> Tensor:
    return value


class Weights(NamedTuple):
    """How a task joins what is kept: `old * kept + new * sums / samples`.

    Attributes:
        old: weight of what is kept, gamma.
        new: weight of the mean of the task.
        samples: of the task, by which its sums are divided.
        tasks: how many came before it.
        over_rows: sums a tensor over the processes that hold rows of the Fisher; for what a structure makes
            of parts that are `by_rows`.

    Examples:
        >>> weights = fe.structures.Weights(old=0.5, new=1.0, samples=4, tasks=1)
        >>> weights.joined(torch.tensor([2.0]), torch.tensor([8.0]))
        tensor([3.])
    """

    old: float
    new: float
    samples: int
    tasks: int
    over_rows: Callable[[Tensor], Tensor] = _own

    def joined(self, kept: Tensor | None, sums: Tensor) -> Tensor:
        """`old * kept + new * sums / samples` in the dtype of sums; an old weight of 0 leaves out what is
        kept, NaN and Inf too.

        Args:
            kept: a part of what is kept, or None before the first task.
            sums: those of the task.

        Returns:
            A new tensor.
        """
        fresh = sums / self.samples
        if self.new != 1.0:
            fresh.mul_(self.new)
        if kept is not None and self.old != 0.0:
            fresh.add_(kept.to(fresh.dtype), alpha=self.old)
        return fresh


class Gathered(Protocol):
    """What a Fisher pass gathers of each adapter."""

    quantity: ClassVar[str]  # what it is, in messages
    by_rows: ClassVar[frozenset[str]]  # parts whose first dimension is that of lora_B

    def sum_shapes(self, extent: Extent) -> dict[str, tuple[int, ...]]:
        """The shapes of the sums of a task, by part."""

    def sums(self, parts: Mapping[str, Tensor]) -> Sums:
        """What the pass adds to, in the tensors of `parts`."""


class Structure(ABC):
    """How the Fisher of one adapter is gathered over a task, kept over tasks and penalised.

    A Fisher is a few tensors by name, its parts: while a task is gathered, sums over samples; afterwards what
    is kept. Every method is about one adapter and has no state of its own. Subclasses can be given to `EWC`
    as `fisher`; what they are written with is in `fused_ewclora.structures`.

    Attributes:
        name: of the structure, which saved states have, too.
        quantity: what is gathered, in messages.
        modes: values of `fisher_mode` of `EWC` that have a meaning.
        by_rows: parts whose first dimension is that of lora_B.
        dtypes: that can be kept, beside fp64 layers fp64.
        codes: parts of uint8, whose bytes are not numbers.

    Examples:
        >>> _ = fe.inject(model, config)
        >>> ewc = fe.EWC(model, ewc_lambda=100.0, fisher=fe.structures.Factored())
        >>> ewc.structure.name
        'factored'
    """

    name: ClassVar[str]
    quantity: ClassVar[str] = "Fisher"
    modes: ClassVar[tuple[str, ...]] = FISHER_MODES
    by_rows: ClassVar[frozenset[str]]
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)
    codes: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def sum_shapes(self, extent: Extent) -> dict[str, tuple[int, ...]]:
        """The shapes of the sums of a task, by part."""

    @abstractmethod
    def kept_shapes(self, extent: Extent) -> dict[str, tuple[int, ...]]:
        """The shapes of what is kept, by part."""

    @abstractmethod
    def sums(self, parts: Mapping[str, Tensor]) -> Sums:
        """What a Fisher pass adds to, in the tensors of `parts`."""

    @abstractmethod
    def joined(
        self,
        old: Mapping[str, Tensor] | None,
        task: Mapping[str, Tensor],
        weights: Weights,
        extent: Extent,
    ) -> tuple[Parts, float]:
        """weights.old times what is kept plus weights.new times the mean of a task, in new tensors, and the
        relative error in the Frobenius norm of joining the two. An old weight of 0 leaves out what is kept,
        NaN and Inf too."""

    @abstractmethod
    def value(self, parts: Mapping[str, Tensor], columns: int) -> Fisher:
        """What is kept as an operand of `functional.ewc_penalty`."""

    @abstractmethod
    def of_dense(self, fisher: Tensor, extent: Extent) -> Parts:
        """What is kept of a dense Fisher that is whole."""

    def packed_shapes(self, extent: Extent) -> dict[str, tuple[int, ...]]:
        """The shapes of packed sums, by part; those of `codes` are uint8."""
        return self.sum_shapes(extent)

    def packed(self, sums: Mapping[str, Tensor], extent: Extent, dtype: torch.dtype, seed: int) -> Parts:
        """The sums of a task in what takes less memory while other layers are gathered, where the structure
        keeps less (numbers in `dtype`); otherwise as they are. Rounding without bias depends on the seed."""
        return dict(sums)

    def unpacked(self, parts: Mapping[str, Tensor], extent: Extent, dtype: torch.dtype) -> Parts:
        """The sums that were packed, in `dtype`, to its rounding."""
        return {part: tensor.to(dtype) for part, tensor in parts.items()}

    def numbers(self, parts: Mapping[str, Tensor], extent: Extent) -> Parts:
        """Those values of the kept parts of which none is negative."""
        return dict(parts)


def zeros(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> Parts:
    """Tensors of these shapes."""
    return {part: torch.zeros(shape, dtype=dtype, device=device) for part, shape in shapes.items()}
