"""The end of a task: every new value is computed and checked first, then all of them are copied in, or none
(docs/mathematics.md, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..distributed.processes import together
from ..distributed.transaction import Transaction
from ..errors import ArgumentError, FisherError, TargetError
from ..layers.adapted import AdaptedLinear
from ..layers.index import Slot, put_rows, take_rows
from .fisher_pass import TaskFisher, nonfinite
from .state import EWCState, Factors, TaskRecord

if TYPE_CHECKING:
    from .sharding import Sharding  # loads torch.distributed.fsdp, which takes a second


@torch.no_grad()
def new_fisher(
    old: Tensor | None, task: TaskFisher, key: str, gamma: float, update: str, dtype: torch.dtype
) -> Tensor:
    """gamma F + F_task ("sum") or gamma F + (1 - gamma) F_task ("convex"), F_task = buffer / samples; one
    rounding to `dtype`.

    gamma = 0 copies F_task, so that an Inf in the old F does not survive as 0 * Inf; so does the first task.
    """
    fresh = task.buffers[key] / task.samples
    if old is not None and gamma != 0.0:
        if update == "convex":
            fresh.mul_(1.0 - gamma)
        fresh.add_(old.to(fresh.dtype), alpha=gamma)
    return fresh.to(dtype)


@torch.no_grad()
def new_factors(slots: list[Slot], old: Mapping[str, Factors]) -> dict[str, Factors]:
    """sum A, sum B and the original rows of W, as the official code accumulates them."""
    factors = {}
    for slot in slots:
        a, b = slot.factors()
        held = old.get(slot.key)
        wide = torch.promote_types(a.dtype, torch.float32)
        base = take_rows(slot.layer.base_weight, slot.piece.rows) if held is None else held.base
        sum_a = a.detach().to(wide, copy=True) if held is None else held.lora_a + a
        sum_b = b.detach().to(wide, copy=True) if held is None else held.lora_b + b
        factors[slot.key] = Factors(sum_a, sum_b, base)
    return factors


@torch.no_grad()
def new_weights(slots: list[Slot], factors: Mapping[str, Factors]) -> list[tuple[Tensor, Tensor]]:
    """(weight, its value after the task) per layer; W0 + s (sum B)(sum A) where factors are kept, else W + B
    diag(s) A."""
    layers = list(dict.fromkeys(slot.layer for slot in slots))
    if not factors:
        return [(layer.base_weight, layer.consolidated_weight()) for layer in layers]
    weights = {layer: layer.base_weight.detach().clone() for layer in layers}
    for slot in slots:
        held = factors[slot.key]
        delta = (held.lora_b * slot.piece.scaling) @ held.lora_a
        put_rows(
            weights[slot.layer], slot.piece.rows, (held.base.to(delta.dtype) + delta).to(held.base.dtype)
        )
    return [(layer.base_weight, weights[layer]) for layer in layers]


def consolidate(
    state: EWCState,
    slots: list[Slot],
    change: Transaction,
    *,
    gamma: float,
    update: str,
    merge_mode: str,
    fisher_dtype: torch.dtype,
    check_finite: bool,
    generator: torch.Generator | None,
    sharding: Sharding | None,
) -> EWCState:
    """The state after the task; weights, Fishers and adapters are updated in place through `change`, all of
    them or none."""
    task = state.task
    if task is None:
        raise FisherError(
            "consolidate: this task has no Fisher yet; call estimate_fisher(loader, loss_fn) first"
        )
    if merge_mode == "factors" and (
        learned := [s.key for s in slots if isinstance(s.layer.adapter_scale(s.piece), Tensor)]
    ):
        raise ArgumentError(
            f"merge_mode: 'factors' has one scale for the sums of all tasks, but {learned[0]} has a "
            "lora_scale; use 'delta'"
        )
    fishers = {
        slot.key: new_fisher(state.fishers.get(slot.key), task, slot.key, gamma, update, fisher_dtype)
        for slot in slots
    }
    factors = new_factors(slots, state.factors) if merge_mode == "factors" else {}
    weights = new_weights(slots, factors) if sharding is None else sharding.new_weights()
    if check_finite:
        _agreed(sharding, lambda: _check(slots, fishers, weights))
    record = TaskRecord("+".join(task.labels), task.samples, task.batch_size, gamma)
    after = EWCState(state.fishers or fishers, factors, (*state.history, record), None)
    layers = list(dict.fromkeys(slot.layer for slot in slots))
    for weight, value in weights:
        change.copy_(weight, value)
    for key, old in state.fishers.items():
        change.copy_(old, fishers[key])
    held = [factor for slot in slots for factor in slot.factors()] if sharding is None else sharding.shards()
    for tensor in held:
        change.remember(tensor)
    if sharding is not None:
        sharding.reset_adapters(generator)
    else:
        for layer in layers:
            layer.reset_adapters(generator)
    for layer in layers:
        layer.consolidated_tasks += 1
    return after


def check_ready(layers: Mapping[str, AdaptedLinear]) -> None:
    """Raises `TargetError` or `FisherError` for a layer whose task cannot end now."""
    for name, layer in layers.items():
        if layer.merged:
            raise TargetError(
                f"{name}: its adapter is merged into the base weight; call unmerge(model) before consolidate"
            )
        if layer.fisher_capture is not None:
            raise FisherError(f"{name}: a Fisher pass is active; leave its block before consolidate")


def _agreed(sharding: Sharding | None, check: Callable[[], None]) -> None:
    """An error in one process is one in all of them."""
    check() if sharding is None else together(check)


def _check(slots: list[Slot], fishers: Mapping[str, Tensor], weights: list[tuple[Tensor, Tensor]]) -> None:
    names = list({slot.layer: slot.key for slot in slots}.values())  # in the order of `weights`
    values = {f"Fisher of {key}": fisher for key, fisher in fishers.items()}
    values |= {f"merged weight of {key}": value for key, (_, value) in zip(names, weights, strict=True)}
    if bad := nonfinite(values):
        raise FisherError(
            f"consolidate: {bad[0]}: expected finite values, got NaN or Inf ({len(bad)} such tensors); "
            "nothing was changed"
        )
