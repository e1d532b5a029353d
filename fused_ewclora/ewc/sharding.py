"""EWC where FSDP2 shards the parameters: the rows of every Fisher live with the rows of its lora_B.

Of lora_A and lora_B, small, whole copies are made where they are needed; of a Fisher or a base weight, never.
Each process computes the part of the penalty that its rows have, and of the new weights its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from .. import functional as FE
from ..distributed.gather import SumOverProcesses, gathered
from ..distributed.processes import common_generator, reshard
from ..errors import TargetError
from ..layers.adapted import AdaptedLinear
from ..layers.index import Slot
from ..ops.capture import FisherCapture


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; it shares the storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Shares:
    """Which of `rows` rows this process holds: `start` to `stop`; full shares have `chunk` rows."""

    rows: int
    chunk: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        """Rows of this process."""
        return self.stop - self.start


class Sharding:
    """Where the adapters of a model are, and the operations of `EWC` on what this process has of them.

    Raises `TargetError` naming the adapter when its factors are not sharded by rows over `mesh`.
    """

    def __init__(self, model: nn.Module, slots: Sequence[Slot], mesh: DeviceMesh | None) -> None:
        self._model, self._slots = model, list(slots)
        reshard(model)
        # FSDP puts other tensors in the modules while they run; these are what it keeps between runs.
        self._kept: dict[tuple[int, str], DTensor] = {}
        first = self._factors()[0][1]
        self.mesh = first.device_mesh if mesh is None else mesh
        self._placements = first.placements
        for slot, (a, b) in zip(self._slots, self._factors(), strict=True):
            for name, factor in ((slot.piece.a_name, a), (slot.piece.b_name, b)):
                self._check(slot.key, name, factor)
        dimension = next(i for i, p in enumerate(self._placements) if isinstance(p, Shard))
        self.group = self.mesh.get_group(dimension)
        self._others = [self.mesh.get_group(i) for i in range(self.mesh.ndim) if i != dimension]

    def _check(self, key: str, name: str, factor: DTensor) -> None:
        if factor.device_mesh != self.mesh:
            raise TargetError(f"mesh: {name} of {key} is sharded over {factor.device_mesh}, not {self.mesh}")
        sharded = [p for p in factor.placements if not isinstance(p, Replicate)]
        if sharded != [Shard(0)] or factor.placements != self._placements:
            raise TargetError(
                f"mesh: expected {name} of {key} sharded by rows, Shard(0), got {factor.placements}"
            )

    def _kept_tensor(self, key: tuple[int, str], table: Mapping[str, Any], name: str) -> DTensor:
        found = table[name]
        if isinstance(found, DTensor):
            self._kept[key] = found
        elif key not in self._kept:
            raise TargetError(
                f"{name} is not a DTensor; shard the model first: torch.distributed.fsdp.fully_shard(model)"
            )
        return self._kept[key]

    def _factors(self) -> list[tuple[DTensor, DTensor]]:
        pairs = []
        for index, slot in enumerate(self._slots):
            (a_table, a_name), (b_table, b_name) = slot.locations
            a = self._kept_tensor((index, "a"), a_table, a_name)
            b = self._kept_tensor((index, "b"), b_table, b_name)
            pairs.append((a, b))
        return pairs

    def _scales(self) -> list[DTensor | None]:
        scales: list[DTensor | None] = []
        for index, slot in enumerate(self._slots):
            table, name = slot.layer._parameters, slot.piece.scale_name
            scales.append(self._kept_tensor((index, "s"), table, name) if name in table else None)
        return scales

    def share(self, rows: int) -> Shares:
        """This process's share of `rows` rows, dealt out as DTensor does."""
        chunk = -(-rows // self.group.size())
        start = min(self.group.rank() * chunk, rows)
        return Shares(rows, chunk, start, min(start + chunk, rows))

    def whole(self, with_b: bool) -> tuple[list[Tensor], list[Tensor], list[float | Tensor]]:
        """All lora_A, all lora_B (this process's rows of them, or all) and all scales; differentiable."""
        factors, learned = self._factors(), self._scales()
        kept: list[DTensor] = [a for a, _ in factors] + [s for s in learned if s is not None]
        kept += [b for _, b in factors] if with_b else []
        tensors = gathered([local(t) for t in kept], [t.shape[0] for t in kept], self.group)
        count = len(factors)
        lora_as, rest = tensors[:count], tensors[count:]
        scales: list[float | Tensor] = []
        for slot, scale in zip(self._slots, learned, strict=True):
            factor = slot.piece.scaling
            scales.append(factor if scale is None else rest.pop(0) * factor)
        return lora_as, rest if with_b else [local(b) for _, b in factors], scales

    def penalty(self, fishers: Mapping[str, Tensor], ewc_lambda: float) -> Tensor:
        """The penalty of all rows, with gradients to the shards of every factor, not averaged over
        processes."""
        lora_as, lora_bs, scales = self.whole(with_b=False)
        part = FE.ewc_penalty(list(fishers.values()), lora_as, lora_bs, scales, ewc_lambda)
        return cast(Tensor, SumOverProcesses.apply(part, self.group))

    def add_penalty_grad_(
        self, fishers: Mapping[str, Tensor], ewc_lambda: float, grad_scale: float | Tensor
    ) -> Tensor:
        """As `EWC.add_penalty_grad_`."""
        with torch.enable_grad():
            value = self.penalty(fishers, ewc_lambda)
            (value * grad_scale).backward()
        return value.detach()

    def wrapped(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Local rows per Fisher key as DTensors, sharded as lora_B is."""
        found: dict[str, Tensor] = {}
        for slot, (_, b) in zip(self._slots, self._factors(), strict=True):
            if slot.key in tensors:
                shape = torch.Size((b.shape[0], slot.layer.in_features))
                found[slot.key] = DTensor.from_local(
                    tensors[slot.key], self.mesh, self._placements, run_check=False, shape=shape,
                    stride=(shape[1], 1),
                )  # fmt: skip
        return found

    def taken(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's rows of whole tensors or DTensors, as tensors of their own."""
        return {key: self.mine(tensor).clone() for key, tensor in tensors.items()}

    def mine(self, tensor: Tensor) -> Tensor:
        """This process's rows of a whole tensor, or of a DTensor."""
        if isinstance(tensor, DTensor):
            return tensor.redistribute(self.mesh, self._placements).to_local()
        share = self.share(tensor.shape[0])
        return tensor[share.start : share.stop]

    def localised(
        self, saved: Any, shapes: Mapping[str, tuple[int, int, int]]
    ) -> tuple[Any, dict[str, tuple[int, int, int]]]:
        """A saved state with this process's rows of its whole tensors or DTensors, and the shapes that these
        should have; what is no state stays as it is."""

        def mine(value: Any) -> Any:
            return self.mine(value) if isinstance(value, Tensor) and value.dim() > 0 else value

        tensors = saved.get("tensors") if isinstance(saved, Mapping) else None
        if isinstance(tensors, Mapping):
            saved = {**saved, "tensors": {name: mine(value) for name, value in tensors.items()}}
        return saved, {key: (self.share(rows).count, *rest) for key, (rows, *rest) in shapes.items()}  # type: ignore[misc]

    def summed(self, count: int) -> int:
        """The sum of a number over all processes of the mesh."""
        return self._reduced(count, dist.ReduceOp.SUM)

    def largest(self, count: int) -> int:
        """The largest of a number over all processes of the mesh."""
        return self._reduced(count, dist.ReduceOp.MAX)

    def _reduced(self, count: int, op: Any) -> int:
        value = torch.tensor([count], dtype=torch.int64, device=self._device)
        for group in (self.group, *self._others):
            dist.all_reduce(value, op=op, group=group)
        return int(value.item())

    @property
    def _device(self) -> torch.device:
        return self._slots[0].layer.weight.device

    def capture(self, layer: AdaptedLinear, rows: list[Any], *options: Any) -> FisherCapture:
        """A capture whose Fishers are this process's rows, summed over processes batch by batch."""
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        shares = [self.share(piece.row_count) for piece in layer.adapter_slices]
        fishers = [
            torch.zeros(share.count, layer.in_features, dtype=dtype, device=layer.weight.device)
            for share in shares
        ]
        capture = ShardedCapture(fishers, rows, *options)
        capture.shares, capture.group, capture.others = shares, self.group, self._others
        return capture

    @torch.no_grad()
    def new_weights(self) -> list[tuple[Tensor, Tensor]]:
        """(what this process has of a base weight, its value with W + B diag(s) A) per layer."""
        reshard(self._model)
        lora_as, lora_bs, scales = self.whole(with_b=True)
        pairs: dict[AdaptedLinear, tuple[Tensor, Tensor]] = {}
        for slot, a, b, scale in zip(self._slots, lora_as, lora_bs, scales, strict=True):
            target, (rows, columns) = self._part_of_weight(slot.layer)
            _, value = pairs.setdefault(slot.layer, (target, target.detach().clone()))
            first = 0
            for start, stop in slot.piece.rows:
                low, high = max(start, rows.start), min(stop, rows.stop)
                if low < high:
                    b_rows = b[first + low - start : first + high - start]
                    piece = value[low - rows.start : high - rows.start]
                    FE.merge_(piece, a[:, columns], b_rows, scale)
                first += stop - start
        return list(pairs.values())

    def _part_of_weight(self, layer: AdaptedLinear) -> tuple[Tensor, tuple[Shares, slice]]:
        """The local part of the base weight, its rows, and its columns (of a transposed weight, FSDP deals
        out the columns)."""
        weight = layer._parameters["weight"]
        if not isinstance(weight, DTensor):
            return layer.base_weight, (Shares(layer.out_features, 0, 0, layer.out_features), slice(None))
        share = self.share(weight.shape[0])
        if layer.transposed:
            everything = Shares(layer.out_features, 0, 0, layer.out_features)
            return local(weight).t(), (everything, slice(share.start, share.stop))
        return local(weight), (share, slice(None))

    @torch.no_grad()
    def reset_adapters(self, generator: torch.Generator | None) -> None:
        """New factors for every adapter, the same whatever the number of processes."""
        common = common_generator(generator, self._device)
        for (a, b), slot in zip(self._factors(), self._slots, strict=True):
            bound = slot.layer.initial_bound
            drawn = torch.empty(a.shape, dtype=a.dtype).uniform_(-bound, bound, generator=common)
            local(a).copy_(self.mine(drawn))
            local(b).zero_()

    def shards(self) -> list[Tensor]:
        """What this process has of all factors."""
        return [local(factor) for pair in self._factors() for factor in pair]


class ShardedCapture(FisherCapture):
    """Squares the gradients of this process's samples in a workspace of one adapter and deals the rows out.

    Every process must make the same calls in the same order, as FSDP itself requires.
    """

    shares: list[Shares]
    group: dist.ProcessGroup
    others: list[dist.ProcessGroup]

    def _add(self, index: int, x: Tensor, dy: Tensor, weight: float) -> None:
        fisher, share = self.fishers[index], self.shares[index]
        columns = fisher.shape[1]
        everything = fisher.new_zeros(share.chunk * self.group.size(), columns)
        self._accumulate_into(everything[: share.rows], x, dy, weight)
        mine = everything.new_empty(share.chunk, columns)
        dist.reduce_scatter_tensor(mine, everything, group=self.group)
        for group in self.others:
            dist.all_reduce(mine, group=group)
        fisher.add_(mine[: share.count])
