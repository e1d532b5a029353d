# SPDX-License-Identifier: Apache-2.0
"""Penalties on Triton: one launch over a table of all adapters, prepared once and kept while pointers stay.

Host work of a step does not grow with a launch per layer: it looks the table up, allocates the loss, the flat
gradients and a workspace, and launches. Factors may change from step to step; they are written to device
memory of the stream when they do.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fused_ewclora.kernels import ewc_penalty as kernels

from ...reference import arguments
from ...reference.eight_bit import ALIGNMENT
from . import kept, tables
from .launch import addressable, arch, cdiv, launch, multiprocessors, precision, recorded
from .plans import NotPlannable

WARPS_PER_MULTIPROCESSOR = 8  # that run side by side: their registers hold dA
START = 32  # rows that take as long as the start and the end of a program
KEPT = 16  # prepared tables, and factors of each; a training loop needs one

_FIELDS = {  # column of the table by name
    name: value.value
    for name, value in vars(kernels).items()
    if name.isupper() and name != "FIELDS" and isinstance(value, tl.constexpr)
}
_TYPES = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.uint8: tl.uint8
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Adapters whose tensors have the same dtypes: one launch."""

    members: tuple[int, ...]  # which adapters of the call
    table: Tensor
    items: Tensor
    workspace: int  # floats
    counters: int
    options: dict[str, Any]  # constexpr arguments and the configuration of the launch


class Own(NamedTuple):
    """What the launches of one stream, or of one graph, with the same factors share: they run one after
    another. What it holds does not change, since plans launch with it as well."""

    counters: tuple[Tensor, ...]  # of each group; 0 before and after a launch
    factors: tuple[Tensor, ...]


@dataclass(eq=False)
class Plan:
    """Everything about a call that does not depend on values."""

    groups: tuple[Group, ...]
    length: int  # of the flat gradients
    holes: bool  # a product B A without elements
    copies: Any = None  # what pointers point to, where that is not the caller's tensors
    once: bool = False  # for one call alone
    held: bool = False  # for a graph that was captured
    streams: OrderedDict[tuple[int, tuple[float, ...]], Own] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)  # two threads may share a stream

    def tensors(self) -> Iterator[Tensor]:
        for group in self.groups:
            yield from (group.table, group.items)

    def own(self, device: torch.device, values: tuple[float, ...]) -> Own:
        """Counters and factors of the current stream. A graph has its own, which its replays write."""
        if kept.capturing(device):
            if not (self.held or self.once):
                kept.hold(self.tensors())
                self.held = True
            return self._made(device, values)
        if self.once:
            return self._made(device, values)
        place = kept.stream(device), values
        found = self.streams.get(place)
        if found is None:
            found = self.streams[place] = kept.outside(lambda: self._made(device, values), device)
            kept.used(self.tensors())
            # What it replaces was allocated on a stream that uses it again in its own order.
            while len(self.streams) > KEPT:
                self.streams.popitem(last=False)
        else:
            self.streams.move_to_end(place)
        return found

    def _made(self, device: torch.device, values: tuple[float, ...]) -> Own:
        integers = functools.partial(torch.zeros, dtype=torch.int32, device=device)
        floats = functools.partial(torch.empty, dtype=torch.float32, device=device)
        own = Own(
            tuple(integers(group.counters) for group in self.groups),
            tuple(floats(len(group.members)) for group in self.groups),
        )
        for group, factors in zip(self.groups, own.factors, strict=True):
            kept.write(factors, [float(values[i]) for i in group.members])
        return own


class _Plans:
    """The plans of recent calls by what they depend on."""

    def __init__(self) -> None:
        self._plans: OrderedDict[Any, Plan] = OrderedDict()
        self._lock = threading.Lock()
        self._latest: tuple[Any, Plan | None] = (None, None)

    def find(self, key: Any) -> Plan | None:
        latest, plan = self._latest
        if key == latest:  # as in a training loop; hashing hundreds of descriptions takes longer
            return plan
        with self._lock:
            plan = self._plans.get(key)
            if plan is not None:
                self._plans.move_to_end(key)
                self._latest = (key, plan)
        return plan

    def add(self, key: Any, plan: Plan) -> None:
        with self._lock:
            self._plans[key] = plan
            self._latest = (key, plan)
            while len(self._plans) > KEPT:
                self._plans.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._plans.clear()
            self._latest = (None, None)

    def __len__(self) -> int:
        return len(self._plans)


