"""The Fisher of a task over several processes, each of which has seen its share of the data."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ._fisher_pass import TaskFisher
from .errors import FisherError


@torch.no_grad()
def reduced(task: TaskFisher, group: dist.ProcessGroup | None = None) -> TaskFisher:
    """The sum of the gatherings of all processes of `group`, in new buffers: one all-reduce of everything,
    flat.

    Every process must have gathered the same adapters in the same mode. The sum over samples does not depend
    on how they were dealt out; mode "batch" is the average over the batches that the processes saw.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise FisherError("reduce_fisher_: expected torch.distributed.init_process_group to have been called")
    values = list(task.buffers.values())
    if len({(value.device, value.dtype) for value in values}) > 1:
        raise FisherError("reduce_fisher_: expected all adapters of a process on one device and in one dtype")
    flat = torch.cat([value.flatten() for value in values])
    counts = torch.tensor([task.samples, len(flat)], dtype=torch.int64, device=flat.device)
    largest = torch.tensor([task.batch_size, len(flat)], dtype=torch.int64, device=flat.device)
    dist.all_reduce(counts, group=group)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    samples, total = counts.tolist()
    batch_size, longest = largest.tolist()
    if total != longest * dist.get_world_size(group):
        raise FisherError(
            "reduce_fisher_: the processes have adapters of different shapes; nothing was changed"
        )
    dist.all_reduce(flat, group=group)
    return TaskFisher(_unflatten(flat, task.buffers), samples, batch_size, task.labels)


def _unflatten(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = flat.split([value.numel() for value in like.values()])
    return {key: part.view_as(value) for (key, value), part in zip(like.items(), parts, strict=True)}
