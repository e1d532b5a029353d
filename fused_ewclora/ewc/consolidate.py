# SPDX-License-Identifier: Apache-2.0
"""The new state of `EWC` at the end of a task (docs/mathematics.md, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import ArgumentError, FisherError
from ..layers.adapted import AdaptedLinear, Updates
from ..layers.finite import check_finite
from ..layers.index import AdapterRef, put_rows, take_rows
from ..layers.watch import local
from .fold import folding
from .packing import Packing
from .placement import Placement
from .state import NO_LABELS, AdapterSums, EWCState, TaskFisher, TaskRecord, by_fisher, numbers_in, stored
from .structures import Structure, Weights, part_key


@torch.no_grad()
def new_fishers(
    state: EWCState,
    task: TaskFisher,
    placement: Placement,
    structure: Structure,
    gamma: float,
    update: str,
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], float]:
    """gamma F + F_task ("sum") or gamma F + (1 - gamma) F_task ("convex"), F_task = sums / samples, with one
    rounding to `dtype`, and the largest relative error of joining them in the structure.

    gamma = 0 copies F_task, so that an Inf in the old F does not survive as 0 * Inf; so does the first task.
    """
    old, new, largest = by_fisher(state.fishers), by_fisher(task.buffers), 0.0
    share = 1.0 - gamma if update == "convex" and old and gamma != 0.0 else 1.0
    weights = Weights(gamma if old else 0.0, share, task.samples, len(state.history), placement.over_rows)
    packing = Packing(placement, structure, dtype, len(state.history))
    fishers: dict[str, Tensor] = {}
    for ref in placement.refs:
        extent = placement.extent(ref.piece.row_count, ref.layer.in_features)
        parts, error = structure.joined(
            old.get(ref.key), packing.sums(task, new[ref.key], ref), weights, extent
        )
        fishers |= {part_key(ref.key, part): stored(tensor, dtype) for part, tensor in parts.items()}
        largest = max(largest, error)
    return fishers, largest


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
    structure: Structure,
    *,
    gamma: float,
    update: str,
    merge_mode: str,
    fisher_dtype: torch.dtype,
    check_finite: bool,
    generator: torch.Generator | None,
) -> EWCState:
    """The state after the task; weights, Fishers and adapters are updated in place, all of them or none."""
    refs = placement.refs
    if update == "fixed" and state.fishers:
        fishers, record = state.fishers, TaskRecord(NO_LABELS, 0, 0, gamma)
    else:
        task = gathered(state, "consolidate")
        fishers, error = new_fishers(state, task, placement, structure, gamma, update, fisher_dtype)
        record = _record(task, gamma, error)
    if merge_mode == "factors":
        _check_one_scale(refs)
        sums = new_sums(refs, state.sums)
        weights = weights_of_sums(placement.layers, refs, sums)
    else:
        sums, weights = {}, placement.new_weights()
    with folding(
        placement.layers,
        weights,
        action="consolidate",
        error=FisherError,
        agree=placement.agree,
        others={f"Fisher of {name}": tensor for name, tensor in numbers_in(fishers).items()},
        finite=check_finite,
    ) as change:
        for key, old in state.fishers.items():
            if old is not fishers[key]:
                change.copy_(old, fishers[key])
        placement.reset_adapters(change, generator)
    return EWCState(state.fishers or fishers, sums, (*state.history, record), None)


def consolidate_prior(
    state: EWCState,
    placement: Placement,
    structure: Structure,
    fisher_dtype: torch.dtype,
    check: bool,
) -> EWCState:
    """The state before the first task, with the Fisher that was gathered as that of all earlier ones; weights
    and adapters stay as they are. check: refuse values that are not finite."""
    if state.history:
        raise FisherError(
            f"consolidate_prior: expected no Fisher before it, found {len(state.history)}; the prior comes "
            "before the first task"
        )
    task = gathered(state, "consolidate_prior")
    if placement.any(any(bool(local(ref.parameters()[1]).any()) for ref in placement.refs)):
        raise FisherError(
            "consolidate_prior: expected untrained adapters (lora_B = 0), with which the Fisher is that of "
            "the pretrained weights, found trained ones"
        )
    fishers, error = new_fishers(state, task, placement, structure, 1.0, "sum", fisher_dtype)
    if check:
        named = {f"Fisher of {name}": tensor for name, tensor in numbers_in(fishers).items()}
        placement.agree(lambda: check_finite(named, "consolidate_prior", FisherError))
    return EWCState(fishers, {}, (replace(_record(task, 1.0, error), prior=True),))


def gathered(state: EWCState, action: str) -> TaskFisher:
    """The Fisher of the task; raises `FisherError` without one, or without samples."""
    task = state.task
    if task is None:
        raise FisherError(
            f"{action}: this task has no Fisher yet; call estimate_fisher(loader, loss_fn) first"
        )
    if task.samples == 0:
        raise FisherError(
            f"{action}: the Fisher of this task has no samples; call reduce_fisher_ where other processes "
            "have some, or estimate_fisher with a loader that is not empty"
        )
    return task


def _record(task: TaskFisher, gamma: float, error: float) -> TaskRecord:
    return TaskRecord("+".join(task.labels), task.samples, task.batch_size, gamma, error)


def _check_one_scale(refs: Sequence[AdapterRef]) -> None:
    for ref in refs:
        if isinstance(ref.layer.adapter_scale(ref.piece), Tensor):
            raise ArgumentError(
                f"merge_mode: 'factors' has one scale for the sums of all tasks, but {ref.key} has a "
                "lora_scale; use 'delta'"
            )
