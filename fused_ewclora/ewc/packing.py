# SPDX-License-Identifier: Apache-2.0
"""Sums of a task that wait for those of other layers, in what the structure of the Fisher packs them into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed import ProcessGroup

from ..layers.index import AdapterRef
from .placement import Placement, sums_dtype
from .state import TaskFisher, by_fisher, flat
from .structures import Extent, Parts, Structure


@dataclass(frozen=True)
class Packing:
    """Packs and unpacks the sums of a task, one Fisher at a time.

    dtype is that of kept numbers, tasks the number of those before.
    """

    placement: Placement
    structure: Structure
    dtype: torch.dtype
    tasks: int

    def _extent(self, ref: AdapterRef) -> Extent:
        return self.placement.extent(ref.piece.row_count, ref.layer.in_features)

    def _seed(self, samples: int) -> int:
        """For rounding without bias; numbers of tasks, the seeds of consolidation, are smaller."""
        return 1 << 31 | (65537 * self.tasks + samples) & (1 << 31) - 1

    def _pack(self, ref: AdapterRef, sums: Parts, samples: int) -> Parts:
        return self.structure.packed(sums, self._extent(ref), self.dtype, self._seed(samples))

    def sums(self, task: TaskFisher, parts: Parts, ref: AdapterRef) -> Parts:
        """The sums in the parts of one Fisher of the task."""
        if not task.packed:
            return parts
        return self.structure.unpacked(parts, self._extent(ref), sums_dtype(ref.layer))

    @torch.no_grad()
    def packed(self, task: TaskFisher) -> TaskFisher:
        """The task, or a part of its Fishers, packed."""
        own = by_fisher(task.buffers)
        packed = {
            ref.key: self._pack(ref, own[ref.key], task.samples)
            for ref in self.placement.refs
            if ref.key in own
        }
        return replace(task, buffers=flat(packed), packed=True)

    @torch.no_grad()
    def plus(self, task: TaskFisher, earlier: TaskFisher) -> TaskFisher:
        """The sum with an earlier pass, packed where one of them is."""
        if not task.packed and not earlier.packed:
            return task.plus(earlier)
        total = replace(
            task,
            samples=task.samples + earlier.samples,
            batch_size=max(task.batch_size, earlier.batch_size),
            labels=tuple(dict.fromkeys((*earlier.labels, *task.labels))),
            packed=True,
        )
        new, old = by_fisher(task.buffers), by_fisher(earlier.buffers)
        joined: dict[str, Parts] = {}
        for ref in self.placement.refs:
            first, second = self.sums(task, new[ref.key], ref), self.sums(earlier, old[ref.key], ref)
            sums = {part: tensor + second[part] for part, tensor in first.items()}
            joined[ref.key] = self._pack(ref, sums, total.samples)
        return replace(total, buffers=flat(joined))

    @torch.no_grad()
    def reduced(
        self, task: TaskFisher, described: Mapping[str, Any], group: ProcessGroup | None
    ) -> TaskFisher:
        """As `Placement.reduced`; of packed sums one Fisher after the other."""
        described = {**described, "packed": task.packed}
        if not task.packed:
            return self.placement.reduced(task, described, group)
        own, packed, total = by_fisher(task.buffers), {}, task
        for ref in self.placement.refs:
            sums = flat({ref.key: self.sums(task, own[ref.key], ref)})
            alone = replace(task, buffers=sums, packed=False)
            total = self.placement.reduced(alone, described, group)
            if total is alone:  # the passes have summed over processes
                return task
            described = {}  # compared once
            packed[ref.key] = self._pack(ref, by_fisher(total.buffers)[ref.key], total.samples)
        return replace(total, buffers=flat(packed), packed=True)
