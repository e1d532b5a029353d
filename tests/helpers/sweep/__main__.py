# SPDX-License-Identifier: Apache-2.0
"""python -m sweep [--update] [NAME ...]: all architectures, or those whose names hold one of these.

All of them together write docs/architectures.jsonl and docs/architectures.md. Exit status: 1
when an architecture is WRONG or cannot be built, or when timm or transformers have fewer than 40 rows with
adapted layers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import time
from collections import Counter
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from . import checks, listed, processes, table

DISTRIBUTIONS = {"open_clip": "open_clip_torch"}
LEAST = {"timm": 40, "transformers": 40}


def show(record: dict[str, Any], seconds: float) -> None:
    name, outcome = f"{record['library']} {record['architecture']}", table.outcome(record)
    print(f"{name:60s} {outcome:9s} {record['layers']:3d} layers {seconds:6.1f} s", flush=True)
    for check, result in record["checks"].items():
        if result["status"] == checks.WRONG:
            print(f"    {check}: {result['text']}", flush=True)
    if record.get("failed"):
        print(f"    {record['failed']}", flush=True)


def too_few(records: list[dict[str, Any]]) -> list[str]:
    """Libraries with too few architectures that have adapted layers."""
    covered = Counter(record["library"] for record in records if record["layers"])
    return [
        f"{library}: {covered[library]} of {least}"
        for library, least in LEAST.items()
        if covered[library] < least
    ]


def ordered(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record per architecture that is listed, in the order of the list; the last one counts."""
    latest = {(record["library"], record["architecture"]): record for record in records}
    keys = [(one.library, one.name) for one in listed.ARCHITECTURES]
    return [latest[key] for key in keys if key in latest]


def about() -> dict[str, Any]:
    versions = {
        name: importlib.metadata.version(DISTRIBUTIONS.get(name, name))
        for name in ("timm", "transformers", "open_clip", "torchvision", "torch")
    }
    return {"versions": versions, "tolerance": checks.TOLERANCE}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sweep", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each (%(default)s)")
    parser.add_argument("--update", action="store_true", help="replace the rows of these names in the page")
    arguments = parser.parse_args()
    keys = [
        (one.library, one.name)
        for one in listed.ARCHITECTURES
        if not arguments.names or any(part in one.name for part in arguments.names)
    ]
    records, start = [], time.perf_counter()
    for record, seconds in processes.measured(keys, arguments.jobs):
        show(record, seconds)
        records.append(record)
    counts = Counter(map(table.outcome, records))
    print(
        ", ".join(f"{counts[name]} {name}" for name in table.OUTCOMES),
        f"in {time.perf_counter() - start:.0f} s",
    )
    failed = counts["WRONG"] + counts["not run"]
    if arguments.names and not arguments.update:
        return 1 if failed else 0
    written = ordered([*(table.load()[1] if arguments.update else []), *records])
    table.save(about(), written)
    table.PAGE.write_text(table.page(*table.load()))
    missing = too_few(written)
    for text in missing:
        print(f"too few architectures of {text}")
    return 1 if failed or missing else 0


if __name__ == "__main__":
    sys.exit(main())
