"""What several processes must agree on, and whether a model is spread over them."""

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
    """Whether it is a part of a tensor of several processes."""
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes a second
    return module is not None and isinstance(tensor, module.DTensor)


def sharded(layers: Mapping[str, nn.Module]) -> list[str]:
    """The names of the layers of which a parameter lies in several processes."""
    return [name for name, layer in layers.items() if any(map(is_dtensor, layer.parameters()))]


def reshard(model: nn.Module) -> None:
    """Frees what FSDP2 keeps whole since the last forward pass; changes of shards would not reach it."""
    module = sys.modules.get("torch.distributed.fsdp")
    for part in model.modules() if module is not None else ():
        if isinstance(part, module.FSDPModule):  # type: ignore[union-attr]
            part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all processes, a copy; every process must call it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def assign_(target: Tensor, value: Tensor) -> None:
    """target <- value, of which a sharded target takes its part."""
    if is_dtensor(target) and not is_dtensor(value):
        parts = sys.modules["torch.distributed.tensor"]
        place = (target.device_mesh, target.placements)  # type: ignore[attr-defined]
        value = parts.distribute_tensor(value.to(target.device), *place, src_data_rank=None)
    target.copy_(value)


def several(group: Any = None) -> bool:
    """Whether more than one process works together: those of `group`, None for all of torch.distributed."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def together(work: Callable[[], Result], group: Any = None) -> Result:
    """The result of `work`, which makes no collective, unless it raises an error of this library or of files
    in some process of `group`: then in all."""
    result: list[Result] = []
    error: EWCLoRAError | OSError | None = None
    try:
        result.append(work())
    except (EWCLoRAError, OSError) as raised:
        error = raised
    said: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, None if error is None else (type(error), str(error)), group=group)
    if error is not None:
        raise error
    for rank, other in enumerate(said):
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
    """What the first process of `group` has in place of these tensors, whatever its shapes."""
    shapes: list[Any] = [[tuple(tensor.shape) for tensor in tensors]]
    dist.broadcast_object_list(shapes, group_src=0, group=group)
    found = []
    for tensor, shape in zip(tensors, shapes[0], strict=True):
        same = tuple(tensor.shape) == shape
        value = tensor.clone(memory_format=torch.contiguous_format) if same else tensor.new_empty(shape)
        dist.broadcast(value, group_src=0, group=group)
        found.append(value)
    return found


def common_generator(
    generator: torch.Generator | None, device: torch.device, group: Any = None
) -> torch.Generator:
    """A generator for the CPU that draws the same numbers in every process of `group`; the first process
    draws its seed, from `generator`."""
    place = None if generator is None else generator.device
    seed = torch.randint(2**62, (1,), generator=generator, device=place).to(device)
    dist.broadcast(seed, group_src=0, group=group)
    return torch.Generator().manual_seed(int(seed.item()))
