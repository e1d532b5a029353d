# SPDX-License-Identifier: Apache-2.0
"""The state of an EWC controller, and the check of a saved one before any of it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from reprlib import repr as shown  # of values that anybody may have written: short, and not too deep
from typing import Any

import torch
from torch import Tensor

from ..distributed.transaction import canonical_name
from ..errors import FisherError
from ..fishers import EightBitFisher
from ..layers.finite import nonfinite
from .structures import Extent, Parts, Structure, part_key, split_key

FORMAT = 1  # of state_dict
NO_LABELS = "none"  # of a task that adds nothing to a fixed Fisher
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class TaskFisher:
    """The Fisher of the current task so far: unnormalised sums by Fisher key and part, and how they were
    made; packed as `Structure.packed` does or as they were added up."""

    buffers: dict[str, Tensor]
    samples: int
    batch_size: int
    labels: tuple[str, ...]
    packed: bool = False

    def plus(self, other: TaskFisher) -> TaskFisher:
        """The sum with an earlier pass, in the buffers of this one."""
        torch._foreach_add_(list(self.buffers.values()), [other.buffers[key] for key in self.buffers])
        labels = tuple(dict.fromkeys((*other.labels, *self.labels)))
        return TaskFisher(
            self.buffers, self.samples + other.samples, max(self.batch_size, other.batch_size), labels
        )


@dataclass(frozen=True)
class TaskRecord:
    """How the Fisher of one consolidated task was made."""

    labels: str
    samples: int
    batch_size: int
    gamma: float
    error: float = 0.0  # relative, of joining it to earlier tasks in the structure of the Fisher
    prior: bool = False  # of data before the first task, which trained nothing


@dataclass(frozen=True)
class AdapterSums:
    """merge_mode "factors": W = base + s (sum B)(sum A), where base has the rows of W before all tasks."""

    lora_a: Tensor
    lora_b: Tensor
    base: Tensor


def by_fisher(tensors: Mapping[str, Tensor]) -> dict[str, Parts]:
    """The parts of each Fisher."""
    grouped: dict[str, Parts] = {}
    for name, tensor in tensors.items():
        key, part = split_key(name)
        grouped.setdefault(key, {})[part] = tensor
    return grouped


def flat(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The inverse of `by_fisher`."""
    return {part_key(key, part): tensor for key, own in parts.items() for part, tensor in own.items()}


def stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A part of a Fisher as it is kept: numbers in `dtype`, codes as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def numbers_in(fishers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Kept parts as numbers of which all have to be finite: of codes their scales."""
    return {
        name: t if t.is_floating_point() else EightBitFisher(t, 0).scales() for name, t in fishers.items()
    }


def as_packed(tensor: Tensor) -> Tensor:
    """Packed sums, as they are."""
    return tensor


def wide(tensor: Tensor) -> Tensor:
    """Sums of a task, in fp32 or fp64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True)
