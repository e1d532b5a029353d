# SPDX-License-Identifier: Apache-2.0
"""Whole tensors from row shards, in one differentiable collective for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class RowShards:
    """How tensors of `rows` rows are sharded over the processes of `group`: each holds `chunk` rows, the last
    ones fewer or none, as with `torch.chunk` and `DTensor`."""

    rows: tuple[int, ...]
    group: dist.ProcessGroup

    def chunk(self, index: int) -> int:
        """Rows of a process that has its full share."""
        return -(-self.rows[index] // self.group.size())

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """`[sum of padded sizes]`: the shards of one process, flat, padded to full shares with zeros."""
        padded = []
        for index, part in enumerate(parts):
            missing = self.chunk(index) - part.shape[0]
            if missing:
                part = torch.cat([part, part.new_zeros(missing, *part.shape[1:])])
            padded.append(part.reshape(-1))
        return torch.cat(padded)

    def sizes(self, parts: Sequence[Tensor]) -> list[int]:
        """The number of elements of each tensor in the result of `pack`."""
        return [self.chunk(i) * part.shape[1:].numel() for i, part in enumerate(parts)]


class GatherRows(torch.autograd.Function):
    """Whole tensors from the rows that each process holds; each receives its rows of the gradient, summed
    over processes."""

    @staticmethod
    def forward(ctx: Any, shards: RowShards, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.shards, ctx.rows = shards, [part.shape[0] for part in parts]
        mine = shards.pack(parts)
        all_ranks = mine.new_empty(shards.group.size() * len(mine))
        dist.all_gather_into_tensor(all_ranks, mine, group=shards.group)
        pieces = all_ranks.view(-1, len(mine)).split(shards.sizes(parts), dim=1)
        return tuple(
            piece.reshape(-1, *part.shape[1:])[:rows].clone()
            for piece, part, rows in zip(pieces, parts, shards.rows, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ScatterRows.apply(ctx.shards, tuple(ctx.rows), *grads)


class ScatterRows(torch.autograd.Function):
    """Sums over processes of whole tensors, each process receives its rows. The transpose of `GatherRows`,
    which is its own backward: derivatives of any order are such sums and gathers."""

    @staticmethod
    def forward(ctx: Any, shards: RowShards, rows: tuple[int, ...], *whole: Tensor) -> tuple[Tensor, ...]:
        ctx.shards = shards
        world = shards.group.size()
        blocks = []
        for index, tensor in enumerate(whole):
            missing = world * shards.chunk(index) - tensor.shape[0]
            padded = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor
            blocks.append(padded.reshape(world, -1))
        packed = torch.cat(blocks, dim=1)
        mine = packed.new_empty(packed.shape[1])
        dist.reduce_scatter_tensor(mine, packed.reshape(-1), group=shards.group)
        pieces = mine.split([block.shape[1] for block in blocks])
        return tuple(
            piece.reshape(-1, *tensor.shape[1:])[:count].clone()
            for piece, tensor, count in zip(pieces, whole, rows, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *GatherRows.apply(ctx.shards, *grads)


class SumOverProcesses(torch.autograd.Function):
    """The sum over processes of a term that each has computed a part of. Every process backpropagates through
    its own part only, with gradient 1."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def gathered(parts: Sequence[Tensor], rows: Sequence[int], group: dist.ProcessGroup) -> list[Tensor]:
    """The whole tensors of which each process of `group` holds consecutive rows; one collective per dtype."""
    whole: list[Tensor | None] = [None] * len(parts)
    for dtype in dict.fromkeys(part.dtype for part in parts):
        which = [i for i, part in enumerate(parts) if part.dtype == dtype]
        shards = RowShards(tuple(rows[i] for i in which), group)
        for i, tensor in zip(which, GatherRows.apply(shards, *(parts[i] for i in which)), strict=True):
            whole[i] = tensor
    return [tensor for tensor in whole if tensor is not None]
