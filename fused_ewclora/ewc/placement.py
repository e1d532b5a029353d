# SPDX-License-Identifier: Apache-2.0
"""Where the tensors of a model are, whole in one process or sharded over several, and the parts of `EWC` that
depend on it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .. import functional as FE
from ..distributed import processes
from ..distributed.processes import sharded
from ..distributed.reduce import reduced
from ..distributed.transaction import Transaction
from ..errors import FisherError, TargetError
from ..fishers import Fisher
from ..layers.adapted import AdaptedLinear, Updates
from ..layers.index import AdapterRef, OperandLookup, Operands, adapter_refs, check_present, operands
from ..layers.inject import check_mergeable, check_plain
from ..ops.capture import FisherCapture
from .state import EWCState, Expected, TaskFisher, parse
from .structures import Extent, Gathered, Parts
from .structures.structure import zeros

Result = TypeVar("Result")


class Placement(Protocol):
    """What `EWC` does with the tensors of a model, by where they are.

    Fishers are those of this process: whole ones, or its rows of them. Every process that holds a part of the
    model must make the same calls.
    """

    model: nn.Module
    layers: dict[str, AdaptedLinear]
    refs: list[AdapterRef]

    def check(self) -> None:
        """Raises `TargetError` when the adapters were replaced or are placed differently."""

    def check_foldable(self, action: str) -> None:
        """Raises `TargetError` or `FisherError` when `action` cannot fold the adapters into the weights
        now."""

    def agree(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, which makes no collective calls; its error in one process is raised in every
        process."""

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process that holds a part of the model."""

    def wrapped(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fishers as users see them, whole or as DTensors."""

    def parsed(self, saved: Any, expected: Expected) -> EWCState:
        """This process's part of a saved state; raises `FisherError` as `parse` does. `expected` has the
        shapes of whole tensors."""

    def penalty(self, fishers: Mapping[str, Fisher], ewc_lambda: float) -> Tensor:
        """(lambda/2) sum F (B diag(s) A)^2 over all rows, 0-d and differentiable."""

    def add_penalty_grad_(
        self, fishers: Mapping[str, Fisher], ewc_lambda: float, grad_scale: float | Tensor
    ) -> Tensor:
        """Adds the gradients of the penalty, times grad_scale, to `.grad`; returns the unscaled penalty."""

    def extent(self, rows: int, columns: int) -> Extent:
        """The rows that this process holds of a Fisher."""

    def largest_extent(self, rows: int, columns: int) -> Extent:
        """Rows of a Fisher as many as a process holds at most."""

    def over_rows(self, value: Tensor) -> Tensor:
        """The sum of a value over the processes that hold the rows of a Fisher."""

    def capture(
        self, structure: Gathered, layer: AdaptedLinear, *options: Any
    ) -> tuple[FisherCapture, list[Parts]]:
        """A capture that adds to new sums for the Fishers of a layer, and these sums, by adapter; options are
        those of `FisherCapture` after the rows."""

    def totals(self, samples: int, batch_size: int) -> tuple[int, int]:
        """The samples of all processes, and the largest of their batch sizes."""

    def reduced(
        self, task: TaskFisher, described: Mapping[str, Any], group: ProcessGroup | None
    ) -> TaskFisher:
        """The Fisher of the data of all processes of `group`, as `distributed.reduce.reduced`."""

    def common_generator(
        self, generator: torch.Generator | None, group: ProcessGroup | None
    ) -> torch.Generator | None:
        """A source for `reset_adapters` with which every process of `group` draws the same values."""

    def new_weights(self) -> dict[str, Updates]:
        """By layer: what to write so that the base weight, or this process's part of it, becomes
        W + B diag(s) A."""

    def reset_adapters(self, change: Transaction, generator: torch.Generator | None) -> None:
        """Draws new A and sets B to 0 in every adapter, in place; `change` undoes it."""


