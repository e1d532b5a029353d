# SPDX-License-Identifier: Apache-2.0
"""The Fisher of a task as a sum over processes, each of which has passed over its share of the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import FisherError
from .processes import check_same


class PartialFisher(Protocol):
    """A dataclass with the sums over the data of one process."""

    buffers: dict[str, Tensor]
    samples: int
    batch_size: int


Task = TypeVar("Task", bound=PartialFisher)


@torch.no_grad()
def reduced(task: Task, described: Mapping[str, Any], group: dist.ProcessGroup | None = None) -> Task:
    """The Fisher of a task summed over all processes, with one all-reduce of all Fishers, flattened.

    The sum over samples does not depend on which process has seen which; mode "batch" is the average over the
    batches that the processes have seen. Every process of the group must call this.

    Args:
        task: a dataclass with the sums of this process: buffers, tensors by name on one device and in one
            dtype; samples, their number; and batch_size. It is left as it is.
        described: what must be the same in every process, by name.
        group: the processes; None is all of torch.distributed.

    Returns:
        A copy of `task` with new buffers and the number of samples summed over the processes, and the largest
        of their batch sizes.

    Raises:
        FisherError: without an initialised process group, and for buffers on several devices or in several
            dtypes.
        TargetError: in every process, when `described` differs; the message names the entry.

    Examples:
        >>> from fused_ewclora.distributed import reduced
        >>> from fused_ewclora.ewc.state import TaskFisher
        >>> task = TaskFisher({"fc": torch.ones(6, 8)}, samples=4, batch_size=4, labels=("empirical",))
        >>> if torch.distributed.is_initialized():
        ...     task = reduced(task, {"fisher_mode": "sample"})
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise FisherError("reduce_fisher_: expected torch.distributed.init_process_group to have been called")
    values = list(task.buffers.values())
    if len({(value.device, value.dtype) for value in values}) > 1:
        raise FisherError("reduce_fisher_: expected all adapters of a process on one device and in one dtype")
    flat = torch.cat([value.flatten() for value in values])
    check_same(described, group)
    samples = torch.tensor([task.samples], dtype=torch.int64, device=flat.device)
    batch_size = torch.tensor([task.batch_size], dtype=torch.int64, device=flat.device)
    dist.all_reduce(samples, group=group)
    dist.all_reduce(batch_size, op=dist.ReduceOp.MAX, group=group)
    dist.all_reduce(flat, group=group)
    buffers = _unflatten(flat, task.buffers)
    return dataclasses.replace(  # type: ignore[type-var]
        task, buffers=buffers, samples=int(samples.item()), batch_size=int(batch_size.item())
    )


def _unflatten(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = flat.split([value.numel() for value in like.values()])
    return {key: part.view_as(value) for (key, value), part in zip(like.items(), parts, strict=True)}
