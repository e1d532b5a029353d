# SPDX-License-Identifier: Apache-2.0
"""Reads records of runs and of costs, and checks their schema, shapes and metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fused_ewclora.demo.evaluation import PERCENT
from fused_ewclora.metrics import PROTOCOLS, ContinualMetrics, TransferMetrics

from .. import records
from ..collection import Record, Unusable

SCHEMAS = json.loads((Path(__file__).parent / "record_schema.json").read_text())["$defs"]
PER_TASK = ("step_seconds", "ratio_to_first", "step_peak_bytes", "state_bytes", "adapter_parameters")


def is_cost(record: Record) -> bool:
    """Whether it is a record of the cost of steps, not of a run."""
    return "cost" in record


def violations(record: Any) -> Iterator[str]:
    """How a record violates record_schema.json, or contradicts itself, in words."""
    cost = isinstance(record, dict) and is_cost(record)
    wrong = list(records.violations(record, SCHEMAS["cost" if cost else "run"]))
    yield from wrong or (_of_cost(record) if cost else _of_run(record))


def check(record: Any) -> None:
    """Raises `Unusable` with the first violation of a record."""
    wrong = next(violations(record), None)
    if wrong:
        raise Unusable(wrong)


def _of_run(record: Record) -> Iterator[str]:
    for name in ("suite", "method", "kind", "seed"):
        if (of_run := record["run"][name]) != record[name]:
            yield f"record.run.{name}: expected that of the record, {record[name]!r}, got {of_run!r}"
    tasks = len(record["classes"])
    matrices = record["matrices"]
    per_task = {name: record[name] for name in ("train_sizes", "test_sizes", "tasks")}
    for name, values in {**per_task, **{f"matrices.{name}": matrices[name] for name in PROTOCOLS}}.items():
        if len(values) != tasks:
            yield f"record.{name}: expected {tasks} entries, one per task, got {len(values)}"
            return
    every = matrices.get("every_task")
    of_every = every is None or [len(row) for row in every] == [tasks] * (tasks + 1)
    if not of_every:
        yield f"record.matrices.every_task: expected {tasks + 1} rows of {tasks} accuracies"
    rows = {f"{name}[{t}]": (row, t) for name in PROTOCOLS for t, row in enumerate(matrices[name])}
    wrong = [
        f"record.matrices.{name}: expected {t + 1} accuracies, of task 0 to {t}, got {len(row)}"
        for name, (row, t) in rows.items()
        if len(row) != t + 1
    ]
    yield from wrong
    expected = {} if wrong else metrics(record).summary()
    if every is not None and of_every:
        expected["every_task"] = TransferMetrics(every, PERCENT).summary()
    for protocol in expected:
        for name, value in expected[protocol].items():
            stated = record["metrics"].get(protocol, {}).get(name, math.nan)
            same = stated is None if value is None else stated is not None and abs(stated - value) < 1e-6
            if not same:
                yield f"record.metrics.{protocol}.{name}: the matrices give {value!r}, got {stated!r}"


def _of_cost(record: Record) -> Iterator[str]:
    for name in PER_TASK:
        if len(record[name]) != record["tasks"]:
            yield f"record.{name}: expected {record['tasks']} entries, one per task, got {len(record[name])}"
    for number, seconds in enumerate(record["step_seconds"]):
        if not 0.0 < seconds["p20"] <= seconds["p50"] <= seconds["p80"]:
            yield f"record.step_seconds[{number}]: expected 0 < p20 <= p50 <= p80, got {seconds}"
    if record["ratio_to_first"] and abs(record["ratio_to_first"][0] - 1.0) > 1e-9:
        yield f"record.ratio_to_first[0]: expected 1, got {record['ratio_to_first'][0]!r}"


def metrics(record: Record) -> ContinualMetrics:
    """The metrics of a run's matrices, in percent."""
    matrices = record["matrices"]
    return ContinualMetrics.from_matrix(
        matrices["class_incremental"], record["test_sizes"], matrices["task_aware"], scale=PERCENT
    )


def load(folder: Path) -> list[Record]:
    """All records of the .jsonl files of a folder; raises `Unusable` for a missing folder and for lines that
    are not valid records."""
    if not folder.is_dir():
        raise Unusable(f"{folder}: no such folder")
    return [record for file in sorted(folder.glob("*.jsonl")) for record in _of_file(file)]


def _of_file(file: Path) -> Iterator[Record]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            check(record)
        except ValueError as wrong:
            raise Unusable(f"{file}: line {number} is not a record of this version: {wrong}") from None
        yield record


def runs(records: Iterable[Record]) -> list[Record]:
    """The records of runs."""
    return [record for record in records if not is_cost(record)]


def costs(records: Iterable[Record]) -> list[Record]:
    """The records of costs."""
    return [record for record in records if is_cost(record)]
