# SPDX-License-Identifier: Apache-2.0
"""Configurations of runs: JSON files with the problem, the adapters, the training and the methods."""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

import fused_ewclora as fe
from fused_ewclora import methods
from fused_ewclora.errors import ArgumentError

from . import protocols
from .dotted import named

FOLDER = Path(__file__).parent / "configurations"
METHODS: dict[str, type[methods.Method]] = {
    name: getattr(methods, name) for name in methods.__all__ if name != "Method"
}
OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("constant", "cosine", "quarter-cosine", "multistep", "one-cycle")
LATER = ("evaluate_before_end", "first_lr", "first_head_lr", "epochs_by_task", "passes_drop_last")
_KEYS = {"name", "about", "problem", "adapters", "training", "seeds", "methods"}
_OPTIONAL = {"protocol", "quick", "development"}
_OF_METHOD = {"options", "adapters", "training", "protocol", "seeds", "grid"}


@dataclass(frozen=True)
class Training:
    """How one task is trained.

    lr is the rate of the adapters, head_lr that of the newest head; first_lr and first_head_lr, if set, are
    those of the first task. epochs_by_task, if set, has the epochs of every task. iterations, if set, is the
    number of steps of a task of any size, instead of epochs. schedule: "cosine" to 0, "quarter-cosine",
    the first quarter of one, to 0.016, and "multistep" (times decay at each of milestones) change rates after
    every epoch; cosines after every step where iterations are set, and "one-cycle", the OneCycleLR of PyTorch
    up to lr and head_lr, always. fisher_batch_size is that of the passes over the data before and after a
    task; None: batch_size; passes_drop_last leaves out their last batch where it is smaller. Accuracies are
    taken after the task has ended, or before, with the adapters not yet merged (evaluate_before_end).
    """

    lr: float
    head_lr: float
    epochs: int = 5
    iterations: int | None = None
    batch_size: int = 32
    optimizer: str = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()
    decay: float = 0.1
    fisher_batch_size: int | None = None
    test_batch_size: int = 500
    workers: int = 0
    evaluate_before_end: bool = False
    first_lr: float | None = None
    first_head_lr: float | None = None
    epochs_by_task: tuple[int, ...] = ()
    passes_drop_last: bool = False

    @property
    def rates_by_step(self) -> bool:
        """Whether rates change after every step, not after every epoch."""
        return self.iterations is not None or self.schedule == "one-cycle"

    def of_task(self, number: int) -> Training:
        """How task `number`, counted from 0, is trained."""
        lr, head_lr, epochs = self.lr, self.head_lr, self.epochs
        if number == 0:
            lr = lr if self.first_lr is None else self.first_lr
            head_lr = head_lr if self.first_head_lr is None else self.first_head_lr
        if self.epochs_by_task:
            epochs = self.epochs_by_task[number]
        return replace(self, lr=lr, head_lr=head_lr, epochs=epochs)


@dataclass(frozen=True)
class Run:
    """Everything that decides one run: a method on a problem with a seed."""

    suite: str
    method: str  # as tables name it
    kind: str  # of METHODS, or "package.module:Class"
    seed: int
    problem: dict[str, Any]
    adapters: dict[str, Any] | list[dict[str, Any]]
    training: Training
    options: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)  # of `protocols.make`; empty: that of the kind

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as JSON would return them."""
        containers: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return containers

    def fingerprint(self) -> str:
        """Equal for runs that must give the same results."""
        return hashlib.sha256(json.dumps(decisive(self.to_dict()), sort_keys=True).encode()).hexdigest()[:16]

    def lora_configs(self) -> list[fe.LoRAConfig]:
        """The adapters, in the order in which they are injected."""
        groups = self.adapters if isinstance(self.adapters, list) else [self.adapters]
        return [_lora_config(group) for group in groups]


def decisive(run: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run, as `Run.to_dict` or a record has it, decides its results: names do not count, nor do
    settings that records from before them cannot have, as long as they are not set."""
    kept = {key: value for key, value in run.items() if key not in ("suite", "method")}
    kept["training"] = {k: v for k, v in run["training"].items() if v or k not in LATER}
    if not kept.get("protocol"):
        kept.pop("protocol", None)
    return kept