class LocalPlacement:
    """`Placement` of a model that is whole in this process."""

    def __init__(self, model: nn.Module, layers: dict[str, AdaptedLinear]) -> None:
        self.model, self.layers, self.refs = model, layers, adapter_refs(layers)

    def check(self) -> None:
        check_present(self.refs)
        check_inside(self.model, self.layers)
        if names := sharded(self.layers):
            raise TargetError(f"{names[0]}: its parameters are sharded; call ewc.shard_() after fully_shard")

    def check_foldable(self, action: str) -> None:
        check_ready(self.layers, action)
        check_mergeable(self.model, action)

    def agree(self, work: Callable[[], Result]) -> Result:
        return work()

    def any(self, flag: bool) -> bool:
        return flag

    def wrapped(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)

    def parsed(self, saved: Any, expected: Expected) -> EWCState:
        return parse(saved, expected)

    def operands(self, fishers: Mapping[str, Fisher]) -> Operands:
        """The operands of `ewc_penalty`."""
        if torch.compiler.is_compiling():  # what a graph guards on is what it looks at
            check_present(self.refs)
            return operands(self.refs, fishers)
        return self._lookup(fishers)

    @functools.cached_property
    def _lookup(self) -> OperandLookup:
        return OperandLookup(self.refs)

    def penalty(self, fishers: Mapping[str, Fisher], ewc_lambda: float) -> Tensor:
        return FE.ewc_penalty(*self.operands(fishers), ewc_lambda)

    def add_penalty_grad_(
        self, fishers: Mapping[str, Fisher], ewc_lambda: float, grad_scale: float | Tensor
    ) -> Tensor:
        terms = self.operands(fishers)
        if not self._lookup.composed:
            return FE.ewc_penalty_grad_(*terms, ewc_lambda, grad_scale=grad_scale)
        # The result of a composer need not be a leaf, whose .grad an optimizer reads.
        with torch.enable_grad():
            penalty = self.penalty(fishers, ewc_lambda)
        penalty.backward(penalty.detach().new_ones(()) * grad_scale)
        return penalty.detach()

    def extent(self, rows: int, columns: int) -> Extent:
        return Extent.whole(rows, columns)

    largest_extent = extent

    def over_rows(self, value: Tensor) -> Tensor:
        return value

    def capture(
        self, structure: Gathered, layer: AdaptedLinear, *options: Any
    ) -> tuple[FisherCapture, list[Parts]]:
        pieces = layer.adapter_slices
        parts = [
            new_sums(structure, layer, self.extent(piece.row_count, layer.in_features)) for piece in pieces
        ]
        sums = [structure.sums(own) for own in parts]
        return FisherCapture(sums, [piece.rows for piece in pieces], *options), parts

    def totals(self, samples: int, batch_size: int) -> tuple[int, int]:
        return samples, batch_size

    def reduced(
        self, task: TaskFisher, described: Mapping[str, Any], group: ProcessGroup | None
    ) -> TaskFisher:
        return reduced(task, described, group)

    def common_generator(
        self, generator: torch.Generator | None, group: ProcessGroup | None
    ) -> torch.Generator | None:
        return processes.common_generator(generator, self.refs[0].layer.weight.device, group)

    def new_weights(self) -> dict[str, Updates]:
        return {
            name: layer.weight_updates(layer.consolidated_weight()) for name, layer in self.layers.items()
        }

    def reset_adapters(self, change: Transaction, generator: torch.Generator | None) -> None:
        for ref in self.refs:
            for parameter in ref.parameters():
                change.remember(parameter)
        for layer in self.layers.values():
            layer.reset_adapters(generator)


def check_inside(model: nn.Module, layers: Mapping[str, AdaptedLinear]) -> None:
    """Raises `TargetError` when the model no longer runs one of the layers, or runs it with other parameters
    than those that it was given."""
    inside = set(model.modules())
    if gone := [name for name, layer in layers.items() if layer not in inside]:
        raise TargetError(
            f"{gone[0]}: the adapted layer is no longer part of the model ({len(gone)} such layers); another "
            "module has replaced it, as quantisation does. Make a new EWC after the last change of the model"
        )
    check_plain(layers, "EWC")


def check_ready(layers: Mapping[str, AdaptedLinear], action: str) -> None:
    """Raises `TargetError` for a merged layer or one without plain parameters, and `FisherError` for one with
    an active Fisher pass; `action` can work on none of them."""
    check_plain(layers, action)
    for name, layer in layers.items():
        if layer.merged:
            raise TargetError(
                f"{name}: its adapter is merged into the base weight; call unmerge(model) before {action}"
            )
        if layer.fisher_capture is not None:
            raise FisherError(f"{name}: a Fisher pass is active; leave its block before {action}")


def new_sums(structure: Gathered, layer: AdaptedLinear, extent: Extent) -> Parts:
    """Zeros to accumulate sums in."""
    return zeros(structure.sum_shapes(extent), sums_dtype(layer), layer.weight.device)


def sums_dtype(layer: AdaptedLinear) -> torch.dtype:
    """That of the sums of a task: fp32, beside fp64 weights fp64."""
    return torch.promote_types(layer.dtype, torch.float32)
