# SPDX-License-Identifier: Apache-2.0
"""Records of a run as one JSON object or as CSV, in a file or on stdout."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from fused_ewclora._arguments import new_file

from .harness import Record

STDOUT = "-"
COLUMNS = (
    "op", "shape", "dtype", "provider", "role", "backend", "algorithm", "p20_seconds", "p50_seconds",
    "p80_seconds", "rounds", "timing", "error_fp64", "tolerance", "gflops_per_second", "gbytes_per_second",
    "fraction_of_ceiling", "peak_bytes", "host_seconds", "failed",
)  # fmt: skip


def file(text: str) -> str:
    """A type of options: a file in a folder that exists, or - for stdout."""
    return text if text == STDOUT else str(new_file(text))


def row(record: Record) -> dict[str, Any]:
    """A record as a line of the table."""
    times = {f"{name}_seconds": value for name, value in record.get("seconds", {}).items()}
    shape = " ".join(f"{name}={value}" for name, value in record["shape"].items() if name != "model")
    return {**{name: record.get(name) for name in COLUMNS}, **times, "shape": shape}


def _json(records: Sequence[Record], out: TextIO) -> None:
    # The environment is the same for all records of a run.
    environment = records[0]["environment"] if records else None
    bare = [{name: value for name, value in one.items() if name != "environment"} for one in records]
    json.dump({"environment": environment, "records": bare}, out, indent=1)
    out.write("\n")


def _csv(records: Sequence[Record], out: TextIO) -> None:
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(row, records))


def write(records: Sequence[Record], json_file: str | None, csv_file: str | None) -> None:
    """Writes the records to the files that are not None."""
    for path, writing in ((json_file, _json), (csv_file, _csv)):
        if path == STDOUT:
            writing(records, sys.stdout)
        elif path is not None:
            with open(path, "w", newline="") as out:
                writing(records, out)