@dataclass(frozen=True)
class Configuration:
    """A file of `configurations/`, or one of the same form.

    Keys: "name", "about" (its source, and the differences from it), "problem" ("kind" and the
    keywords of its loader), "adapters" (keywords of `LoRAConfig`, and "segments", those of a packed
    projection whose layout is not registered; or a list of such objects for different layers), "training"
    (`Training`), "seeds", and "methods": a list of {"name", "kind", and optionally "options" of the method,
    "adapters", "training", "protocol", "seeds", which override those of the file}. "protocol", optional, is
    what a run does beside the calls of every method (`protocols.make`). A kind is one of `METHODS` or the
    dotted path "package.module:Class" of another `Method`; that of a problem is one of `problems.KINDS` or
    the path of a function. "quick", optional, defines a short version: the same keys with the changed values,
    and "methods", a list of names. "development", optional, is a list of seeds, on which every method is run
    with all values of its "grid", {"training.lr": [...], "options.ewc_lambda": [...]}; the file itself has
    those that were best (`development`).
    """

    name: str
    about: str
    runs: tuple[Run, ...]
    methods: tuple[str, ...]  # as the file names them


def method_class(kind: str) -> type[methods.Method]:
    """The class of a kind; raises `ArgumentError` for anything else."""
    if kind in METHODS:
        return METHODS[kind]
    if not isinstance(kind, str) or ":" not in kind:
        known = ", ".join(METHODS)
        raise ArgumentError(f'kind: expected one of {known} or "package.module:Class", got {kind!r}')
    found = named(kind, "kind")
    if not (isinstance(found, type) and issubclass(found, methods.Method)):
        raise ArgumentError(f"kind: {kind}: expected a subclass of methods.Method, got {found!r}")
    return found


def check_options(kind: str, options: Any) -> None:
    """Raises `ArgumentError` for options that the method would refuse, before anything is trained.

    They are tried on the smallest model; what a method demands of its layers shows on the real one.
    """
    _mapping(options, "options", set(), set(options) if isinstance(options, Mapping) else set())
    _try_options(kind, json.dumps(options))


@functools.cache  # many runs have the same options
def _try_options(kind: str, written: str) -> None:
    options = json.loads(written)
    method, tried = method_class(kind), [options]
    if "shared" in options:  # the names of layers
        tried = [{**options, "shared": ["0"]}]
    if isinstance(shares := options.get("epsilon_w"), Mapping):  # by names of layers
        tried = [{**options, "epsilon_w": share} for share in shares.values()]
    for values in tried:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        try:
            method(model, fe.LoRAConfig(r=1, target_modules=["0", "1"]), **values)
        except TypeError as error:
            raise ArgumentError(f"options: {error}") from error
        except fe.TargetError:
            pass


def available() -> list[str]:
    """Names of the configurations that come with the library."""
    return sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.json"))


def find(name: str) -> Path:
    """The file of a name in `available()`, or of a path."""
    inside = FOLDER / f"{name}.json"
    for path in (inside, Path(name)):
        if path.is_file():
            return path
    raise ArgumentError(f"suite: expected a file or one of {', '.join(available())}, got {name!r}")


