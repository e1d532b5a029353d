"""Draws records: `python -m benchmarks.plot RECORDS... --out DIR [--format png svg]`.

Per machine a roofline and the speed-up over every peer of each operation, and a picture per scaling curve
(benchmarks/scaling.py). Needs matplotlib. Exit status 2 when the records cannot be used.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import collection
from .collection import Record, Unusable

FORMATS = ("png", "svg")
MISSING = "matplotlib is not installed; pip install 'fused-ewclora[demo]' brings it"


def slug(text: str) -> str:
    """Letters, digits and single hyphens."""
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-")


def pictures(found: Sequence[Record]) -> dict[str, Any]:
    """Figures of matplotlib by the name of their file; raises Unusable without matplotlib, or where there is
    nothing to draw."""
    if importlib.util.find_spec("matplotlib") is None:
        raise Unusable(MISSING)
    from .plots import curves, roofline, speedup

    made: dict[str, Any] = {}

    def add(name: str, pages: Sequence[Any]) -> None:
        for number, page in enumerate(pages, 1):
            made[f"{name}-{number}" if len(pages) > 1 else name] = page

    for machine, records in collection.by_machine(found).items():
        whole = [record for record in records if not collection.is_sweep(record)]
        add(f"roofline-{slug(machine)}", roofline.draw(machine, whole))
        for op, cases in collection.by_op(collection.newest(whole).values()).items():
            add(f"speedup-{slug(machine)}-{op}", speedup.draw(op, cases))
        for family in curves.families(records):
            first = family[0]
            told = [machine, first.op, first.field, *first.fixed.values(), first.dtype]
            add(slug(f"scaling-{'-'.join(map(str, told))}"), [curves.draw(family)])
    if not made:
        raise Unusable("no case has a measurement of ours to draw")
    return made


def plot(found: Sequence[Record], out: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Writes all pictures to the folder; the paths."""
    drawn = pictures(found)
    from .plots import style

    return [path for name, figure in drawn.items() for path in style.save(figure, out, name, formats)]


def main(given: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("records", type=Path, nargs="+", metavar="RECORDS", help="files or folders")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["png"])
    args = parser.parse_args(given)
    try:
        written = plot(collection.load(*args.records), args.out, args.format)
    except Unusable as reason:
        print(f"plot: {reason}", file=sys.stderr)
        return 2
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
