"""The new state of `EWC` at the end of a task (docs/mathematics.md, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError, FisherError
from ..layers.adapted import AdaptedLinear, Updates
from ..layers.index import AdapterRef, put_rows, take_rows
from .fold import folding
from .placement import Placement
from .state import AdapterSums, EWCState, TaskFisher, TaskRecord


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
def new_sums(refs: Sequence[AdapterRef], old: Mapping[str, AdapterSums]) -> dict[str, AdapterSums]:
    """sum A, sum B and the original rows of W, as the official code accumulates them."""
    sums = {}
    for ref in refs:
        a, b = ref.matrices()
        before = old.get(ref.key)
        if before is None:
            wide = torch.promote_types(a.dtype, torch.float32)
            base = take_rows(ref.layer.base_weight, ref.piece.rows)
            sums[ref.key] = AdapterSums(a.detach().to(wide, copy=True), b.detach().to(wide, copy=True), base)
        else:
            sums[ref.key] = AdapterSums(before.lora_a + a, before.lora_b + b, before.base)
    return sums


@torch.no_grad()
def weights_of_sums(
    layers: Mapping[str, AdaptedLinear], refs: Sequence[AdapterRef], sums: Mapping[str, AdapterSums]
) -> dict[str, Updates]:
    """By layer: what to write so that its base weight becomes W0 + s (sum B)(sum A)."""
    new = {layer: layer.base_weight.detach().clone() for layer in layers.values()}
    for ref in refs:
        own = sums[ref.key]
        delta = (own.lora_b * ref.piece.scaling) @ own.lora_a
        put_rows(new[ref.layer], ref.piece.rows, (own.base.to(delta.dtype) + delta).to(own.base.dtype))
    return {name: layer.weight_updates(new[layer]) for name, layer in layers.items()}


def consolidate(
    state: EWCState,
    placement: Placement,
    *,
    gamma: float,
    update: str,
    merge_mode: str,
    fisher_dtype: torch.dtype,
    check_finite: bool,
    generator: torch.Generator | None,
) -> EWCState:
    """The state after the task; weights, Fishers and adapters are updated in place, all of them or none."""
    task = state.task
    if task is None:
        raise FisherError(
            "consolidate: this task has no Fisher yet; call estimate_fisher(loader, loss_fn) first"
        )
    if task.samples == 0:
        raise FisherError(
            "consolidate: the Fisher of this task has no samples; call reduce_fisher_ where other processes "
            "have some, or estimate_fisher with a loader that is not empty"
        )
    refs = placement.refs
    fishers = {
        ref.key: new_fisher(state.fishers.get(ref.key), task, ref.key, gamma, update, fisher_dtype)
        for ref in refs
    }
    if merge_mode == "factors":
        _check_one_scale(refs)
        sums = new_sums(refs, state.sums)
        weights = weights_of_sums(placement.layers, refs, sums)
    else:
        sums, weights = {}, placement.new_weights()
    record = TaskRecord("+".join(task.labels), task.samples, task.batch_size, gamma)
    with folding(
        placement.layers,
        weights,
        action="consolidate",
        error=FisherError,
        agree=placement.agree,
        others={f"Fisher of {key}": fisher for key, fisher in fishers.items()},
        finite=check_finite,
    ) as change:
        for key, old in state.fishers.items():
            change.copy_(old, fishers[key])
        placement.reset_adapters(change, generator)
    return EWCState(state.fishers or fishers, sums, (*state.history, record), None)


def _check_one_scale(refs: Sequence[AdapterRef]) -> None:
    for ref in refs:
        if isinstance(ref.layer.adapter_scale(ref.piece), Tensor):
            raise ArgumentError(
                f"merge_mode: 'factors' has one scale for the sums of all tasks, but {ref.key} has a "
                "lora_scale; use 'delta'"
            )
