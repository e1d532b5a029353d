"""EWC penalty on Triton: one launch over a table of all adapters, prepared once and kept while pointers stay.

Host work of a step does not grow with a launch per layer: it looks the table up, allocates the loss, the flat
gradients and a workspace, and launches.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_ewclora.kernels import ewc_penalty as kernels

from ...errors import BackendError
from . import tables
from .launch import arch, cdiv, launch, multiprocessors, precision

ITEMS_PER_MULTIPROCESSOR = 4  # programs, so that the last wave is short
KEPT = 16  # prepared tables; a training loop needs one

_FIELDS = {
    name: getattr(kernels, name).value
    for name in (
        "FISHER LORA_A LORA_B SCALE D_OUT D_IN RANK ROWS FISHER_0 FISHER_1 A_0 A_1 B_0 B_1 SCALE_0 GRAD_A GRAD_B "
        "GRAD_S PART_A PART_B PART_S REGIONS BLOCKS FIRST_ITEM COUNT_A COUNT_B COUNT_S SCALAR"
    ).split()
}


@dataclass(frozen=True)
class Group:
    """Adapters whose tensors have the same dtypes: one launch."""

    table: Tensor
    factors: Tensor
    items: Tensor
    workspace: int  # floats
    counters: int
    rp: int
    options: dict[str, Any]  # constexpr arguments and the configuration of the launch


@dataclass(frozen=True)
class Plan:
    """Everything about a call that does not depend on values."""

    groups: tuple[Group, ...]
    length: int  # of the flat gradients
    holes: bool  # an F without elements


_plans: OrderedDict[Any, Plan] = OrderedDict()


def ewc_penalty(
    fishers: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    factors: Sequence[float],
    ewc_lambda: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Loss (0-d) and flat gradients, fp32; see `ops._library`."""
    plan = _plan(fishers, lora_as, lora_bs, scales, factors, needs)
    like = lora_as[0]
    # Adapters without elements have no item that would write their gradients, or a loss.
    allocate = like.new_zeros if plan.holes else like.new_empty
    losses, grads = (allocate(size, dtype=torch.float32) for size in (len(plan.groups), plan.length))
    for i, group in enumerate(plan.groups):
        work = like.new_empty(group.workspace, dtype=torch.float32)
        launch(
            kernels.ewc_penalty_kernel, (group.items.shape[0],), group.table, group.factors, group.items, work,
            _counters(like, group.counters), losses[i], grads, group.items.shape[0], float(ewc_lambda),
            NEED_A=needs[0], NEED_B=needs[1], NEED_S=needs[2], **group.options,
        )  # fmt: skip
    return losses[0] if len(plan.groups) == 1 else losses.sum(), grads


