# SPDX-License-Identifier: Apache-2.0
"""How many times faster ours is than every peer, case by case."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from .. import collection
from ..collection import CaseRecords, Record
from . import pages, style

NOTE = (
    "Median time of the other over that of ours: right of 1, ours is faster. Error bars: p20 to p80 of "
    "single rounds of both, added in squares. Grey: a floor, work of equal size, not the case's result."
)


def ratio(other: Record, ours: Record) -> tuple[float, float, float]:
    """Ratio of the medians, and its ends by the p20 and p80 of both, whose rounds are independent."""
    o, u = other["seconds"], ours["seconds"]
    middle = o["p50"] / u["p50"]
    below = math.hypot(math.log(o["p50"] / o["p20"]), math.log(u["p80"] / u["p50"]))
    above = math.hypot(math.log(o["p80"] / o["p50"]), math.log(u["p50"] / u["p20"]))
    return middle, middle * math.exp(-below), middle * math.exp(above)


def draw(title: str, cases: Sequence[CaseRecords], everything: Sequence[CaseRecords]) -> Figure:
    """A group of bars per case of a page; names and colours are those of `everything` of the operation."""
    known = pages.with_ours(everything)
    name_of = {id(case): name for case, name in zip(known, collection.labels(known), strict=True)}
    names = [name_of[id(case)] for case in cases]
    looks = style.styles(record for case in known for record in case.values())
    records = [record for case in cases for record in case.values()]
    rows = sum(len(pages.others(case)) for case in cases) + 0.7 * (len(cases) - 1)
    figure = style.figure(1.55 + 0.19 * rows, title, records, NOTE)
    axis = figure.subplots()
    y, ticks = 0.0, []
    bars: list[tuple[float, float, int]] = []  # ends, and letters beside
    for case in cases:
        mine = collection.ours(case)
        assert mine is not None
        top = y
        for other in pages.others(case):
            middle, low, high = ratio(other, mine)
            colour = looks[other["provider"]][0]
            axis.barh(y, middle - 1.0, left=1.0, height=0.8, color=colour, alpha=0.85, gid=other["provider"])
            axis.plot([low, high], [y, y], color="black", linewidth=1.0, solid_capstyle="butt")
            text = f"{collection.digits(middle)} × {other['provider']}"
            axis.annotate(
                text, (max(high, 1.0), y), xytext=(5, 0), textcoords="offset points", fontsize=style.SMALL,
                va="center",
            )  # fmt: skip
            bars.append((low, max(high, 1.0), len(text)))
            y += 1.0
        ticks.append((top + y - 1.0) / 2.0)
        y += 0.7
    labels = [f"{name}\nours {collection.time_text(collection.ours(c)['seconds']['p50'])}"  # type: ignore[index]
              for name, c in zip(names, cases, strict=True)]  # fmt: skip
    axis.set_yticks(ticks, labels, fontsize=style.SMALL)
    axis.set_ylim(y - 0.7 - 0.3, -0.7)
    axis.set_xscale("log")
    low = min(1.0, *(start for start, _, _ in bars)) / 1.05
    width = style.WIDTH - 0.4 - style.LETTER * max(map(len, "\n".join(labels).split("\n")))
    spans = [
        math.log(end / low) / max(0.2, 1.0 - (0.15 + style.LETTER * letters) / width)
        for _, end, letters in bars
    ]
    axis.set_xlim(low, low * math.exp(max(spans)))  # every text ends inside
    axis.axvline(1.0, color="black", linewidth=1.2)
    style.plain_ticks(axis.xaxis)
    axis.set_xlabel("speed-up (ratio of times, logarithmic)")
    axis.grid(alpha=0.25, axis="x")
    return figure
