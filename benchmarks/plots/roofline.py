# SPDX-License-Identifier: Apache-2.0
"""The roofline of a machine: rates of cases, and of a copy and large products in the same processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .. import collection
from ..collection import CaseRecords, Record
from . import style

Points = Sequence[tuple[float, float]]
TEXT = 0.3  # width of the name of a roof in that of a panel
Roofs = dict[str, tuple[float, float, float]]
LEGEND_COLUMNS = 4
NAMED = 16  # cases with names in a panel
NOTE = (
    "FLOPs and bytes as counted for a case, equal for all its providers; roofs measured in the same processes"
)
NO_COPY = "; these records hold no copy bandwidth, so there is no sloped roof"
ROOFS = {"bf16": "bf16 product", "tf32": "tf32 product", "fp32": "fp32 product"}
GIGA, TERA = 1e9, 1e12


def point(record: Record) -> tuple[float, float]:
    """Arithmetic intensity in FLOP/byte, and achieved FLOP/s."""
    return record["flops"] / record["bytes"], record["flops"] / record["seconds"]["p50"]


def roofs(records: Sequence[Record]) -> Roofs:
    """Least, median and largest measurement of every ceiling."""
    values: dict[str, list[float]] = {}
    for record in records:
        for name, rate in collection.ceilings(record).items():
            values.setdefault(name, []).append(rate)
    return {name: (min(rates), float(np.median(rates)), max(rates)) for name, rates in values.items()}


def _crowded_on_the_right(axis: Any, points: Points, starts: float, roof: float) -> bool:
    """Whether a text above the right end of a roof would cover more points than one above its left end."""
    height = style.fraction(axis, (starts, roof))[1]
    places = [style.fraction(axis, point) for point in points]
    near = [x for x, y in places if height - 0.05 < y < height + 0.2]
    left = style.fraction(axis, (starts, roof))[0]
    return sum(x > 1.0 - TEXT for x in near) > sum(left < x < left + TEXT for x in near)


def _draw_copy(
    axis: Any, rates: tuple[float, float, float], peak: float, points: Points, unit: float
) -> None:
    """The sloped roof, with its name where it is farthest from points."""
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    low, rate, high = rates
    ends = np.array([left, min(right, peak / rate)])
    axis.plot(ends, ends * rate / unit, color="black", linewidth=1.2)
    axis.fill_between(ends, ends * low / unit, ends * high / unit, color="black", alpha=0.12, linewidth=0)
    first, last = max(ends[0], bottom * unit / rate), min(ends[1], top * unit / rate)
    if first >= last:
        return
    places = [first * (last / first) ** part for part in (0.05, 0.25, 0.45, 0.6)]
    taken = [style.fraction(axis, place) for place in points]

    def free(x: float) -> float:
        at = style.fraction(axis, (x, x * rate / unit))
        return min((math.dist(at, place) for place in taken), default=1.0)

    x = max(places, key=free)
    axis.text(
        x, x * rate / unit * (top / bottom) ** 0.035, f"copy {rate / GIGA:.4g} GB/s",
        rotation=math.degrees(math.atan(rate / unit)), transform_rotates_text=True, rotation_mode="anchor",
        clip_on=True, **style.LEGIBLE,
    )  # fmt: skip


def _draw_roofs(axis: Any, ceilings: Roofs, points: Points, unit: float, name: str) -> None:
    """The roofs with their names; `points` are those that the panel will show."""
    left, right = axis.get_xlim()
    if "copy" in ceilings:
        peak = max((rates[1] for key, rates in ceilings.items() if key in ROOFS), default=math.inf)
        _draw_copy(axis, ceilings["copy"], peak, points, unit)
    for key in (key for key in ROOFS if key in ceilings):
        low, rate, high = ceilings[key]
        starts = max(left, rate / ceilings["copy"][1]) if "copy" in ceilings else left
        axis.plot([starts, right], [rate / unit] * 2, color="black", linewidth=1.2)
        axis.fill_between([starts, right], low / unit, high / unit, color="black", alpha=0.12, linewidth=0)
        begin = max(starts, left * (right / left) ** TEXT) if "copy" in ceilings else left  # beside its name
        here = _crowded_on_the_right(axis, points, begin, rate / unit)
        axis.annotate(
            f"{ROOFS[key]} {rate / unit:.3g} {name}", (begin if here else right, rate / unit),
            xytext=(4 if here else -4, 6), textcoords="offset points", ha="left" if here else "right",
            annotation_clip=True, **style.LEGIBLE,
        )  # fmt: skip


def _draw_cases(axis: Any, cases: Sequence[CaseRecords], unit: float) -> None:
    """A column of points per case, and a legend of the providers above the panel."""
    looks = style.styles(record for case in cases for record in case.values())
    for case in cases:
        shown = [record for record in case.values() if collection.measured(record)]
        xs, ys = zip(*map(point, shown), strict=True)
        axis.plot([xs[0]] * 2, [min(ys) / unit, max(ys) / unit], color=style.GREY, linewidth=0.6, zorder=2)
        for record, x, y in zip(shown, xs, ys, strict=True):
            colour, marker = looks[record["provider"]]
            mine, thin = collection.role(record) == "ours", marker in style.FLOOR_MARKERS
            axis.plot(
                [x], [y / unit], linestyle="none", marker=marker, color=colour, label=record["provider"],
                markersize=9 if mine or thin else 6, zorder=4 if mine else 3, gid="point",
                markeredgewidth=1.6 if thin else 0.5, markeredgecolor=colour if thin else "white",
            )  # fmt: skip
    handles = {line.get_label(): line for line in axis.lines if line.get_gid() == "point"}
    axis.legend(
        handles.values(), handles.keys(), ncols=LEGEND_COLUMNS, fontsize=style.SMALL, frameon=False,
        loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.1, columnspacing=1.2, handletextpad=0.3,
    )  # fmt: skip
    axis.set_title(
        next(iter(cases[0].values()))["op"], loc="left", fontsize=10, fontweight="bold",
        pad=8 + 1.4 * style.SMALL * math.ceil(len(handles) / LEGEND_COLUMNS),
    )  # fmt: skip


def _limits(axis: Any, cases: Sequence[CaseRecords], ceilings: Roofs, unit: float) -> None:
    """Every panel has its own range of rates, whose top is above the roof over its points."""
    ys = [point(record)[1] for case in cases for record in case.values() if collection.measured(record)]
    peaks = sorted(rates[2] for key, rates in ceilings.items() if key in ROOFS)
    top = next((peak for peak in peaks if peak >= 0.8 * max(ys)), max([*ys, *peaks[-1:]]))
    high = max(top, max(ys))
    low = min(min(ys) / 1.3, high / 5)
    axis.set_ylim(low / unit, high * (high / low) ** 0.2 / unit)


def _named(cases: Sequence[CaseRecords]) -> list[int]:
    """The cases that get a name: all, or of many, those nearest to and farthest from the ceiling."""
    if len(cases) <= NAMED:
        return list(range(len(cases)))
    shares = [collection.fraction_of_ceiling(mine) or 0.0 for mine in map(collection.ours, cases) if mine]
    order = sorted(range(len(cases)), key=lambda i: shares[i])
    return sorted(order[: NAMED // 2] + order[-NAMED // 2 :])


def _panel(
    axis: Any, cases: Sequence[CaseRecords], ceilings: Roofs, unit: float, name: str, height: float
) -> None:
    _limits(axis, cases, ceilings, unit)
    style.plain_ticks(axis.yaxis)
    axis.grid(alpha=0.25, which="major")
    everyone = [point(r) for case in cases for r in case.values() if collection.measured(r)]
    _draw_roofs(axis, ceilings, [(x, y / unit) for x, y in everyone], unit, name)
    _draw_cases(axis, cases, unit)
    mine = [point(record) for record in map(collection.ours, cases) if record]
    names, which = collection.labels(cases), _named(cases)
    if len(which) < len(cases):
        axis.set_xlabel(f"named: the {NAMED} of {len(cases)} cases nearest to and farthest from the ceiling",
                        fontsize=style.SMALL, color=style.GREY)  # fmt: skip
    points = [(mine[i][0], mine[i][1] / unit) for i in which]
    style.label_right(axis, points, [names[i] for i in which], height)


def _ridge(ceilings: Roofs) -> float:
    """The intensity above which the highest product rate is the bound."""
    if "copy" not in ceilings or len(ceilings) < 2:
        return math.inf
    return max(rates[1] for key, rates in ceilings.items() if key != "copy") / ceilings["copy"][1]


def draw(title: str, ops: Sequence[Sequence[CaseRecords]]) -> Figure:
    """A panel per operation, log-log, over the same intensities; cases are named beside the panel, at their
    points of ours. The bands around the roofs are the least and largest of their measurements."""
    shown = [r for cases in ops for case in cases for r in case.values() if collection.measured(r)]
    ceilings = roofs(shown)
    unit, name = (TERA, "TFLOP/s") if max(point(r)[1] for r in shown) > TERA else (GIGA, "GFLOP/s")
    heights = [max(2.0, 0.3 + style.LINE * min(len(cases), NAMED)) for cases in ops]
    note = NOTE if "copy" in ceilings else NOTE + NO_COPY
    figure = style.figure(1.2 + sum(0.75 + height for height in heights), title, shown, note)
    axes = figure.subplots(len(ops), 1, height_ratios=heights, squeeze=False, sharex=True)[:, 0]
    xs = [point(record)[0] for record in shown]
    for axis, cases, height in zip(axes, ops, heights, strict=True):
        axis.set(xscale="log", yscale="log", ylabel=name)
        axis.set_xlim(min(min(xs) / 2, _ridge(ceilings) / 2.5), max(xs) * 2)
        _panel(axis, cases, ceilings, unit, name, height)
    style.plain_ticks(axes[-1].xaxis)
    below = axes[-1].get_xlabel()
    axes[-1].set_xlabel("arithmetic intensity (FLOP/byte)" + (f"\n{below}" if below else ""), fontsize=10)
    return figure
