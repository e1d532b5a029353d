# SPDX-License-Identifier: Apache-2.0
"""Reads committed records; every line is checked before any of its values is used."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import records
from .case import OURS

Record = dict[str, Any]
CaseRecords = dict[str, Record]  # by provider
PASS, SHORT, MISSING = "PASS", "FALL SHORT", "NOT MEASURED"  # of targets
COMPUTED = "computed"  # timing of a floor that was computed, not run
HOST = "host"  # timing of host times (benchmarks/host)
SWEEP = "sweep"  # key of a shape: the name of the field that varies along a scaling curve


class Unusable(ValueError):
    """Records that cannot be used; the message says why in one sentence."""


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise Unusable(f"{path}: no such file or folder")
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.jsonl"))
    if not files:
        raise Unusable(f"{path}: the folder holds no .jsonl files")
    return files


def _quantiles_are_sound(record: Record) -> bool:
    seconds = record.get("seconds")
    return seconds is None or 0.0 < seconds["p20"] <= seconds["p50"] <= seconds["p80"]


def _of_file(path: Path) -> list[Record]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as failure:
        raise Unusable(
            f"{path}: cannot be read ({getattr(failure, 'strerror', None) or 'not text'})"
        ) from None
    checked = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            what = "the file is truncated" if number == len(lines) else "not JSON"
            raise Unusable(f"{path}: line {number} is no complete record ({what})") from None
        wrong = next(records.violations(record), None)
        if wrong:
            raise Unusable(
                f"{path}: line {number} does not follow record_schema.json of this version ({wrong[:200]})"
            )
        if not _quantiles_are_sound(record):
            raise Unusable(f"{path}: line {number} has times that are not 0 < p20 <= p50 <= p80")
        checked.append(record)
    if not checked:
        raise Unusable(f"{path}: holds no records")
    return checked


def load(*paths: Path | str) -> list[Record]:
    """All records of files, or of the .jsonl files of folders, in order. Raises `Unusable` for files that are
    missing, empty or truncated, and for records that violate record_schema.json."""
    return [record for path in paths for file in _files(Path(path)) for record in _of_file(file)]


def newest(measurements: Iterable[Record]) -> dict[str, CaseRecords]:
    """The newest record of every case and provider, by case and provider; of equal times, the later line."""
    cases: dict[str, CaseRecords] = {}
    for record in measurements:
        case = cases.setdefault(records.key(record), {})
        before = case.get(record["provider"])
        if before is None or record["time"] >= before["time"]:
            case[record["provider"]] = record
    return cases


def role(record: Record) -> str:
    """ "ours", "variant", "peer" or "floor"; older records state it only by `floor` and by the name."""
    if "role" in record:
        return str(record["role"])
    if record.get("floor"):
        return "floor"
    name = record["provider"]
    return "ours" if name == OURS else "variant" if name.startswith(OURS) else "peer"


def measured(record: Record | None) -> bool:
    """Whether the provider was run and timed."""
    return record is not None and "seconds" in record and record.get("timing") != COMPUTED


def is_host(record: Record) -> bool:
    """Whether it is, or failed to be, a time of the host alone."""
    return bool(record.get("timing") == HOST)


def ceilings(record: Record) -> dict[str, float]:
    """The ceilings measured in the process of a record: "copy" in bytes/s, products in FLOP/s. Older CPU
    records have only the fp32 product."""
    if "ceilings" in record:
        return dict(record["ceilings"])
    if "sgemm_gflops_per_second" in record:
        return {"fp32": 1e9 * record["sgemm_gflops_per_second"]}
    return {}


def fraction_of_ceiling(record: Record) -> float | None:
    """The share of the measured ceiling; for older CPU records, of the fp32 product."""
    share = record.get("fraction_of_ceiling", record.get("fraction_of_sgemm"))
    return None if share is None else float(share)


def least_seconds(record: Record) -> float | None:
    """The time at the ceiling of the record: its bytes at the copy bandwidth or its FLOPs at the product rate
    of its process, whichever takes longer."""
    share = fraction_of_ceiling(record)
    return None if share is None else share * float(record["seconds"]["p50"])


def bound(record: Record) -> str | None:
    """ "bytes" or "flops": which of them determines `least_seconds`."""
    least = least_seconds(record)
    if least is None:
        return None
    copy = ceilings(record).get("copy")
    return "bytes" if copy and abs(record["bytes"] / copy / least - 1.0) < 1e-6 else "flops"


def is_gpu(record: Record) -> bool:
    return "cuda" in record["environment"] or "capability" in record["environment"]


def _fields(record: Record) -> dict[str, Any]:
    shape = {name: value for name, value in record["shape"].items() if name != SWEEP}
    sweep = {"over": f"over {record['shape'][SWEEP]}"} if is_sweep(record) else {}
    return {**shape, "dtype": record["dtype"], **sweep}


def _value(name: str, value: Any) -> str:
    return f"{name.replace('_', ' ')} {value}" if isinstance(value, (int, float)) else str(value)


def labels(cases: Sequence[CaseRecords]) -> list[str]:
    """Names of the cases of one op, with no more fields than needed to distinguish them, in order."""
    all_fields = [_fields(next(iter(case.values()))) for case in cases]
    names = list(dict.fromkeys(name for fields in all_fields for name in fields))
    chosen: list[str] = []

    def distinct(fields: Sequence[str]) -> int:
        return len({tuple(str(case_fields.get(name)) for name in fields) for case_fields in all_fields})

    for name in names:
        if not chosen or distinct([*chosen, name]) > distinct(chosen):
            chosen.append(name)
    return [
        ", ".join(_value(name, case_fields[name]) for name in chosen if name in case_fields)
        for case_fields in all_fields
    ]


def by_op(cases: Iterable[CaseRecords]) -> dict[str, list[CaseRecords]]:
    """Cases grouped by operation, in order of appearance."""
    ops: dict[str, list[CaseRecords]] = {}
    for case in cases:
        ops.setdefault(next(iter(case.values()))["op"], []).append(case)
    return ops


def is_sweep(record: Record) -> bool:
    """Whether it is a point of a scaling curve."""
    return SWEEP in record["shape"]


def by_machine(measurements: Iterable[Record]) -> dict[str, list[Record]]:
    """Records grouped by device, and on a CPU by number of threads: only these can be compared."""
    machines: dict[str, list[Record]] = {}
    for record in measurements:
        environment = record["environment"]
        threads = environment.get("threads")
        name = environment["device"]
        if not is_gpu(record) and threads is not None:
            name = f"{name}, {threads} thread{'s' if threads != 1 else ''}"
        machines.setdefault(name, []).append(record)
    return machines


def all_values(measurements: Iterable[Record], name: str) -> str:
    """All values of a field of the environments, in order of appearance; "" without any."""
    values = (record["environment"].get(name) for record in measurements)
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))


def ours(case: CaseRecords) -> Record | None:
    """The record of ours."""
    return next((record for record in case.values() if role(record) == "ours"), None)


def verdict_of(row: Record) -> str:
    """PASS, SHORT, or MISSING where a value that the target needs was not measured."""
    known = row["ratio"] == row["ratio"] and row.get("measured", True)  # not NaN
    return MISSING if not known else PASS if row["met"] else SHORT


def time_text(seconds: float) -> str:
    """Three digits with a unit: "4.70 ms"."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 0.9995 or unit == "µs":
            return f"{digits(seconds * factor)} {unit}"
    raise AssertionError


def digits(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