_plans = _Plans()
kept.cache(_plans.clear)


def ewc_penalty(
    fishers: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    scale_factors: Sequence[float],
    ewc_lambda: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Loss (0-d) and flat gradients, fp32; see `ops.schemas`."""
    return penalty(_DIAGONAL, fishers, lora_as, lora_bs, scales, scale_factors, ewc_lambda, needs)


def l1_penalty(
    fishers: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    scale_factors: Sequence[float],
    l1_lambda: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The same for the l1 norm of what adapters add; fishers is empty."""
    return penalty(_L1, fishers, lora_as, lora_bs, scales, scale_factors, l1_lambda, needs)


class Structure(NamedTuple):
    """What differs between the penalties of several structures of F."""

    kernel: Any
    check: Callable[..., None]  # of the arguments without lambda
    group: Callable[[tuple[int, ...], Sequence[Member], Callable[[Tensor], Tensor]], Group]
    fishers: int = 1  # tensors per adapter: those of all adapters, then as many others


def penalty(
    structure: Structure,
    fishers: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    scale_factors: Sequence[float],
    ewc_lambda: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Loss (0-d) and flat gradients, fp32, of one structure."""
    plan = _plan(structure, fishers, lora_as, lora_bs, scales, scale_factors, needs)
    if plan.once and recorded():
        raise NotPlannable("its table has addresses of copies, which are elsewhere in every call")
    like = lora_as[0]
    # Adapters without elements have no item that would write their gradients, or a loss.
    allocate = like.new_zeros if plan.holes else like.new_empty
    losses, grads = (allocate(size, dtype=torch.float32) for size in (len(plan.groups), plan.length))
    with plan.lock:
        own = plan.own(like.device, tuple(scale_factors))
        for i, group in enumerate(plan.groups):
            work = like.new_empty(group.workspace, dtype=torch.float32)
            launch(
                structure.kernel, (group.items.shape[0],), group.table, own.factors[i],
                group.items, work, own.counters[i], losses[i], grads, group.items.shape[0],
                ewc_lambda, NEED_A=needs[0], NEED_B=needs[1], **group.options,
            )  # fmt: skip
    return losses[0] if len(plan.groups) == 1 else losses.sum(), grads


def _described(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _plan(
    structure: Structure,
    fishers: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    scale_factors: Sequence[float],
    needs: Sequence[bool],
) -> Plan:
    """The prepared tables of this call: kept from an earlier one with the same tensors, or made."""
    if not lora_as or len(fishers) != structure.fishers * len(lora_as):
        structure.check(fishers, lora_as, lora_bs, scales, scale_factors, needs)  # says so
    tensors = tuple(map(_described, (*fishers, *lora_as, *lora_bs, *scales)))
    like, where = lora_as[0], (arch(lora_as[0]), precision(), tables.overriding())
    key = (structure.fishers, tensors, len(scale_factors), tuple(needs), like.device, where)
    found = _plans.find(key)
    if found is not None:
        return found
    structure.check(fishers, lora_as, lora_bs, scales, scale_factors, needs)
    near_fs, near_as, near_bs = ([_near(t) for t in group] for group in (fishers, lora_as, lora_bs))
    given, near = (*fishers, *lora_as, *lora_bs), (*near_fs, *near_as, *near_bs)
    captured = kept.capturing(like.device)  # what it allocates is the graph's
    once = captured or like.is_meta or any(a is not b for a, b in zip(given, near, strict=True))
    place = kept.by_value if captured else Tensor.to if once else kept.copied
    plan = _prepare(
        structure, near_fs, near_as, near_bs, scales, needs, lambda host: place(host, like.device)
    )
    if once:
        plan.copies, plan.once = near, True
        return plan
    _plans.add(key, plan)
    return plan


def _near(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy that kernels can address: rows of codes are read as aligned vectors."""
    if tensor.dtype == torch.uint8 and tensor.data_ptr() % ALIGNMENT:
        return tensor.clone()
    return addressable(tensor)


class Member(NamedTuple):
    """One adapter; `places` are those of its dA, dB, ds in the flat gradients, -1 where not asked for."""

    fisher: Tensor | None  # None: of an l1 norm
    a: Tensor
    b: Tensor
    scale: Tensor | None
    places: tuple[int, ...]
    columns: Tensor | None = None  # column sums, where `fisher` are row sums

    @property
    def shape(self) -> tuple[int, int]:
        """Of B A and F; codes of F have another."""
        return self.b.shape[0], self.a.shape[1]

    def types(self) -> tuple[torch.dtype, ...]:
        fisher, scale = (getattr(tensor, "dtype", torch.float32) for tensor in (self.fisher, self.scale))
        return fisher, self.a.dtype, self.b.dtype, scale


def _prepare(
    structure: Structure,
    fishers: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    needs: Sequence[bool],
    place: Callable[[Tensor], Tensor],
) -> Plan:
    """The plan of a call; `place` brings a table from host memory to the device."""
    length = 0
    places: list[list[int]] = []
    for of_kind, need in zip((lora_as, lora_bs, scales), needs, strict=True):
        places.append([])
        for tensor in of_kind:
            size = tensor.numel() if need and tensor is not None else -1
            places[-1].append(length if size >= 0 else -1)
            length += max(size, 0)
    groups: dict[Any, dict[int, Member]] = {}
    count = len(lora_as)
    rows: Sequence[Tensor | None] = fishers[:count] or [None] * count
    columns: Sequence[Tensor | None] = fishers[count:] or [None] * count
    of_adapters = zip(rows, lora_as, lora_bs, scales, zip(*places, strict=True), columns, strict=True)
    for index, adapter in enumerate(of_adapters):
        member = Member(*adapter)
        groups.setdefault(member.types(), {})[index] = member
    made = tuple(structure.group(tuple(group), tuple(group.values()), place) for group in groups.values())
    holes = any(0 in (b.shape[0], a.shape[1]) for a, b in zip(lora_as, lora_bs, strict=True))
    return Plan(made, length, holes)


def type_options(member: Member) -> dict[str, Any]:
    """Constexpr arguments that name the dtypes of a group's tensors."""
    names = ("FISHER_TYPE", "A_TYPE", "B_TYPE", "SCALE_TYPE")
    return dict(zip(names, (_TYPES[dtype] for dtype in member.types()), strict=True))


def _group(indices: tuple[int, ...], members: Sequence[Member], place: Callable[[Tensor], Tensor]) -> Group:
    like, types = members[0].a, members[0].types()
    need_s = any(member.places[2] >= 0 for member in members)
    rp = max(16, 1 << (max(member.a.shape[0] for member in members) - 1).bit_length())
    # The gradient of the scale takes registers of its own.
    variant = precision() + ("+ds" if need_s else "")
    config = tables.lookup(f"ewc_penalty_kernel:{variant}", arch(like), types[0], rp)
    slots = multiprocessors(like) * max(WARPS_PER_MULTIPROCESSOR // config["num_warps"], 1)
    rows = _rows(members, config["BLOCK_M"], config["BLOCK_N"], slots)
    table, items, floats, counters = _layout(members, rows, config["BLOCK_M"], config["BLOCK_N"], rp)
    options = {**config, **type_options(members[0]), "RP": rp}
    options |= {"NEED_S": need_s, "PRECISION": precision(), "UNIT": all(_unit(m.fisher) for m in members)}
    options["L1"] = members[0].fisher is None
    return Group(indices, place(table), place(items), floats, counters, options)


def _height(d_out: int, rows: int, m: int) -> int:
    """Rows of each region of an adapter: about `rows`, in whole tiles."""
    return max(cdiv(cdiv(d_out, max(cdiv(d_out, rows), 1)), m), 1) * m


def _rows(members: Sequence[Member], m: int, n: int, slots: int) -> int:
    """Rows of a region for the shortest time: `slots` programs run side by side, and a last round of few
    programs takes as long as a full one. Short regions cost more starts, and more partial sums of dA."""
    shapes = [member.shape for member in members]
    total = sum(d_out * d_in for d_out, d_in in shapes)

    def time(rows: int) -> int:
        heights = [_height(d_out, rows, m) for d_out, _ in shapes]
        items = sum(cdiv(d_out, h) * cdiv(d_in, n) for (d_out, d_in), h in zip(shapes, heights, strict=True))
        return cdiv(items, slots) * (max(heights) + START)

    return min((max(cdiv(2 * total, n * slots * halves), m) for halves in range(2, 17)), key=time)


def _layout(members: Sequence[Member], rows: int, m: int, n: int, rp: int) -> tuple[Tensor, Tensor, int, int]:
    """The table, the items (adapter, region of rows, block of columns), and the sizes of workspace and
    counters."""
    table = torch.zeros(len(members), kernels.FIELDS.value, dtype=torch.int64)
    items: list[tuple[int, int, int]] = []
    sizes: list[dict[str, int]] = []
    for index, member in enumerate(members):
        d_out, d_in = member.shape
        height = _height(d_out, rows, m)
        regions, blocks = cdiv(d_out, height), cdiv(d_in, n)
        sizes.append({"ROWS": height, "REGIONS": regions, "BLOCKS": blocks, "FIRST_ITEM": len(items)})
        items += [(index, region, block) for region in range(regions) for block in range(blocks)]
    floats, counters = len(items), 1  # a partial loss per item and its counter come first
    for row, member, fields in zip(table, members, sizes, strict=True):
        (d_out, d_in), rank = member.shape, member.a.shape[0]
        regions, blocks = fields["REGIONS"], fields["BLOCKS"]
        parts = {
            "PART_A": regions * rank * d_in,
            "PART_B": blocks * d_out * rank,
            "PART_S": regions * blocks * rp,
        }
        for name, size in parts.items():
            fields[name], floats = floats, floats + size
        for name, size in {"COUNT_A": blocks, "COUNT_B": regions, "COUNT_S": 1}.items():
            fields[name], counters = counters, counters + size
        for name, value in {**_addresses(member), **fields}.items():
            row[_FIELDS[name]] = value
    return table, torch.tensor(items, dtype=torch.int32).reshape(-1, 3), floats, counters


def _addresses(member: Member) -> dict[str, int]:
    """Pointers, sizes, strides and the places of the gradients of one adapter."""
    fisher, a, b, s, place, _ = member
    return {
        **({} if fisher is None else _of_fisher(fisher)),
        "LORA_A": a.data_ptr(), "LORA_B": b.data_ptr(),
        "SCALE": 0 if s is None else s.data_ptr(),
        "D_OUT": b.shape[0], "D_IN": a.shape[1], "RANK": a.shape[0],
        "A_0": a.stride(0), "A_1": a.stride(1),
        "B_0": b.stride(0), "B_1": b.stride(1), "SCALE_0": 0 if s is None or s.dim() == 0 else s.stride(0),
        "SCALAR": int(s is not None and s.dim() == 0),
        "GRAD_A": place[0], "GRAD_B": place[1], "GRAD_S": place[2],
    }  # fmt: skip


def _of_fisher(fisher: Tensor) -> dict[str, int]:
    return {"FISHER": fisher.data_ptr(), "FISHER_0": fisher.stride(0), "FISHER_1": fisher.stride(1)}


def _unit(fisher: Tensor | None) -> bool:
    """Whether rows are contiguous and 16-byte loads of them are aligned and never cross the end; so it is of
    codes."""
    if fisher is None:
        return False
    aligned = fisher.data_ptr() % 16 == 0 and fisher.stride(0) % 8 == 0 == fisher.shape[1] % 8
    return fisher.stride(1) == 1 and aligned


_DIAGONAL = Structure(kernels.ewc_penalty_kernel, arguments.ewc_penalty, _group)
_L1 = Structure(kernels.ewc_penalty_kernel, arguments.l1_penalty, _group, fishers=0)
