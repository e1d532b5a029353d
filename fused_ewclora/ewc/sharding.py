# SPDX-License-Identifier: Apache-2.0
"""EWC where FSDP2 shards the parameters: of a Fisher each process holds the rows whose lora_B it holds.

lora_A and lora_B are small and gathered where they are needed; Fishers and base weights never are. Each
process computes the penalty of its rows, and its rows of the new weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from .. import functional as FE
from ..distributed.gather import SumOverProcesses, gathered
from ..distributed.processes import common_generator, reshard, together
from ..distributed.transaction import Transaction
from ..errors import TargetError
from ..fishers import Fisher, KroneckerFisher
from ..layers.adapted import AdaptedLinear, Updates
from ..layers.index import check_present
from ..layers.inject import check_mergeable
from ..ops.capture import FisherCapture
from ..ops.sums import Term
from .placement import Placement, check_inside, check_ready, new_sums
from .state import EWCState, Expected, TaskFisher, parse
from .structures import Extent, Gathered, Parts, Structure, split_key

Result = TypeVar("Result")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; it shares the storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Share:
    """The rows `start` to `stop` that this process holds of `rows` rows; a full share has `chunk` rows."""

    rows: int
    chunk: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        """Rows of this process."""
        return self.stop - self.start


class ShardedPlacement:
    """`Placement` of adapters whose matrices FSDP2 shards by rows.

    before: the placement before sharding. mesh: that of the parameters, which None takes. structure: of the
    Fishers. Raises
    `TargetError` naming the adapter when its matrices are not sharded by rows over `mesh`.
    """

    def __init__(self, before: Placement, mesh: DeviceMesh | None, structure: Structure) -> None:
        self._structure = structure
        self.model, self.layers, self.refs = before.model, before.layers, before.refs
        if kernels := [name for name, layer in self.layers.items() if not layer.stores_matrices]:
            raise TargetError(
                f"{kernels[0]}: its lora_A and lora_B are convolutions of PEFT, which cannot be sharded; "
                "fe.inject makes adapters that can"
            )
        reshard(self.model)
        # The parameters that FSDP keeps between runs; during a run it puts other tensors in their place.
        self._kept: dict[tuple[int, str], DTensor] = {}
        first = self._matrices()[0][1]
        self.mesh = first.device_mesh if mesh is None else mesh
        self._placements = first.placements
        for ref, (a, b) in zip(self.refs, self._matrices(), strict=True):
            for name, matrix in ((ref.piece.a_name, a), (ref.piece.b_name, b)):
                self._check_sharded(ref.key, name, matrix)
        dimension = next(i for i, p in enumerate(self._placements) if isinstance(p, Shard))
        self.group = self.mesh.get_group(dimension)
        self._others = [self.mesh.get_group(i) for i in range(self.mesh.ndim) if i != dimension]
        for layer in self.layers.values():  # raises where it is sharded in a way that is not known
            self._part_of_weight(layer)

    def check(self) -> None:
        check_present(self.refs)
        check_inside(self.model, self.layers)

    def check_foldable(self, action: str) -> None:
        def check() -> None:
            check_ready(self.layers, action)
            check_mergeable(self.model, action)

        self.agree(check)  # the others would wait for a process that raises

    def agree(self, work: Callable[[], Result]) -> Result:
        return together(work)

    def any(self, flag: bool) -> bool:
        return bool(self._reduced(int(flag), dist.ReduceOp.MAX))

    def _check_sharded(self, key: str, name: str, matrix: DTensor) -> None:
        if matrix.device_mesh != self.mesh:
            raise TargetError(f"mesh: {name} of {key} is sharded over {matrix.device_mesh}, not {self.mesh}")
        sharded = [p for p in matrix.placements if not isinstance(p, Replicate)]
        if sharded != [Shard(0)] or matrix.placements != self._placements:
            raise TargetError(
                f"mesh: expected {name} of {key} sharded by rows, Shard(0), got {matrix.placements}"
            )

    def _kept_tensor(self, key: tuple[int, str], table: Mapping[str, Any], name: str) -> DTensor:
        present = table[name]
        if isinstance(present, DTensor):
            self._kept[key] = present
        elif key not in self._kept:
            raise TargetError(
                f"{name} is not a DTensor; shard the model first: torch.distributed.fsdp.fully_shard(model)"
            )
        return self._kept[key]

    def _matrices(self) -> list[tuple[DTensor, DTensor]]:
        pairs = []
        for index, ref in enumerate(self.refs):
            (a_table, a_name), (b_table, b_name) = ref.locations
            a = self._kept_tensor((index, "a"), a_table, a_name)
            b = self._kept_tensor((index, "b"), b_table, b_name)
            pairs.append((a, b))
        return pairs

    def _scales(self) -> list[DTensor | None]:
        scales: list[DTensor | None] = []
        for index, ref in enumerate(self.refs):
            table, name = ref.layer._parameters, ref.piece.scale_name
            scales.append(self._kept_tensor((index, "s"), table, name) if name in table else None)
        return scales

    def share(self, rows: int) -> Share:
        """This process's share of `rows` rows, as DTensor divides them."""
        chunk = -(-rows // self.group.size())
        start = min(self.group.rank() * chunk, rows)
        return Share(rows, chunk, start, min(start + chunk, rows))

    def whole(self, with_b: bool) -> tuple[list[Tensor], list[Tensor], list[float | Tensor]]:
        """The whole lora_As, lora_Bs (whole, or without `with_b` this process's rows) and scales;
        differentiable."""
        matrices, learned = self._matrices(), self._scales()
        kept: list[DTensor] = [a for a, _ in matrices] + [s for s in learned if s is not None]
        kept += [b for _, b in matrices] if with_b else []
        tensors = gathered([local(t) for t in kept], [t.shape[0] for t in kept], self.group)
        count = len(matrices)
        lora_as, rest = tensors[:count], tensors[count:]
        scales: list[float | Tensor] = []
        for ref, scale in zip(self.refs, learned, strict=True):
            factor = ref.piece.scaling
            scales.append(factor if scale is None else rest.pop(0) * factor)
        return lora_as, rest if with_b else [local(b) for _, b in matrices], scales

    def penalty(self, fishers: Mapping[str, Fisher], ewc_lambda: float) -> Tensor:
        """Its gradients with respect to the shards are not averaged over processes."""
        values = list(fishers.values())
        if isinstance(values[0], KroneckerFisher):
            part = self._kronecker_penalty(cast(list[KroneckerFisher], values), ewc_lambda)
        else:
            lora_as, lora_bs, scales = self.whole(with_b=False)
            part = FE.ewc_penalty(values, lora_as, lora_bs, scales, ewc_lambda)
        return cast(Tensor, SumOverProcesses.apply(part, self.group))

    def _kronecker_penalty(self, fishers: list[KroneckerFisher], ewc_lambda: float) -> Tensor:
        """That of this process's rows of G: they meet all rows of B."""
        lora_as, lora_bs, scales = self.whole(with_b=True)
        total = lora_as[0].new_zeros((), dtype=torch.float64)
        for fisher, a, b, scale in zip(fishers, lora_as, lora_bs, scales, strict=True):
            share, acc = self.share(b.shape[0]), fisher.outputs.dtype
            scaled, wide = b.to(acc) * scale, a.to(acc)
            of_outputs = scaled[share.start : share.stop].T @ (fisher.outputs @ scaled)
            of_inputs = (wide @ fisher.inputs) @ wide.T
            total = total + (of_outputs * of_inputs).sum(dtype=torch.float64)
        return (0.5 * ewc_lambda * total).to(fishers[0].outputs.dtype)

    def add_penalty_grad_(
        self, fishers: Mapping[str, Fisher], ewc_lambda: float, grad_scale: float | Tensor
    ) -> Tensor:
        with torch.enable_grad():
            value = self.penalty(fishers, ewc_lambda)
            (value * grad_scale).backward()
        return value.detach()

    def wrapped(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """DTensors, sharded as lora_B is; what every process has as a whole stays a tensor."""
        rows = {ref.key: b.shape[0] for ref, (_, b) in zip(self.refs, self._matrices(), strict=True)}
        wrapped: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            key, part = split_key(name)
            if part in self._structure.by_rows:
                shape = torch.Size((rows[key], *tensor.shape[1:]))
                stride = (shape[1], 1) if len(shape) == 2 else (1,)
                tensor = DTensor.from_local(
                    tensor, self.mesh, self._placements, run_check=False, shape=shape, stride=stride
                )
            wrapped[name] = tensor
        return wrapped

    def taken(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of this process's rows of whole tensors or DTensors; of those not divided by rows, whole."""
        return {name: self._mine_of(name, tensor).clone() for name, tensor in tensors.items()}

    def _mine_of(self, name: str, tensor: Tensor) -> Tensor:
        return self.mine(tensor) if split_key(name)[1] in self._structure.by_rows else tensor

    def mine(self, tensor: Tensor) -> Tensor:
        """This process's rows of a whole tensor, or of a DTensor."""
        if isinstance(tensor, DTensor):
            return tensor.redistribute(self.mesh, self._placements).to_local()
        share = self.share(tensor.shape[0])
        return tensor[share.start : share.stop]

    def parsed(self, saved: Any, expected: Expected) -> EWCState:
        saved = self._rows_of_state(saved)
        return together(lambda: parse(saved, replace(expected, extent=self.extent)))

    def _rows_of_state(self, saved: Any) -> Any:
        """A saved state with this process's rows of its whole tensors or DTensors; anything that is no state
        unchanged."""

        def mine(name: Any, value: Any) -> Any:
            return self._mine_of(str(name), value) if isinstance(value, Tensor) and value.dim() > 0 else value

        tensors = saved.get("tensors") if isinstance(saved, Mapping) else None
        if not isinstance(tensors, Mapping):
            return saved
        return {**saved, "tensors": {name: mine(name, value) for name, value in tensors.items()}}

    def totals(self, samples: int, batch_size: int) -> tuple[int, int]:
        return self._reduced(samples, dist.ReduceOp.SUM), self._reduced(batch_size, dist.ReduceOp.MAX)

    def reduced(
        self, task: TaskFisher, described: Mapping[str, Any], group: dist.ProcessGroup | None
    ) -> TaskFisher:
        """The same Fisher, which `capture` has summed over processes."""
        return task

    def common_generator(
        self, generator: torch.Generator | None, group: dist.ProcessGroup | None
    ) -> torch.Generator | None:
        """The same generator, from which `reset_adapters` draws a common one."""
        return generator

    def _reduced(self, count: int, op: Any) -> int:
        value = torch.tensor([count], dtype=torch.int64, device=self._device)
        for group in (self.group, *self._others):
            dist.all_reduce(value, op=op, group=group)
        return int(value.item())

    @property
    def _device(self) -> torch.device:
        return self.refs[0].layer.weight.device

    def extent(self, rows: int, columns: int) -> Extent:
        share = self.share(rows)
        return Extent(rows, columns, share.start, share.count)

    def largest_extent(self, rows: int, columns: int) -> Extent:
        return Extent(rows, columns, 0, min(self.share(rows).chunk, rows))

    def over_rows(self, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def capture(
        self, structure: Gathered, layer: AdaptedLinear, *options: Any
    ) -> tuple[FisherCapture, list[Parts]]:
        """Its sums are those of this process's rows, summed over processes batch by batch."""
        pieces, columns = layer.adapter_slices, layer.in_features
        parts = [new_sums(structure, layer, self.extent(piece.row_count, columns)) for piece in pieces]
        capture = ShardedCapture([structure.sums(own) for own in parts], [p.rows for p in pieces], *options)
        capture.parts, capture.structure, capture.columns = parts, structure, columns
        capture.shares = [self.share(piece.row_count) for piece in pieces]
        capture.group, capture.others = self.group, self._others
        return capture, parts

    @torch.no_grad()
    def new_weights(self) -> dict[str, Updates]:
        reshard(self.model)
        lora_as, lora_bs, scales = self.whole(with_b=True)
        parts = {layer: self._part_of_weight(layer) for layer in self.layers.values()}
        values = {layer: layer.matrix_of(target.detach()).clone() for layer, (target, _) in parts.items()}
        for ref, a, b, scale in zip(self.refs, lora_as, lora_bs, scales, strict=True):
            _, (rows, columns) = parts[ref.layer]
            value = values[ref.layer]
            first = 0
            for start, stop in ref.piece.rows:
                low, high = max(start, rows.start), min(stop, rows.stop)
                if low < high:
                    b_rows = b[first + low - start : first + high - start]
                    piece = value[low - rows.start : high - rows.start]
                    FE.merge_(piece, a[:, columns], b_rows, scale)
                first += stop - start
        updates: dict[str, Updates] = {}
        for name, layer in self.layers.items():
            target, _ = parts[layer]
            updates[name] = [(target, layer.stored_as(target, values[layer]))]
        return updates

    def _part_of_weight(self, layer: AdaptedLinear) -> tuple[Tensor, tuple[Share, slice]]:
        """The local part of the weight as it is stored, its rows, and its columns (of a transposed weight,
        FSDP shards the columns)."""
        everything = Share(layer.out_features, 0, 0, layer.out_features)
        weight = layer.weight
        if weight.numel() == 0:  # one of several in a parameter, which another process holds
            return weight, (Share(layer.out_features, 0, 0, 0), slice(None))
        if not isinstance(weight, DTensor):
            return weight, (everything, slice(None))
        share = self.share(weight.shape[0])
        if layer.transposed:
            return local(weight), (everything, slice(share.start, share.stop))
        return local(weight), (share, slice(None))

    @torch.no_grad()
    def reset_adapters(self, change: Transaction, generator: torch.Generator | None) -> None:
        """The new A do not depend on the number of processes."""
        matrices = self._matrices()
        for pair in matrices:
            for matrix in pair:
                change.remember(local(matrix))
        common = common_generator(generator, self._device)
        for (a, b), ref in zip(matrices, self.refs, strict=True):
            bound = ref.layer.initial_bound
            drawn = torch.empty(a.shape, dtype=a.dtype).uniform_(-bound, bound, generator=common)
            local(a).copy_(self.mine(drawn))
            local(b).zero_()


class ShardedCapture(FisherCapture):
    """Squares the gradients of this process's samples in a workspace for one adapter, and sums its rows over
    processes into the process that holds them.

    Every process must make the same calls in the same order, as FSDP itself requires.
    """

    shares: list[Share]
    parts: list[Parts]
    structure: Gathered
    columns: int
    group: dist.ProcessGroup
    others: list[dist.ProcessGroup]

    def _add(self, index: int, terms: list[Term], weight: float) -> None:
        share, parts = self.shares[index], self.parts[index]
        everything = self._workspace(share, parts)
        whole = {
            part: tensor[: share.rows] if part in self.structure.by_rows else tensor
            for part, tensor in everything.items()
        }
        sums = self.structure.sums(whole)
        for term in terms:
            sums.add(term, self.mode, weight)
        for part, total in parts.items():
            total.add_(self._summed(everything[part], part in self.structure.by_rows)[: len(total)])

    def _workspace(self, share: Share, parts: Parts) -> Parts:
        """Zeros for the sums of all rows, padded to equal shares."""
        shapes = self.structure.sum_shapes(Extent.whole(share.rows, self.columns))
        padded = share.chunk * self.group.size()
        return {
            part: parts[part].new_zeros((padded, *shape[1:]) if part in self.structure.by_rows else shape)
            for part, shape in shapes.items()
        }

    def _summed(self, tensor: Tensor, by_rows: bool) -> Tensor:
        """The sum over processes: this process's rows, or the whole."""
        if by_rows:
            mine = tensor.new_empty((tensor.shape[0] // self.group.size(), *tensor.shape[1:]))
            dist.reduce_scatter_tensor(mine, tensor, group=self.group)
        else:
            mine = tensor
            dist.all_reduce(mine, group=self.group)
        for group in self.others:
            dist.all_reduce(mine, group=group)
        return mine
