# SPDX-License-Identifier: Apache-2.0
"""The saved state of `SDLoRA`, and the check of one before any of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from reprlib import repr as shown  # of values that anybody may have written: short, and not too deep
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..layers.adapted import AdaptedLinear
from ..layers.slices import AdapterSlice, same_weights
from ._directions import Directions, suffix_of

FORMAT = 1
Adapters = Sequence[tuple[str, AdaptedLinear, AdapterSlice]]


@dataclass(frozen=True)
class Outcome:
    """What became of the direction of one task in one adapter."""

    residual: float  # share of its squared length outside of the span of the earlier directions
    kept: bool


@dataclass(frozen=True)
class Parsed:
    """A checked state; directions in the order of the adapters."""

    directions: list[Directions]
    outcomes: dict[str, list[Outcome]]
    tasks: int
    running: bool


def dump(
    adapters: Adapters, outcomes: Mapping[str, list[Outcome]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Tensors by name, and plain values under "config"."""
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for key, layer, piece in adapters:
        now = Directions.of(layer, piece)
        tensors |= {f"{key}.{field.name}": getattr(now, field.name).detach() for field in fields(now)}
        described[key] = {
            "fingerprint": layer.origin_fingerprint,
            "outcomes": [asdict(outcome) for outcome in outcomes[key]],
        }
    return {"tensors": tensors, "config": {"format": FORMAT, **settings, "adapters": described}}


def parse(saved: Any, adapters: Adapters, normalization: str, magnitudes: str) -> Parsed:
    """The state that `dump` wrote, its tensors copied to the devices of the adapters; raises
    `CheckpointError` naming what does not fit."""
    tensors, config = (saved.get(k) if isinstance(saved, Mapping) else None for k in ("tensors", "config"))
    if not isinstance(tensors, Mapping) or not isinstance(config, Mapping):
        raise _error("expected the dictionary that state_dict() returns, with 'tensors' and 'config'")
    # States of earlier versions do not name the kind of their magnitudes.
    settings = {"magnitudes": "per_adapter", **config}
    for name, expected in (
        ("format", FORMAT),
        ("normalization", normalization),
        ("magnitudes", magnitudes),
    ):
        if type(settings.get(name)) is not type(expected) or settings[name] != expected:
            raise _error(f"{name}: expected {expected!r}, got {shown(settings.get(name))}")
    tasks, running, described = (config.get(k) for k in ("tasks", "running", "adapters"))
    if type(tasks) is not int or tasks < 0 or type(running) is not bool or not isinstance(described, Mapping):
        raise _error(
            f"expected a number of tasks and a table of adapters, got {shown(tasks)}, {shown(running)}"
        )
    keys = [key for key, _, _ in adapters]
    if different := sorted(set(keys) ^ set(map(str, described))):
        where = "the state" if different[0] in described else "the model"
        raise _error(f"{different[0]}: adapted in {where} only")
    directions, outcomes = [], {}
    for key, layer, piece in adapters:
        entry = described[key] if isinstance(described[key], Mapping) else {}
        if not same_weights(entry.get("fingerprint"), layer.origin_fingerprint):
            raise _error(f"{key}: the state belongs to other base weights")
        directions.append(_directions(tensors, key, layer, piece))
        outcomes[key] = _outcomes(entry.get("outcomes"), key)
        kept = sum(outcome.kept for outcome in outcomes[key])
        if len(outcomes[key]) != tasks or kept != directions[-1].lora_anchor.shape[0]:
            raise _error(
                f"{key}: expected an outcome for each of {tasks} tasks, and a direction if it was kept"
            )
        if magnitudes == "shared" and not _equal(directions[-1], directions[0]):
            raise _error(f"{key}.lora_magnitudes: expected the same values as of {keys[0]}, which share them")
    return Parsed(directions, outcomes, tasks, running)


def _equal(one: Directions, other: Directions) -> bool:
    return torch.equal(one.lora_magnitudes.cpu().double(), other.lora_magnitudes.cpu().double())


def _outcomes(saved: Any, key: str) -> list[Outcome]:
    outcomes = []
    for entry in saved if isinstance(saved, list) else [None]:
        values = entry if isinstance(entry, Mapping) else {}
        residual, kept = values.get("residual"), values.get("kept")
        if not isinstance(residual, float) or not isinstance(kept, bool):
            raise _error(f"{key}: expected a list of outcomes of tasks, got an entry {shown(entry)}")
        outcomes.append(Outcome(residual, kept))
    return outcomes


def _directions(
    tensors: Mapping[str, Tensor], key: str, layer: AdaptedLinear, piece: AdapterSlice
) -> Directions:
    values: dict[str, Tensor] = {}
    like = layer._parameters["lora_A" + suffix_of(piece)]
    assert like is not None
    for field in fields(Directions):
        value = tensors.get(f"{key}.{field.name}")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise _error(f"{key}.{field.name}: expected a floating-point tensor, got {type(value).__name__}")
        values[field.name] = value.detach().to(like.device, like.dtype, copy=True)
    r, past, count = (_length(values[name]) for name in ("lora_A", "lora_past_A", "lora_anchor"))
    rows, columns = piece.row_count, layer.in_features
    shapes = {
        "lora_A": (max(r, 1), columns),
        "lora_B": (rows, r),
        "lora_magnitudes": (count + 1,),
        "lora_past_A": (past, columns),
        "lora_past_B": (rows, past),
        "lora_past_scale": (past, count),
        "lora_anchor": (count,),
    }
    for name, shape in shapes.items():
        if tuple(values[name].shape) != shape:
            raise _error(f"{key}.{name}: expected shape {list(shape)}, got {list(values[name].shape)}")
        if not bool(torch.isfinite(values[name]).all()):
            raise _error(f"{key}.{name}: expected finite values, got NaN or Inf")
    return Directions(**values)


def _length(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 0


def _error(message: str) -> CheckpointError:
    return CheckpointError(f"state: {message}. Nothing was loaded")
