# SPDX-License-Identifier: Apache-2.0
"""Gates, one importance per rank of an adapter, and the removal of ranks whose gate is 0 (CoDyRA)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ArgumentError
from ..functional import Adapter
from ..layers.adapted import AdaptedLinear, Composer
from ..layers.slices import AdapterSlice, fisher_key

Table = dict[str, nn.Parameter | None]


class Gated(Composer):
    """B diag(w) A of every adapter that has ranks left, w its parameter `lora_scale`."""

    def adapters(self, layer: AdaptedLinear) -> list[Adapter]:
        """None for a layer without ranks; during a Fisher pass one that adds 0, because the Fisher is
        accumulated in the op's backward."""
        remaining = [
            Adapter(lora_a, lora_b, layer.adapter_scale(piece), piece.rows)
            for piece, lora_a, lora_b in layer.adapter_parameters()
            if lora_a.shape[0]
        ]
        if remaining or layer.fisher_capture is None:
            return remaining
        piece, lora_a, lora_b = layer.adapter_parameters()[0]
        zero_a = lora_a.new_zeros(1, lora_a.shape[1]).requires_grad_()
        zero_b = lora_b.new_zeros(lora_b.shape[0], 1).requires_grad_()
        return [Adapter(zero_a, zero_b, 1.0, piece.rows)]


@dataclass(frozen=True)
class GatedAdapter:
    """One adapter with its gates, by Fisher key; parameters are looked up, because pruning replaces them."""

    key: str
    table: Table
    piece: AdapterSlice

    @property
    def gate(self) -> nn.Parameter:
        """w `[r]`."""
        return cast(nn.Parameter, self.table[self.piece.scale_name])

    @property
    def along_rank(self) -> tuple[tuple[str, int], ...]:
        """(name, dimension of the rank) of A, B and w."""
        return (self.piece.a_name, 0), (self.piece.b_name, 1), (self.piece.scale_name, 0)


def add_gates(layers: Mapping[str, AdaptedLinear]) -> list[GatedAdapter]:
    """Gates of 1 on every adapter, in the order of the Fisher keys."""
    gated = []
    for name, layer in layers.items():
        for piece, lora_a, _ in layer.adapter_parameters():
            layer.register_parameter(piece.scale_name, nn.Parameter(lora_a.new_ones(piece.r)))
            gated.append(GatedAdapter(fisher_key(name, piece), layer._parameters, piece))
        layer.composer = Gated()
    return gated


@dataclass(frozen=True)
class _Pruned:
    """A parameter with fewer ranks."""

    table: Table
    name: str
    old: nn.Parameter
    dim: int
    keep: Tensor

    def select(self, tensor: Tensor) -> Tensor:
        """The ranks that are kept of the parameter, or of a tensor of its shape."""
        return tensor.detach().index_select(self.dim, self.keep)

    def parameter(self) -> nn.Parameter:
        """The new parameter, with the kept ranks of the gradient."""
        new = nn.Parameter(self.select(self.old), requires_grad=self.old.requires_grad)
        new.grad = None if self.old.grad is None else self.select(self.old.grad)
        return new


def prune_(adapters: list[GatedAdapter], optimizer: Optimizer | None) -> int:
    """Removes ranks whose gate is exactly 0; returns how many. Everything new is made before anything is
    replaced."""
    pruned = []
    removed = 0
    for adapter in adapters:
        keep = adapter.gate.detach().nonzero().flatten()
        removed += adapter.gate.numel() - keep.numel()
        if keep.numel() < adapter.gate.numel():
            for name, dim in adapter.along_rank:
                old = cast(nn.Parameter, adapter.table[name])
                pruned.append(_Pruned(adapter.table, name, old, dim, keep))
    new = {id(entry.old): entry.parameter() for entry in pruned}
    states = {} if optimizer is None else _states(optimizer, pruned)
    for entry in pruned:
        entry.table[entry.name] = new[id(entry.old)]
    if optimizer is not None:
        for group in optimizer.param_groups:
            group["params"] = [new.get(id(p), p) for p in group["params"]]
        for entry in pruned:
            optimizer.state.pop(entry.old, None)
            if id(entry.old) in states:
                optimizer.state[new[id(entry.old)]] = states[id(entry.old)]
    return removed


def _states(optimizer: Optimizer, pruned: list[_Pruned]) -> dict[int, dict[str, object]]:
    """The optimizer's state of every pruned parameter, by id of the old one; raises `ArgumentError` for a
    state that cannot be cut by rank."""
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    states: dict[int, dict[str, object]] = {}
    for entry in pruned:
        if entry.old.requires_grad and id(entry.old) not in optimized:
            raise ArgumentError(
                f"optimizer: expected one that holds {entry.name} of the model, found none; make it after "
                "begin_task. Nothing was changed"
            )
        if entry.old in optimizer.state:
            state = optimizer.state[entry.old]
            states[id(entry.old)] = {key: _selected(entry, key, value) for key, value in state.items()}
    return states


def _selected(entry: _Pruned, key: str, value: object) -> object:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value  # a count of steps, which all ranks share
    if value.shape == entry.old.shape:
        return entry.select(value)
    raise ArgumentError(
        f"optimizer: {key} of {entry.name}: expected a state of shape {list(entry.old.shape)}, which can be "
        f"cut by rank, got {list(value.shape)}; compact without the optimizer and make a new one. Nothing "
        "was changed"
    )


@contextmanager
def whole_ranks(adapters: list[GatedAdapter]) -> Iterator[None]:
    """Restores pruned ranks as zeros, which do not change what the model computes; if the block raises, the
    pruned parameters are put back."""
    before = [(a.table, name, a.table[name]) for a in adapters for name, _ in a.along_rank]
    new: list[tuple[Table, str, nn.Parameter]] = []
    for adapter in adapters:
        if (missing := adapter.piece.r - adapter.gate.numel()) == 0:
            continue
        for name, dim in adapter.along_rank:
            old = cast(nn.Parameter, adapter.table[name])
            zeros = old.new_zeros([missing if d == dim else n for d, n in enumerate(old.shape)])
            joined = torch.cat([old.detach(), zeros], dim)
            new.append((adapter.table, name, nn.Parameter(joined, requires_grad=old.requires_grad)))
    for table, name, parameter in new:
        table[name] = parameter
    try:
        yield
    except BaseException:
        for table, name, parameter_before in before:
            table[name] = parameter_before
        raise
