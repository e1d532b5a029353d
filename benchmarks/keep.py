# SPDX-License-Identifier: Apache-2.0
"""Appends the records of a GPU run to those of the repository: `python -m benchmarks.keep OUT`, where OUT is
the output folder of `make gpu-check`. They are written to benchmarks/results/<gpu>/, one file per suite. Exit
status 2 when they cannot be used: a rehearsal, several devices, records that the repository already has.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import collection
from .collection import Unusable
from .plot import slug

RESULTS = Path(__file__).resolve().parent / "results"


def keep(out: Path, results: Path = RESULTS) -> list[Path]:
    """Appends the records and returns the files; raises `Unusable` before anything is written."""
    by_file = {path: collection.load(path) for path in sorted(out.glob("*.jsonl")) if path.stat().st_size}
    everything = [record for of_file in by_file.values() for record in of_file]
    if not everything:
        raise Unusable(f"{out}: holds no records")
    if not all(collection.is_gpu(record) for record in everything):
        raise Unusable(f"{out}: records that were not measured on a GPU, such as those of a rehearsal")
    devices = {record["environment"]["device"] for record in everything}
    if len(devices) > 1:
        raise Unusable(f"{out}: records of several devices: {', '.join(sorted(devices))}")
    folder = results / slug(devices.pop())
    targets = {path: folder / path.name for path in by_file}
    for path, target in targets.items():
        if target.exists() and path.read_text() in target.read_text():
            raise Unusable(f"{target}: holds the records of {path} already")
    folder.mkdir(parents=True, exist_ok=True)
    for path, target in targets.items():
        with target.open("a") as file:
            file.write(path.read_text())
    return list(targets.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.keep", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of a GPU run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with a folder per device")
    args = parser.parse_args(argv)
    try:
        written = keep(args.out, args.results)
    except Unusable as reason:
        print(f"keep: {reason}", file=sys.stderr)
        return 2
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
