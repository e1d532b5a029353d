# SPDX-License-Identifier: Apache-2.0
"""Time over a swept size, with the exponents of the fits and of the model."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

from .. import scaling
from ..case import OURS
from . import style

HEIGHT = 4.6
NOTE = (
    "Points: medians, with p20 to p80. Lines: least squares in logarithms, the exponent with its standard "
    "error. Model: counted bytes or FLOPs at the measured ceilings."
)


def _text(curve: scaling.Curve) -> str:
    fit = curve.fit()
    return f"{curve.provider}: exponent {fit}" if fit else curve.provider


def draw(title: str, family: Sequence[scaling.Curve]) -> Figure:
    """One picture of curves that differ only in the provider: medians with p20 to p80, fits as thin lines,
    the model (bytes or FLOPs at the measured ceilings) dashed; names are at the right."""
    records = [record for curve in family for record in curve.records]
    looks = style.styles(records)
    first = next((curve for curve in family if curve.provider == OURS), family[0])
    figure = style.figure(HEIGHT + 0.9, title, records, NOTE)
    axis = figure.subplots()
    axis.set(xscale="log", yscale="log", ylabel="time (ms)", xlabel=first.field.replace("_", " "))
    ends, texts, colours = [], [], []
    for curve in family:
        colour, marker = looks[curve.provider]
        y = 1e3 * np.array(curve.seconds)
        around = [[r["seconds"][q] * 1e3 for r in curve.records] for q in ("p20", "p80")]
        axis.errorbar(
            curve.sizes, y, yerr=[y - around[0], around[1] - y], linestyle="none", marker=marker,
            color=colour, markersize=8 if curve.provider == OURS else 6, capsize=2, gid=curve.provider,
        )  # fmt: skip
        if fit := curve.fit():
            axis.plot(curve.sizes, [1e3 * fit.at(x) for x in curve.sizes], color=colour, linewidth=1.0)
        ends.append((curve.sizes[-1], float(y[-1])))
        texts.append(_text(curve))
        colours.append(colour)
    if model := scaling.model(first):
        axis.plot(first.sizes, 1e3 * np.array(model.seconds), color="black", linestyle="--", gid="model")
        ends.append((first.sizes[-1], 1e3 * model.seconds[-1]))
        texts.append(f"model ({model.bounds}): exponent {model.fit}")
        colours.append("black")
    sizes = sorted({size for curve in family for size in curve.sizes})
    axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    style.plain_ticks(axis.yaxis)
    axis.grid(alpha=0.25, which="major")
    style.label_right(axis, ends, texts, HEIGHT - 0.9, colours)
    return figure
