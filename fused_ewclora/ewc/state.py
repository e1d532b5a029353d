"""The state of an EWC controller, and the check of a saved one before any of it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from reprlib import repr as shown  # of values that anybody may have written: short, and not too deep
from typing import Any

import torch
from torch import Tensor

from ..distributed.transaction import canonical_name
from ..errors import FisherError
from ..layers.finite import nonfinite

FORMAT = 1  # of state_dict
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class TaskFisher:
    """The Fisher of the current task so far: unnormalised sums by Fisher key, and how they were made."""

    buffers: dict[str, Tensor]
    samples: int
    batch_size: int
    labels: tuple[str, ...]

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


@dataclass(frozen=True)
class AdapterSums:
    """merge_mode "factors": W = base + s (sum B)(sum A), where base has the rows of W before all tasks."""

    lora_a: Tensor
    lora_b: Tensor
    base: Tensor


@dataclass(frozen=True)
class EWCState:
    """What an EWC keeps between tasks. It is replaced as a whole, so that it is never half updated; only the
    cumulative Fishers in it are updated in place."""

    fishers: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, AdapterSums] = field(default_factory=dict)
    history: tuple[TaskRecord, ...] = ()
    task: TaskFisher | None = None

    def copied(self, devices: Mapping[str, torch.device], dtype: torch.dtype) -> EWCState:
        """A copy with the Fishers in `dtype`, on these devices and in their order."""

        def put(tensor: Tensor, key: str) -> Tensor:
            return tensor.detach().to(devices[key], copy=True)

        fishers = {key: put(self.fishers[key], key).to(dtype) for key in devices if self.fishers}
        sums = {
            key: AdapterSums(*(put(tensor, key) for tensor in (own.lora_a, own.lora_b, own.base)))
            for key, own in self.sums.items()
        }
        task = self.task
        if task is not None:
            buffers = {
                key: put(task.buffers[key], key).to(
                    torch.promote_types(task.buffers[key].dtype, torch.float32)
                )
                for key in devices
            }
            task = TaskFisher(buffers, task.samples, task.batch_size, task.labels)
        return EWCState(fishers, sums, self.history, task)

    def moved(self, devices: Mapping[str, torch.device], dtype: torch.dtype) -> EWCState:
        """This state where all Fishers are on these devices already, else a copy there."""
        tensors = self.fishers if self.task is None else {**self.task.buffers, **self.fishers}
        placed = all(tensor.device == devices[key] for key, tensor in tensors.items())
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
        if not isinstance(saved_value := config.get(name), str) or saved_value != value:
            raise FisherError(
                f"{name}: the state was made with {shown(saved_value)}, this EWC has {value!r}; construct "
                "it with the same (ewc_lambda means nothing without it, see convert_lambda)"
            )
    grouped = _group(tensors)
    history = tuple(_record(entry) for entry in _list(config, "history"))
    task = _task(config.get("task"), grouped.get("task", {}), expected)
    fishers = grouped.get("fisher", {})
    if fishers or history:
        _check_group(
            "fisher", fishers, {k: (rows, cols) for k, (rows, _, cols) in expected.shapes.items()}, expected
        )
    if bool(fishers) != bool(history):
        raise FisherError(
            "state: expected a Fisher exactly when tasks were consolidated; fisher and history disagree"
        )
    return EWCState(fishers, _sums(grouped, bool(history), expected), history, task)


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
    kind: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], expected: Expected
) -> None:
    missing, foreign = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    if missing or foreign:
        raise FisherError(
            f"state: {kind} of other adapters than the model's; missing {missing[:3]}, unexpected "
            f"{foreign[:3]}"
        )
    for key, shape in shapes.items():
        tensor = tensors[key]
        usable = tensor.dtype in _DTYPES and tensor.layout == torch.strided and not tensor.is_meta
        if tuple(tensor.shape) != shape or not usable:
            got = f"{list(tensor.shape)} {tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise FisherError(f"state: {kind} of {key}: expected a floating-point {list(shape)}, got {got}")
    if expected.check_finite and (bad := nonfinite(tensors)):
        raise FisherError(f"state: {kind} of {bad[0]}: expected finite values, got NaN or Inf")
    if kind in ("fisher", "task") and (
        negative := [key for key, tensor in tensors.items() if bool((tensor < 0).any())]
    ):
        raise FisherError(f"state: {kind} of {negative[0]}: expected squares, got negative values")


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
    _check_group(
        "task", buffers, {k: (rows, cols) for k, (rows, _, cols) in expected.shapes.items()}, expected
    )
    labels = _list(config, "labels")
    if wrong := [label for label in labels if not isinstance(label, str)]:
        raise FisherError(f"state: expected labels to be strings, got {shown(wrong[0])}")
    # A process whose loader was empty has no samples of its own.
    return TaskFisher(buffers, _count(config, "samples", 0), _count(config, "batch_size", 0), tuple(labels))


def _record(entry: Any) -> TaskRecord:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("labels"), str):
        raise FisherError(f"state: expected a record of a task, got {shown(entry)}")
    gamma = entry.get("gamma")
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 <= gamma <= 1:
        raise FisherError(f"state: expected gamma in [0, 1] in the record of a task, got {shown(gamma)}")
    return TaskRecord(entry["labels"], _count(entry, "samples"), _count(entry, "batch_size"), float(gamma))


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
