# SPDX-License-Identifier: Apache-2.0
"""Errors, checks and random values that several processes have in common, and models sharded over them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import EWCLoRAError, TargetError

Result = TypeVar("Result")


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this is a DTensor, which several processes hold together."""
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes a second
    return module is not None and isinstance(tensor, module.DTensor)


def sharded(layers: Mapping[str, nn.Module]) -> list[str]:
    """The names of the layers that have a sharded parameter."""
    return [name for name, layer in layers.items() if any(map(is_dtensor, layer.parameters()))]


def reshard(model: nn.Module) -> None:
    """Frees the whole parameters that FSDP2 kept after the last forward pass; changes of the shards would not
    reach them."""
    module = sys.modules.get("torch.distributed.fsdp")
    for part in model.modules() if module is not None else ():
        if isinstance(part, module.FSDPModule):  # type: ignore[union-attr]
            part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A whole copy of a sharded tensor, and any other tensor itself; every process must call this."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def held_part(tensor: Tensor, index: int) -> Tensor:
    """`tensor[index]`; empty, `[0, ...]`, where several processes share the tensor by its first dimension and
    another one holds this part. Makes no collective calls."""
    if not is_dtensor(tensor):
        return tensor[index]
    _, chunk, coordinate = _division(tensor)
    mine: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    if index // chunk == coordinate:
        return mine[index - coordinate * chunk]
    return mine.new_empty(0, *tensor.shape[2:])


@torch.no_grad()
def whole_part(tensor: Tensor, index: int) -> Tensor:
    """`tensor[index]`, from the process that holds it; every process that shares it must call this."""
    if not is_dtensor(tensor):
        return tensor[index]
    dimension, chunk, coordinate = _division(tensor)
    held = held_part(tensor, index)
    part = held.clone() if index // chunk == coordinate else held.new_empty(tensor.shape[1:])
    if dimension is not None:
        group = tensor.device_mesh.get_group(dimension)  # type: ignore[attr-defined]
        dist.broadcast(part, group=group, group_src=index // chunk)
    return part


def _division(tensor: Any) -> tuple[int | None, int, int]:
    """(dimension of the mesh over which a DTensor is divided by its first dimension, or None; entries of a
    full share; which share is this process's)."""
    divided = [i for i, place in enumerate(tensor.placements) if not place.is_replicate()]
    if not divided:
        return None, max(tensor.shape[0], 1), 0
    if len(divided) > 1 or not tensor.placements[divided[0]].is_shard(0):
        raise TargetError(f"expected a parameter sharded by its first dimension, got {tensor.placements}")
    size = tensor.device_mesh.size(divided[0])
    return divided[0], max(-(-tensor.shape[0] // size), 1), tensor.device_mesh.get_local_rank(divided[0])


@torch.no_grad()
def assign_(target: Tensor, value: Tensor) -> None:
    """target <- value; a sharded target takes its part of a whole value."""
    if is_dtensor(target) and not is_dtensor(value):
        parts = sys.modules["torch.distributed.tensor"]
        place = (target.device_mesh, target.placements)  # type: ignore[attr-defined]
        value = parts.distribute_tensor(value.to(target.device), *place, src_data_rank=None)
    target.copy_(value)


def several(group: Any = None) -> bool:
    """Whether `group`, or all of torch.distributed for None, has more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def together(work: Callable[[], Result], group: Any = None) -> Result:
    """The result of `work`, which makes no collective calls; an error of this library or an `OSError` in one
    process of `group` is raised in all."""
    result: list[Result] = []
    error: EWCLoRAError | OSError | None = None
    try:
        result.append(work())
    except (EWCLoRAError, OSError) as raised:
        error = raised
    errors: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, None if error is None else (type(error), str(error)), group=group)
    if error is not None:
        raise error
    for rank, other in enumerate(errors):
        if other is not None:
            kind, message = other
            raise kind(f"process {rank}: {message}")
    return result[0]


def check_same(described: Mapping[str, Any], group: Any = None) -> None:
    """Raises `TargetError` in every process of `group` naming the first entry that is not the same in all."""
    tables: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(tables, dict(described), group=group)
    for rank, other in enumerate(tables):
        for key in {**tables[0], **other}:
            first, here = tables[0].get(key), other.get(key)
            if first != here:
                raise TargetError(
                    f"{key}: process 0 has {first}, process {rank} has {here}; nothing was changed"
                )


@torch.no_grad()
def of_first(tensors: Sequence[Tensor], group: Any = None) -> list[Tensor]:
    """The values of these tensors in the first process of `group`, where they may have other shapes."""
    shapes: list[Any] = [[tuple(tensor.shape) for tensor in tensors]]
    dist.broadcast_object_list(shapes, group_src=0, group=group)
    values = []
    for tensor, shape in zip(tensors, shapes[0], strict=True):
        same = tuple(tensor.shape) == shape
        value = tensor.clone(memory_format=torch.contiguous_format) if same else tensor.new_empty(shape)
        dist.broadcast(value, group_src=0, group=group)
        values.append(value)
    return values


def common_generator(
    generator: torch.Generator | None, device: torch.device, group: Any = None
) -> torch.Generator:
    """A generator for the CPU that draws the same numbers in every process of `group`; the first process
    draws its seed, from `generator`."""
    place = None if generator is None else generator.device
    seed = torch.randint(2**62, (1,), generator=generator, device=place).to(device)
    dist.broadcast(seed, group_src=0, group=group)
    return torch.Generator().manual_seed(int(seed.item()))
