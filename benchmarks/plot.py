# SPDX-License-Identifier: Apache-2.0
"""Draws records: `fused-ewclora plot RECORDS... --out DIR [--format png svg]`.

Per machine a roofline and the speed-up over every peer of each operation, and a picture per scaling curve
(benchmarks/scaling.py). Needs matplotlib. Exit status 2 when the records cannot be used.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fused_ewclora._arguments import PROG, Parser

from . import collection
from .collection import CaseRecords, Record, Unusable
from .plots import pages
from .scaling import Curve

FORMATS = ("png", "svg")
HEADLINE = "EWC on LoRA, at the cost of LoRA"
MISSING = "matplotlib is not installed; pip install 'fused-ewclora[demo]' brings it"


def slug(text: str) -> str:
    """Letters, digits and single hyphens."""
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-")


class Picture(NamedTuple):
    """A picture that is not drawn yet; `op` is "" where it shows several operations."""

    name: str
    title: str
    kind: str  # "headline", "roofline", "speedup" or "scaling"
    op: str
    draw: Callable[[], Any]


def _numbered(
    name: str, title: str, kind: str, op: str, draws: Sequence[Callable[[str], Any]]
) -> list[Picture]:
    numbered = []
    for number, draw in enumerate(draws, 1):
        several = len(draws) > 1
        whole = f"{title} ({number} of {len(draws)})" if several else title
        file = f"{name}-{number}" if several else name
        numbered.append(Picture(file, whole, kind, op, functools.partial(draw, whole)))
    return numbered


def _roofline(cases: Sequence[Sequence[CaseRecords]], title: str) -> Any:
    from .plots import roofline

    return roofline.draw(title, cases)


def _speedup(cases: Sequence[CaseRecords], everything: Sequence[CaseRecords], title: str) -> Any:
    from .plots import speedup

    return speedup.draw(title, cases, everything)


def _curves(family: Sequence[Curve], title: str) -> Any:
    from .plots import curves

    return curves.draw(title, family)


def planned(records: Sequence[Record]) -> list[Picture]:
    """The pictures of records, not drawn yet, so that matplotlib is not needed. Host times have none."""
    planned_pictures: list[Picture] = []
    drawn = [record for record in records if not collection.is_host(record)]
    for machine, of_machine in collection.by_machine(drawn).items():
        where = slug(machine)
        whole = [record for record in of_machine if not collection.is_sweep(record)]
        cases = list(collection.newest(whole).values())
        draws = [functools.partial(_roofline, page) for page in pages.rooflines(cases)]
        planned_pictures += _numbered(f"roofline-{where}", f"Roofline: {machine}", "roofline", "", draws)
        for op, of_op in collection.by_op(cases).items():
            bars = [functools.partial(_speedup, page, of_op) for page in pages.speedups(of_op)]
            planned_pictures += _numbered(
                f"speedup-{where}-{op}", f"Speed-up of ours: {op}", "speedup", op, bars
            )
        for family in pages.families(of_machine):
            first = family[0]
            parts = [machine, first.op, first.field, *first.fixed.values(), first.dtype]
            name, title = slug(f"scaling-{'-'.join(map(str, parts))}"), f"{first.op}: time over {first.title}"
            planned_pictures += _numbered(
                name, title, "scaling", first.op, [functools.partial(_curves, family)]
            )
    return planned_pictures


def headline(records: Sequence[Record]) -> list[Picture]:
    """The picture at the top of the pages, where the records hold all of its cases."""
    from . import headline as cases

    pairs = cases.found(records)
    if not pairs:
        return []
    return [Picture("headline", HEADLINE, "headline", "", functools.partial(_headline, pairs, HEADLINE))]


def _headline(pairs: Sequence[Any], title: str) -> Any:
    from .plots import headline

    return headline.draw(title, pairs)


def pictures(records: Sequence[Record]) -> dict[str, Any]:
    """Figures by the name of their file; raises `Unusable` without matplotlib, or where there is nothing to
    draw."""
    if importlib.util.find_spec("matplotlib") is None:
        raise Unusable(MISSING)
    figures = {picture.name: picture.draw() for picture in [*headline(records), *planned(records)]}
    if not figures:
        raise Unusable("no case has a measurement of ours to draw")
    return figures


def plot(records: Sequence[Record], out: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Writes all pictures to the folder; the paths."""
    drawn = pictures(records)
    from .plots import style

    return [path for name, figure in drawn.items() for path in style.save(figure, out, name, formats)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("records", type=Path, nargs="+", metavar="RECORDS", help="files or folders")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["png"])


def execute(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Draws the pictures; returns the exit status."""
    try:
        written = plot(collection.load(*args.records), args.out, args.format)
    except Unusable as reason:
        print(f"plot: {reason}", file=sys.stderr)
        return 2
    print("\n".join(map(str, written)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = Parser(prog=f"{PROG} plot", description=__doc__)
    add_arguments(parser)
    return execute(parser, parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
