# SPDX-License-Identifier: Apache-2.0
"""Common style of all pictures: colours, markers, the caption, files."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image

from fused_ewclora.demo import palette

from .. import collection
from ..collection import Record

WIDTH, DPI = 10.0, 100  # inches, dots per inch: 1000 pixels
PALETTE = 256  # colours of a PNG
SMALL, GREY = 8.5, "#555555"
LETTER = 0.064  # average width of a letter of small text, in inches
LINE = 1.4 * SMALL / 72  # inches from one line of small text to the next
OURS_STYLE = (palette.BLUE, "o")
COLOURS = (palette.ORANGE, *palette.OTHERS)
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
FLOOR_COLOUR, FLOOR_MARKERS = "#444444", ("_", "1", "2", "3")
LEGIBLE: dict[str, Any] = {  # of text that may lie over lines
    "fontsize": SMALL, "zorder": 6, "path_effects": [withStroke(linewidth=2.5, foreground="white")],
}  # fmt: skip
matplotlib.rcParams["svg.hashsalt"] = "fused_ewclora"  # so that equal records give equal files


def styles(records: Iterable[Record]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every provider, in order of appearance: ours blue, floors grey."""
    chosen: dict[str, tuple[str, str]] = {}
    others = floors = 0
    for record in records:
        name, role = record["provider"], collection.role(record)
        if name in chosen:
            continue
        if role == "ours":
            chosen[name] = OURS_STYLE
        elif role == "floor":
            chosen[name] = (FLOOR_COLOUR, FLOOR_MARKERS[floors % len(FLOOR_MARKERS)])
            floors += 1
        else:
            chosen[name] = (COLOURS[others % len(COLOURS)], MARKERS[others % len(MARKERS)])
            others += 1
    return chosen


def caption(records: Sequence[Record]) -> str:
    """Device, threads, versions, commit and dates of the records."""
    gpu = any(map(collection.is_gpu, records))
    names = ("fused_ewclora", "torch", *(("triton", "cuda") if gpu else ()), "python", "commit")
    values = [(name, collection.all_values(records, name)) for name in names]
    threads = collection.all_values(records, "threads")
    days = sorted({record["time"][:10] for record in records})
    parts = [
        collection.all_values(records, "device"),
        *([] if gpu or not threads else [f"{threads} thread{'s' * (threads != '1')}"]),
        *(f"{name} {value}" for name, value in values if value),
        days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}",
    ]
    return textwrap.fill("; ".join(parts), 140)


def figure(height: float, title: str, records: Sequence[Record], note: str = "") -> Figure:
    """An empty figure of `height` inches with its title and its caption, after `note`."""
    empty = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(empty)
    empty.suptitle(title, fontsize=12)
    lines = [textwrap.fill(note, 140)] if note else []
    empty.supxlabel("\n".join([*lines, caption(records)]), fontsize=SMALL, color=GREY)
    return empty


def spread(wanted: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Positions near the `wanted` ones, in their order, no two closer than `gap`, within [low, high]."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    placed = [0.0] * len(wanted)
    at = low - gap
    for i in order:
        placed[i] = at = max(wanted[i], at + gap)
    at = high + gap
    for i in reversed(order):
        placed[i] = at = min(placed[i], at - gap)
    return placed


def label_right(
    axis: Any,
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    height: float,
    colours: Sequence[str] | None = None,
) -> None:
    """Names points of an axis of `height` inches at its right edge, below each other, each with a line to its
    point."""
    fractions = [fraction(axis, point) for point in points]
    # At equal heights the upper name goes to the point on the right, whose line then is the shorter one.
    order = sorted(range(len(points)), key=lambda i: (round(fractions[i][1], 2), fractions[i][0]))
    places = spread([fractions[i][1] for i in order], LINE / height, 0.02, 0.98)
    for i, y in zip(order, places, strict=True):
        colour = colours[i] if colours else OURS_STYLE[0]
        axis.annotate(
            texts[i], xy=points[i], xytext=(1.03, y), textcoords="axes fraction", fontsize=SMALL,
            color=colour, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": colour, "alpha": 0.5, "shrinkB": 2,
                        "relpos": (0.0, 0.5)},
        )  # fmt: skip


def fraction(axis: Any, point: tuple[float, float]) -> tuple[float, float]:
    """Coordinates of a point in fractions of the axis."""
    x, y = axis.transAxes.inverted().transform(axis.transData.transform(point))
    return float(x), float(y)


def plain_ticks(axis: Any) -> None:
    """1, 2, 5, 10, ... instead of powers of ten; fewer over many decades."""
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades < 3.5 else (1.0,)
    if decades < 0.7:
        axis.set_major_locator(matplotlib.ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))
    else:
        axis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs))
    axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def save(figure: Figure, out: Path, name: str, formats: Sequence[str]) -> list[Path]:
    """Writes the figure without dates, so that equal records give equal files; PNGs in few colours."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.{extension}" for extension in formats]
    for path in paths:
        if path.suffix == ".svg":
            figure.savefig(path, metadata={"Date": None})
            continue
        pixels = io.BytesIO()
        figure.savefig(pixels, format="png", dpi=DPI)
        few = (
            Image.open(pixels)
            .convert("RGB")
            .quantize(PALETTE, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        )
        few.save(path, optimize=True)
    return paths
