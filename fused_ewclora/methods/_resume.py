# SPDX-License-Identifier: Apache-2.0
"""The state that a method saves between tasks beside the model's own state_dict, and the check of a saved one
before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..distributed.transaction import canonical_name
from ..errors import ArgumentError, CheckpointError
from .method import Method

FORMAT = 1


def between_tasks(method: Method, what: str) -> None:
    """Raises `ArgumentError` during a task, when adapters may have any rank, and after `export`."""
    method._check_not_exported(what)
    if method._running:
        raise ArgumentError(f"{what}: task {method.tasks} has not ended; call end_task first")


def dump(method: Method, tensors: Mapping[str, Tensor], **config: Any) -> dict[str, Any]:
    """{"tensors", "config"}: the second holds plain numbers and strings. Tensors are not copied."""
    between_tasks(method, "state_dict")
    counts = {canonical_name(name): layer.consolidated_tasks for name, layer in method.layers.items()}
    head = {"format": FORMAT, "method": type(method).__name__, "tasks": method.tasks, "layers": counts}
    return {"tensors": dict(tensors), "config": {**head, **config}}


def parse(method: Method, saved: Any, **same: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The two parts of what `dump` made for such a method and model, with these settings; raises
    `CheckpointError`."""
    between_tasks(method, "load_state_dict")
    try:
        tensors, config = dict(saved["tensors"]), dict(saved["config"])
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            "state: expected the dictionary that state_dict() returns, with 'tensors' and 'config'"
        ) from error
    for name, expected in (("format", FORMAT), ("method", type(method).__name__)):
        if config.get(name) != expected:
            raise CheckpointError(f"state: {name}: expected {expected!r}, got {config.get(name)!r}")
    counts = config.get("layers")
    ours = {canonical_name(name) for name in method.layers}
    if not isinstance(counts, Mapping) or set(counts) != ours:
        theirs = sorted(counts)[:3] if isinstance(counts, Mapping) else counts
        raise CheckpointError(f"state: layers: expected those of the model, {sorted(ours)[:3]}, got {theirs}")
    for name, value in (("tasks", config.get("tasks")), *counts.items()):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise CheckpointError(f"state: {name}: expected a number of tasks, got {value!r}")
    for name, ours_of in same.items():
        if config.get(name) != ours_of:
            raise CheckpointError(
                f"state: {name}: it was made with {config.get(name)!r}, this {type(method).__name__} has "
                f"{ours_of!r}"
            )
    return tensors, config


def take_over(method: Method, config: Mapping[str, Any]) -> None:
    """Loads the numbers of tasks from a checked state; it cannot fail."""
    method.tasks = config["tasks"]
    for name, layer in method.layers.items():
        layer.consolidated_tasks = config["layers"][canonical_name(name)]