def _described(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _plan(
    fishers: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    factors: Sequence[float],
    needs: Sequence[bool],
) -> Plan:
    """The prepared tables of this call: kept from an earlier one with the same tensors, or made."""
    tensors = tuple(map(_described, (*fishers, *lora_as, *lora_bs, *scales)))
    like = lora_as[0]
    key = (tensors, tuple(factors), tuple(needs), arch(like), precision(), like.device, tables.overriding())
    plan = _plans.get(key)
    if plan is None:
        if like.is_cuda and torch.cuda.is_current_stream_capturing():
            raise BackendError(
                "ewc_penalty: expected a call with the same tensors before the capture of a CUDA graph; its table "
                "of pointers cannot be copied to the device during one"
            )
        plan = _prepare(fishers, lora_as, lora_bs, scales, factors, needs)
        if like.device.type != "meta":
            _plans[key] = plan
            while len(_plans) > KEPT:
                _plans.popitem(last=False)
    else:
        _plans.move_to_end(key)
    return plan


def _prepare(
    fishers: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    factors: Sequence[float],
    needs: Sequence[bool],
) -> Plan:
    places, length = [], 0
    for triple in zip(lora_as, lora_bs, scales, strict=True):
        place = []
        for tensor, need in zip(triple, needs, strict=True):
            wanted = need and tensor is not None
            place.append(length if wanted else -1)
            length += tensor.numel() if wanted and tensor is not None else 0
        places.append(place)
    groups: dict[Any, list[int]] = {}
    for i, (fisher, a, b, s) in enumerate(zip(fishers, lora_as, lora_bs, scales, strict=True)):
        types = (fisher.dtype, a.dtype, b.dtype, None if s is None else s.dtype)
        groups.setdefault(types, []).append(i)
    made = []
    for (fisher_type, a_type, b_type, scale_type), members in groups.items():
        chosen = [(fishers[i], lora_as[i], lora_bs[i], scales[i], factors[i], places[i]) for i in members]
        types = {
            "FISHER_TYPE": fisher_type,
            "A_TYPE": a_type,
            "B_TYPE": b_type,
            "SCALE_TYPE": scale_type or torch.float32,
        }
        made.append(_group(chosen, {name: _triton_type(dtype) for name, dtype in types.items()}, fisher_type))
    return Plan(tuple(made), length, any(fisher.numel() == 0 for fisher in fishers))


def _triton_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def _group(members: Sequence[tuple[Any, ...]], types: dict[str, Any], fisher_type: torch.dtype) -> Group:
    like = members[0][1]
    rp = max(16, 1 << (max(a.shape[0] for _, a, *_ in members) - 1).bit_length())
    config = tables.lookup(f"ewc_penalty_kernel:{precision()}", arch(like), fisher_type, rp)
    m, n = config["BLOCK_M"], config["BLOCK_N"]
    elements = sum(fisher.numel() for fisher, *_ in members)
    rows = cdiv(elements, n * ITEMS_PER_MULTIPROCESSOR * multiprocessors(like))
    table = np.zeros((len(members), kernels.FIELDS.value), np.int64)
    items: list[tuple[int, int, int]] = []
    counters = 1  # the first is that of the loss
    shapes = []
    for index, (fisher, *_) in enumerate(members):
        d_out, d_in = fisher.shape
        regions = max(cdiv(d_out, max(rows, m)), 1)
        height = max(cdiv(cdiv(d_out, regions), m), 1) * m
        regions, blocks = cdiv(d_out, height), cdiv(d_in, n)
        shapes.append((regions, blocks, height, len(items)))
        items += [(index, region, block) for region in range(regions) for block in range(blocks)]
    floats = len(items)  # a partial loss per item, then the partial gradients
    for entry, member, (regions, blocks, height, first) in zip(table, members, shapes, strict=True):
        (d_out, d_in), rank = member[0].shape, member[1].shape[0]
        parts = {
            "PART_A": regions * rank * d_in,
            "PART_B": blocks * d_out * rank,
            "PART_S": regions * blocks * rp,
        }
        counts = {"COUNT_A": blocks, "COUNT_B": regions, "COUNT_S": 1}
        fields = {"ROWS": height, "REGIONS": regions, "BLOCKS": blocks, "FIRST_ITEM": first}
        for name, size in parts.items():
            fields[name], floats = floats, floats + size
        for name, size in counts.items():
            fields[name], counters = counters, counters + size
        for name, value in {**_addresses(*member), **fields}.items():
            entry[_FIELDS[name]] = value
    to = functools.partial(torch.Tensor.to, device=like.device)
    values = torch.tensor([float(member[4]) for member in members], dtype=torch.float32)
    options = {**config, **types, "RP": rp, "PRECISION": precision(), "UNIT": all(_unit(f) for f, *_ in members)}
    return Group(
        to(torch.from_numpy(table)), to(values), to(torch.tensor(items, dtype=torch.int32).reshape(-1, 3)), floats, counters, rp,
        options,
    )  # fmt: skip


def _addresses(
    fisher: Tensor, a: Tensor, b: Tensor, s: Tensor | None, factor: float, place: Sequence[int]
) -> dict[str, int]:
    """Pointers, sizes, strides and the places of the gradients of one adapter."""
    return {
        "FISHER": fisher.data_ptr(), "LORA_A": a.data_ptr(), "LORA_B": b.data_ptr(),
        "SCALE": 0 if s is None else s.data_ptr(),
        "D_OUT": fisher.shape[0], "D_IN": fisher.shape[1], "RANK": a.shape[0],
        "FISHER_0": fisher.stride(0), "FISHER_1": fisher.stride(1), "A_0": a.stride(0), "A_1": a.stride(1),
        "B_0": b.stride(0), "B_1": b.stride(1), "SCALE_0": 0 if s is None or s.dim() == 0 else s.stride(0),
        "GRAD_A": place[0], "GRAD_B": place[1], "GRAD_S": place[2], "SCALAR": int(s is not None and s.dim() == 0),
    }  # fmt: skip


def _unit(fisher: Tensor) -> bool:
    """Whether rows are contiguous and 16-byte loads of them are aligned and never cross the end."""
    aligned = fisher.data_ptr() % 16 == 0 and fisher.stride(0) % 8 == 0 == fisher.shape[1] % 8
    return fisher.stride(1) == 1 and aligned


@functools.cache
def _zeros(device: torch.device, stream: int, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)


def _counters(like: Tensor, size: int) -> Tensor:
    """Counters at zero. Launches leave them so; two that could run at the same time never share them."""
    if not like.is_cuda or torch.cuda.is_current_stream_capturing():
        return like.new_zeros(size, dtype=torch.int32)  # a graph's own, set to zero by every replay
    stream = torch.cuda.current_stream(like.device).cuda_stream
    return _zeros(like.device, stream, 1 << max(size - 1, 0).bit_length())
