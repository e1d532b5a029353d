# SPDX-License-Identifier: Apache-2.0
"""Groups of runs that differ only in the seed, from which tables, targets and pictures are made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fused_ewclora.demo.spread import Spread

from .. import collection
from ..collection import Record
from . import recorded
from .configuration import decisive

KINDS = (  # as tables order them
    "LoRA", "EWCLoRA", "FactorEWC", "SDLoRA", "CoDyRA", "InfLoRA", "KeepLoRA", "OLoRA", "NLoRA", "IEL", "ITA",
    "PerturbAndMerge", "CLLoRA",
)  # fmt: skip
REFERENCE = "LoRA"  # the kind that others are compared with
FAMILIES = {  # kinds that one picture compares
    "EWC-LoRA": ("EWCLoRA",),
    "directions and magnitudes": ("SDLoRA", "CoDyRA"),
    "other penalties": ("FactorEWC", "IEL", "ITA", "OLoRA", "NLoRA", "OnlineEWC", "AvalancheEWC"),
    "projections, merging, blocks": ("InfLoRA", "KeepLoRA", "PerturbAndMerge", "CLLoRA"),
}
OF_PROTOCOLS = {"class-means": "class means", "cl-lora": "class means"}  # whatever the kind of the method
MIB = 2.0**20
SHOWN_DIFFERENCES = 3  # fields in the note that distinguishes settings of one method


@dataclass(frozen=True)
class Group:
    """The runs of one method with one setting, by seed, each seed once.

    note: the differences from the other settings of the method in the suite; "" for a single setting.
    """

    suite: str
    method: str
    kind: str
    records: tuple[Record, ...]
    note: str = ""

    @property
    def name(self) -> str:
        """The method, with its setting where there are several."""
        return f"{self.method} ({self.note})" if self.note else self.method

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(record["seed"] for record in self.records)

    @property
    def tasks(self) -> int:
        return len(self.records[0]["test_sizes"])

    @property
    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = self.records[0]["run"]["options"]
        return options

    @property
    def protocol(self) -> dict[str, Any]:
        """What its runs do beside the calls of every method; empty for that of the kind, and in records from
        before there were protocols."""
        protocol: dict[str, Any] = self.records[0]["run"].get("protocol", {})
        return protocol

    @property
    def ewc_lambda(self) -> float:
        """0 for methods without a penalty."""
        return float(self.options.get("ewc_lambda", 0.0))

    @property
    def machines(self) -> list[str]:
        """The machines of the runs; times of different machines are not averaged."""
        return list(collection.by_machine(self.records))

    def of_seeds(self, seeds: Sequence[int]) -> Group:
        """The group with only these seeds."""
        kept = tuple(record for record in self.records if record["seed"] in seeds)
        return Group(self.suite, self.method, self.kind, kept, self.note)

    def metric(self, protocol: str, name: str) -> Spread | None:
        """A metric of the record over the seeds; None where it is not defined."""
        return self.over_seeds(lambda record: record["metrics"].get(protocol, {}).get(name))

    def over_seeds(self, value: Callable[[Record], float | None]) -> Spread | None:
        """A value of every record; None where one has none."""
        values = [value(record) for record in self.records]
        known = [v for v in values if v is not None]
        return Spread.of(known) if len(known) == len(values) else None

    def matrix(self, protocol: str) -> np.ndarray:
        """Accuracies `[T, T]` in percent, the mean over the seeds; NaN for tasks that come later."""
        return np.mean([recorded.metrics(record).matrix(protocol) for record in self.records], axis=0)

    def curves(self, protocol: str) -> np.ndarray:
        """`A_1 .. A_T` of every seed, sample-weighted: `[seeds, T]`."""
        return np.array([recorded.metrics(record).curve(protocol=protocol) for record in self.records])


def setting(record: Record) -> str:
    """Equal for runs that may be averaged: names and seeds do not count."""
    kept = {name: value for name, value in decisive(record["run"]).items() if name != "seed"}
    return json.dumps([kept, len(record["test_sizes"])], sort_keys=True)


def basis(group: Group) -> str:
    """Equal for groups whose methods can be compared: the same problem, adapters, training, protocol and
    tasks."""
    run = decisive(group.records[0]["run"])
    kept = {name: run[name] for name in ("problem", "adapters", "training", "protocol") if name in run}
    return json.dumps([group.suite, kept, group.tasks], sort_keys=True)


def by_basis(groups: Iterable[Group]) -> list[list[Group]]:
    """Groups that can be compared with each other, in order of appearance."""
    found: dict[str, list[Group]] = {}
    for entry in groups:
        found.setdefault(basis(entry), []).append(entry)
    return list(found.values())


def group(records: Iterable[Record]) -> list[Group]:
    """Groups of the runs among records, suites in order of appearance, methods by kind and lambda.

    Of runs with the same setting and seed the newest is used; of equal times, the later one.
    """
    settings: dict[tuple[str, str, str], dict[int, Record]] = {}
    for record in recorded.runs(records):
        seeds = settings.setdefault((record["suite"], record["method"], setting(record)), {})
        before = seeds.get(record["seed"])
        if before is None or record["time"] >= before["time"]:
            seeds[record["seed"]] = record
    groups = [
        Group(suite, method, next(iter(seeds.values()))["kind"], tuple(seeds[seed] for seed in sorted(seeds)))
        for (suite, method, _), seeds in settings.items()
    ]
    suites = list(dict.fromkeys(entry.suite for entry in groups))
    # Runs are recorded as they end, several at a time: their order has no meaning.
    groups.sort(
        key=lambda entry: (
            suites.index(entry.suite), _rank(entry.kind), entry.protocol.get("kind", ""), entry.ewc_lambda
        )
    )  # fmt: skip
    return list(_noted(groups))


def by_suite(groups: Iterable[Group]) -> dict[str, list[Group]]:
    """Groups by the name of their suite."""
    suites: dict[str, list[Group]] = {}
    for entry in groups:
        suites.setdefault(entry.suite, []).append(entry)
    return suites


def families(groups: Sequence[Group], most: int) -> list[tuple[str, list[Group]]]:
    """Groups that one picture compares, at most `most` beside plain LoRA, with what they have in common; ""
    where all fit into one."""
    reference = [entry for entry in groups if entry.kind == REFERENCE and not entry.protocol][:1]
    others = [entry for entry in groups if entry not in reference]
    if len(others) <= most:
        return [("", list(groups))]
    found: dict[str, list[Group]] = {}
    for family in [*FAMILIES, *dict.fromkeys(OF_PROTOCOLS.values()), "others"]:
        for entry in others:
            if _family(entry) == family:
                found.setdefault(family, []).append(entry)
    return [
        (family, [*reference, *members[i : i + most]])
        for family, members in found.items()
        for i in range(0, len(members), most)
    ]


def _family(entry: Group) -> str:
    if (protocol := entry.protocol.get("kind")) in OF_PROTOCOLS:
        return OF_PROTOCOLS[protocol]
    kind = entry.kind.rpartition(":")[2]  # without the module of a class outside the library
    return next((family for family, kinds in FAMILIES.items() if kind in kinds), "others")


def newest_costs(records: Iterable[Record]) -> list[list[Record]]:
    """Lists of cost records that can be compared: of the same machine, model and number of tasks, the newest
    of every method."""
    comparable: dict[str, dict[str, Record]] = {}
    for machine, of_machine in collection.by_machine(recorded.costs(records)).items():
        for record in of_machine:
            which = json.dumps([machine, record["model"], record["tasks"]], sort_keys=True)
            methods = comparable.setdefault(which, {})
            before = methods.get(record["method"])
            if before is None or record["time"] >= before["time"]:
                methods[record["method"]] = record
    return [list(methods.values()) for methods in comparable.values()]


def _rank(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else len(KINDS)


def _noted(groups: Sequence[Group]) -> Iterator[Group]:
    """The groups with a note that distinguishes settings of the same method."""
    for entry in groups:
        same = [other for other in groups if (other.suite, other.method) == (entry.suite, entry.method)]
        if len(same) == 1:
            yield entry
            continue
        settings = [_flat(other) for other in same]
        mine = settings[same.index(entry)]
        names = list(dict.fromkeys(name for fields in settings for name in fields))
        differing = [name for name in names if len({json.dumps(fields.get(name)) for fields in settings}) > 1]
        parts = [f"{name.rpartition('.')[2]} {mine.get(name, 'not given')}" for name in differing]
        more = ["…"] if len(parts) > SHOWN_DIFFERENCES else []
        note = ", ".join([*parts[:SHOWN_DIFFERENCES], *more])
        yield Group(entry.suite, entry.method, entry.kind, entry.records, note)


def _flat(entry: Group) -> dict[str, Any]:
    """The fields of a setting, by their path."""
    fields: dict[str, Any] = {}

    def visit(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                visit(inner, f"{path}.{name}" if path else name)
        else:
            fields[path] = value

    run = {n: v for n, v in entry.records[0]["run"].items() if n not in ("suite", "method", "seed")}
    visit({**run, "number of tasks": entry.tasks}, "")
    return fields