class EWCState:
    """What an EWC keeps between tasks. It is replaced as a whole, so that it is never half updated; only the
    cumulative Fishers in it are updated in place. Fishers are by key and part (`structures.part_key`)."""

    fishers: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, AdapterSums] = field(default_factory=dict)
    history: tuple[TaskRecord, ...] = ()
    task: TaskFisher | None = None

    def copied(self, devices: Mapping[str, torch.device], dtype: torch.dtype) -> EWCState:
        """A copy with the Fishers in `dtype` (codes as they are), on these devices and in their order."""

        def put(tensor: Tensor, key: str) -> Tensor:
            return tensor.detach().to(devices[key], copy=True)

        def moved(tensors: dict[str, Tensor], kept: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
            grouped = by_fisher(tensors)
            return flat(
                {k: {part: kept(put(t, k)) for part, t in grouped[k].items()} for k in devices if grouped}
            )

        fishers = moved(self.fishers, lambda tensor: stored(tensor, dtype))
        sums = {
            key: AdapterSums(*(put(tensor, key) for tensor in (own.lora_a, own.lora_b, own.base)))
            for key, own in self.sums.items()
        }
        task = self.task
        if task is not None:
            task = replace(task, buffers=moved(task.buffers, as_packed if task.packed else wide))
        return EWCState(fishers, sums, self.history, task)

    def moved(self, devices: Mapping[str, torch.device], dtype: torch.dtype) -> EWCState:
        """This state where all Fishers are on these devices already, else a copy there."""
        tensors = self.fishers if self.task is None else {**self.task.buffers, **self.fishers}
        placed = all(tensor.device == devices[split_key(name)[0]] for name, tensor in tensors.items())
        return self if placed else self.copied(devices, dtype)

    def mapped_by_key(self, convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> EWCState:
        """The state with `convert` applied to its tables of Fishers, the cumulative ones and those of the
        current task."""
        task = self.task
        if task is not None:
            task = replace(task, buffers=convert(task.buffers))
        return replace(self, fishers=convert(self.fishers), task=task)


@dataclass(frozen=True)
class Expected:
    """What a state must look like to fit a controller; shapes are (rows, rank, columns) per Fisher key."""

    shapes: dict[str, tuple[int, int, int]]
    settings: dict[str, str]
    check_finite: bool
    structure: Structure
    # Of the Fisher with so many rows and columns, the rows of this process.
    extent: Callable[[int, int], Extent] = Extent.whole


def dump(state: EWCState, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The state as a dictionary: tensors by name, and plain numbers and strings under "config"."""
    tensors: dict[str, Tensor] = {f"fisher.{key}": tensor for key, tensor in state.fishers.items()}
    for key, own in state.sums.items():
        tensors |= {f"sum_A.{key}": own.lora_a, f"sum_B.{key}": own.lora_b, f"base.{key}": own.base}
    config: dict[str, Any] = {
        "format": FORMAT,
        **settings,
        "history": [asdict(record) for record in state.history],
    }
    if state.task is not None:
        tensors |= {f"task.{key}": tensor for key, tensor in state.task.buffers.items()}
        config["task"] = {k: getattr(state.task, k) for k in ("samples", "batch_size")} | {
            "labels": list(state.task.labels)
        }
        if state.task.packed:
            config["task"]["packed"] = True
    return {"tensors": tensors, "config": config}


def parse(saved: Any, expected: Expected) -> EWCState:
    """The state that `dump` wrote; raises `FisherError` naming what does not fit. Tensors are shared with
    `saved`."""
    tensors, config = (saved.get(k) if isinstance(saved, Mapping) else None for k in ("tensors", "config"))
    if not isinstance(tensors, Mapping) or not isinstance(config, Mapping):
        raise FisherError(
            "state: expected the dictionary that EWC.state_dict() returns, with 'tensors' and 'config'"
        )
    if type(config.get("format")) is not int or config["format"] != FORMAT:
        raise FisherError(f"state: expected format {FORMAT}, got {shown(config.get('format'))}")
    for name, value in expected.settings.items():
        saved_value = config.get(name, "dense" if name == "fisher" else None)  # earlier versions had no other
        if not isinstance(saved_value, str) or saved_value != value:
            if name == "fisher":
                raise FisherError(
                    f"fisher: the state has the structure {shown(saved_value)}, this EWC has {value!r}; load "
                    "it into an EWC with that structure, and convert it there: ewc.convert_fisher_"
                )
            raise FisherError(
                f"{name}: the state was made with {shown(saved_value)}, this EWC has {value!r}; construct "
                "it with the same (ewc_lambda means nothing without it, see convert_lambda)"
            )
    grouped = _group(tensors)
    history = tuple(_record(entry) for entry in _list(config, "history"))
    task = _task(config.get("task"), grouped.get("task", {}), expected)
    fishers = grouped.get("fisher", {})
    if fishers or history:
        _check_fishers("fisher", fishers, expected)
    if bool(fishers) != bool(history):
        raise FisherError(
            "state: expected a Fisher exactly when tasks were consolidated; fisher and history disagree"
        )
    trained = any(not record.prior for record in history)
    return EWCState(fishers, _sums(grouped, trained, expected), history, task)


def _group(tensors: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, key = str(name).partition(".")
        if kind not in ("fisher", "task", "sum_A", "sum_B", "base") or not isinstance(tensor, Tensor):
            raise FisherError(f"state: did not expect an entry {shown(name)} of type {type(tensor).__name__}")
        group, key = grouped.setdefault(kind, {}), canonical_name(key)
        if key in group:
            raise FisherError(f"state: expected one {kind} of {key}, got two with different prefixes")
        group[key] = tensor
    return grouped


def _check_group(
    kind: str,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    expected: Expected,
    codes: Collection[str] = (),
) -> None:
    missing, foreign = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    if missing or foreign:
        raise FisherError(
            f"state: {kind} of other adapters than the model's; missing {missing[:3]}, unexpected "
            f"{foreign[:3]}"
        )
    for key, shape in shapes.items():
        tensor = tensors[key]
        allowed = (torch.uint8,) if key in codes else _DTYPES
        usable = tensor.dtype in allowed and tensor.layout == torch.strided and not tensor.is_meta
        if tuple(tensor.shape) != shape or not usable:
            got = f"{list(tensor.shape)} {tensor.dtype}, {tensor.layout}, on {tensor.device}"
            sort = "8-bit codes" if key in codes else "a floating-point"
            raise FisherError(f"state: {kind} of {key}: expected {sort} {list(shape)}, got {got}")
    if expected.check_finite and (bad := nonfinite(numbers_in(tensors) if codes else tensors)):
        raise FisherError(f"state: {kind} of {bad[0]}: expected finite values, got NaN or Inf")


def _check_fishers(
    kind: str, tensors: Mapping[str, Tensor], expected: Expected, packed: bool = False
) -> None:
    """The kept parts ("fisher") or the sums of a task ("task"), as they are or packed, of all Fishers."""
    structure, kept = expected.structure, kind == "fisher"
    shapes_of = structure.kept_shapes if kept else structure.sum_shapes
    shapes_of = structure.packed_shapes if packed else shapes_of
    extents = {key: expected.extent(rows, columns) for key, (rows, _, columns) in expected.shapes.items()}
    shapes = {
        part_key(key, part): shape
        for key, extent in extents.items()
        for part, shape in shapes_of(extent).items()
    }
    codes = {name for name in shapes if (kept or packed) and split_key(name)[1] in structure.codes}
    _check_group(kind, tensors, shapes, expected, codes)
    for key, parts in by_fisher(tensors).items():
        coded = kept or bool(codes)
        for part, values in structure.numbers(parts, extents[key]).items() if coded else parts.items():
            name = part_key(key, part)
            if (kept or not part) and bool((values < 0).any()):
                raise FisherError(f"state: {kind} of {name}: expected squares, got negative values")


def _sums(
    grouped: Mapping[str, dict[str, Tensor]], trained: bool, expected: Expected
) -> dict[str, AdapterSums]:
    if expected.settings["merge_mode"] != "factors" or not trained:
        if unexpected := sorted({"sum_A", "sum_B", "base"} & set(grouped)):
            raise FisherError(
                f"state: did not expect {unexpected}, which only merge_mode='factors' has, after its first "
                "task"
            )
        return {}
    shapes = expected.shapes
    parts = {kind: grouped.get(kind, {}) for kind in ("sum_A", "sum_B", "base")}
    _check_group(
        "sum_A", parts["sum_A"], {k: (rank, cols) for k, (_, rank, cols) in shapes.items()}, expected
    )
    _check_group(
        "sum_B", parts["sum_B"], {k: (rows, rank) for k, (rows, rank, _) in shapes.items()}, expected
    )
    _check_group("base", parts["base"], {k: (rows, cols) for k, (rows, _, cols) in shapes.items()}, expected)
    return {key: AdapterSums(parts["sum_A"][key], parts["sum_B"][key], parts["base"][key]) for key in shapes}


def _task(config: Any, buffers: dict[str, Tensor], expected: Expected) -> TaskFisher | None:
    if config is None:
        if buffers:
            raise FisherError("state: buffers of a task without its record")
        return None
    packed = config.get("packed", False) if isinstance(config, Mapping) else False
    if not isinstance(packed, bool):
        raise FisherError(f"state: expected True or False for packed, got {shown(packed)}")
    _check_fishers("task", buffers, expected, packed)
    labels = _list(config, "labels")
    if wrong := [label for label in labels if not isinstance(label, str)]:
        raise FisherError(f"state: expected labels to be strings, got {shown(wrong[0])}")
    # A process whose loader was empty has no samples of its own.
    counts = _count(config, "samples", 0), _count(config, "batch_size", 0)
    return TaskFisher(buffers, *counts, tuple(labels), packed)


def _record(entry: Any) -> TaskRecord:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("labels"), str):
        raise FisherError(f"state: expected a record of a task, got {shown(entry)}")
    gamma = entry.get("gamma")
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 <= gamma <= 1:
        raise FisherError(f"state: expected gamma in [0, 1] in the record of a task, got {shown(gamma)}")
    error = entry.get("error", 0.0)
    if isinstance(error, bool) or not isinstance(error, (int, float)) or not 0.0 <= error <= 1.0:
        raise FisherError(f"state: expected an error in [0, 1] in the record of a task, got {shown(error)}")
    prior = entry.get("prior", False)  # earlier versions had none
    if not isinstance(prior, bool):
        raise FisherError(f"state: expected True or False for prior in a record, got {shown(prior)}")
    least = 0 if entry["labels"] == NO_LABELS else 1
    counts = _count(entry, "samples", least), _count(entry, "batch_size", least)
    return TaskRecord(entry["labels"], *counts, float(gamma), float(error), prior)


def _count(entry: Any, name: str, least: int = 1) -> int:
    value = entry.get(name) if isinstance(entry, Mapping) else None
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
        raise FisherError(f"state: expected an integer >= {least} of 64 bits for {name}, got {shown(value)}")
    return value


def _list(config: Mapping[str, Any], name: str) -> list[Any]:
    value = config.get(name) if isinstance(config, Mapping) else None
    if not isinstance(value, list):
        raise FisherError(f"state: expected a list for {name}, got {shown(value)}")
    return value