def load(path: Path, quick: bool = False, develop: bool = False) -> Configuration:
    """Reads and checks a configuration, or its short version, or its runs on development seeds; raises
    `ArgumentError` that names the file and the error in it."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{path}: not readable as JSON: {error}") from error
    try:
        return parse(data, quick, develop)
    except ArgumentError as error:
        raise ArgumentError(f"{path}: {error}") from error


def parse(data: Any, quick: bool = False, develop: bool = False) -> Configuration:
    """The runs of a configuration; see `Configuration` for its form."""
    data = _mapping(data, "configuration", _KEYS, _OPTIONAL)
    entries = [
        _mapping(entry, f"methods[{number}]", {"name", "kind"}, _OF_METHOD)
        for number, entry in enumerate(data["methods"])
    ]
    data["methods"] = entries
    names = tuple(entry["name"] for entry in entries)
    for entry in entries:
        _check_grid(data, entry)
    if develop:
        data = _developed(data)
    if quick:
        data = _shortened(data)
    runs: list[Run] = []
    for entry in data["methods"]:
        where = f"methods: {entry['name']}"
        try:
            check_options(entry["kind"], entry.get("options", {}))
            protocol = _overridden_protocol(data.get("protocol", {}), entry.get("protocol", {}))
            protocols.make(entry["kind"], protocol)
        except ArgumentError as error:
            raise ArgumentError(f"{where}: {error}") from error
        for seed in entry.get("seeds", data["seeds"]):
            run = Run(
                suite=data["name"],
                method=entry["name"],
                kind=entry["kind"],
                seed=_seed(seed),
                problem=data["problem"],
                adapters=_overridden(data["adapters"], entry.get("adapters", {})),
                training=_training({**data["training"], **entry.get("training", {})}, where),
                options=entry.get("options", {}),
                protocol=protocol,
            )
            run.lora_configs()  # raises for wrong values before the first run
            runs.append(run)
    pairs = [(run.method, run.seed) for run in runs]
    if twice := [pair for pair in pairs if pairs.count(pair) > 1]:
        raise ArgumentError(f"methods: {twice[0][0]}, seed {twice[0][1]}: expected once, found again")
    return Configuration(data["name"], data["about"], tuple(runs), names)


def value_of(data: Mapping[str, Any], entry: Mapping[str, Any], key: str) -> Any:
    """What a method has for a key of its grid, as "training.lr"; None where it is not set."""
    part, _, name = key.partition(".")
    return {**data.get(part, {}), **entry.get(part, {})}.get(name)


def points(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values of a grid."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def label(name: str, point: Mapping[str, Any]) -> str:
    """The name of a method with these values of its grid."""
    return ", ".join([name, *(f"{key.partition('.')[2]} {value:g}" for key, value in point.items())])


def _check_grid(data: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
    where = f"methods: {entry['name']}: grid"
    grid = _mapping(entry.get("grid", {}), where, set(), set(entry.get("grid", {})))
    for key, values in grid.items():
        part, _, name = key.partition(".")
        if part not in ("training", "options", "adapters", "protocol") or not name:
            raise ArgumentError(f"{where}: expected keys like training.lr or options.ewc_lambda, got {key!r}")
        if not isinstance(values, list) or not values:
            raise ArgumentError(f"{where}: {key}: expected a list of values, got {values!r}")
        if (own := value_of(data, entry, key)) not in values:
            raise ArgumentError(f"{where}: {key}: expected that of the method, {own!r}, among {values}")


def _developed(data: dict[str, Any]) -> dict[str, Any]:
    """The runs on development seeds, under a name of their own."""
    if not data.get("development"):
        raise ArgumentError(f"development: {data['name']} has no development seeds")
    if shared := sorted(set(data["development"]) & set(data["seeds"])):
        raise ArgumentError(f"development: expected seeds that are not reported, got {shared}")
    entries = []
    for entry in data["methods"]:
        for point in points(entry.get("grid", {})):
            changed = {**copy.deepcopy(entry), "name": label(entry["name"], point)}
            changed.pop("seeds", None)
            for key, value in point.items():
                part, _, name = key.partition(".")
                changed[part] = {**changed.get(part, {}), name: value}
            entries.append(changed)
    return {**data, "name": f"{data['name']}-development", "seeds": data["development"], "methods": entries}


def _shortened(data: dict[str, Any]) -> dict[str, Any]:
    """The short version that "quick" defines, under its own name."""
    if "quick" not in data:
        raise ArgumentError(f"quick: {data['name']} has no short version")
    change = _mapping(data["quick"], "quick", set(), _KEYS - {"name", "about"})
    wanted = change.get("methods", [entry["name"] for entry in data["methods"]])
    named = {entry["name"]: entry for entry in data["methods"]}
    if unknown := [name for name in wanted if name not in named]:
        raise ArgumentError(f"quick: methods: no method is called {unknown[0]!r}")
    merged = {name: {**data[name], **change.get(name, {})} for name in ("problem", "training")}
    merged["adapters"] = _overridden(data["adapters"], change.get("adapters", {}))
    # Values of the short version override those of a method.
    entries = [
        {
            **{key: value for key, value in named[name].items() if key != "seeds" or "seeds" not in change},
            "training": {**named[name].get("training", {}), **change.get("training", {})},
        }
        for name in wanted
    ]
    return {
        **data, **merged, "name": f"{data['name']}-quick", "seeds": change.get("seeds", data["seeds"]),
        "methods": entries,
    }  # fmt: skip


def with_seeds(configuration: Configuration, seeds: list[int]) -> Configuration:
    """The same methods on other seeds, each once; raises `ArgumentError` for a negative one."""
    seeds = list(dict.fromkeys(map(_seed, seeds)))
    first = {run.method: run for run in reversed(configuration.runs)}
    order = list(dict.fromkeys(run.method for run in configuration.runs))
    return replace(configuration, runs=tuple(replace(first[name], seed=s) for name in order for s in seeds))


def _lora_config(values: dict[str, Any]) -> fe.LoRAConfig:
    options = dict(values)
    if (segments := options.pop("segments", None)) is not None:
        options["layout"] = fe.QKVLayout(tuple(segments))
    try:
        return fe.LoRAConfig(**options)
    except TypeError as error:
        raise ArgumentError(f"adapters: {error}") from error


def _overridden(adapters: Any, changes: Any) -> Any:
    """Adapters with the changes of a method; a list takes the place of what the file has."""
    if isinstance(adapters, Mapping) and isinstance(changes, Mapping):
        return {**adapters, **changes}
    return changes or adapters


def _overridden_protocol(protocol: Any, changes: Any) -> dict[str, Any]:
    """That of the file with the changes of a method; another kind takes its place."""
    protocol = _mapping(protocol, "protocol", set(), set(protocol))
    changes = _mapping(changes, "protocol", set(), set(changes))
    return changes if "kind" in changes else {**protocol, **changes}


def _mapping(value: Any, where: str, required: set[str], optional: set[str]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ArgumentError(f"{where}: expected an object, got {value!r}")
    if missing := sorted(required - set(value)):
        raise ArgumentError(f"{where}: {missing[0]} is missing")
    if unknown := sorted(set(value) - required - optional):
        raise ArgumentError(f"{where}: {unknown[0]}: no such key")
    return dict(value)


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ArgumentError(f"seeds: expected integers >= 0, got {value!r}")
    return value


def _training(values: dict[str, Any], where: str) -> Training:
    known = {f.name for f in fields(Training)}
    _mapping(values, f"{where}: training", {"lr", "head_lr"}, known)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    training = Training(**values)
    for name, choices in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        if (value := getattr(training, name)) not in choices:
            raise ArgumentError(f"{where}: training: {name}: expected one of {choices}, got {value!r}")
    for name in ("epochs", "batch_size", "test_batch_size", "iterations", "fisher_batch_size"):
        value = getattr(training, name)
        optional = name in ("iterations", "fisher_batch_size")
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not whole and not (optional and value is None):
            raise ArgumentError(f"{where}: training: {name}: expected an integer >= 1, got {value!r}")
    for value in training.epochs_by_task:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ArgumentError(f"{where}: training: epochs_by_task: expected integers >= 1, got {value!r}")
    for name in ("lr", "head_lr", "first_lr", "first_head_lr"):
        value = getattr(training, name)
        if value is None and name.startswith("first_"):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ArgumentError(f"{where}: training: {name}: expected a number > 0, got {value!r}")
    return training
