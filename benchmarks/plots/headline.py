# SPDX-License-Identifier: Apache-2.0
"""What elastic weight consolidation costs, fused and otherwise: bars of times over ours."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from .. import collection
from ..case import OURS
from ..collection import CaseRecords, Record
from ..headline import Panel
from . import style

NOTE = (
    "Median times over those of fused_ewclora on the CPU, checked against fp64. Grey: work without EWC, the "
    "best that can be expected."
)
HEIGHT = 2.5  # inches


def draw(title: str, pairs: Sequence[tuple[Panel, CaseRecords]]) -> Figure:
    """Bars of times over ours, a panel per case."""
    records = [case[name] for panel, case in pairs for name in (OURS, *panel.others)]
    figure = style.figure(HEIGHT, title, records, NOTE)
    axes = figure.subplots(1, len(pairs))
    for axis, (panel, case) in zip(axes, pairs, strict=True):
        ours = case[OURS]["seconds"]["p50"]
        names = {**panel.others, OURS: "fused_ewclora"}
        for y, provider in enumerate(names):
            ratio = case[provider]["seconds"]["p50"] / ours
            axis.barh(y, ratio, height=0.72, color=_colour(case[provider]), gid=provider)
            axis.annotate(
                f"{collection.digits(ratio)} × " if provider != OURS else collection.time_text(ours),
                (ratio, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=style.SMALL,
            )  # fmt: skip
        axis.set_yticks(range(len(names)), list(names.values()), fontsize=style.SMALL)
        axis.set_title(panel.title, fontsize=style.SMALL + 0.5)
        axis.margins(x=0.3)
        axis.set_xticks([])
        for side in ("top", "right", "bottom"):
            axis.spines[side].set_visible(False)
    return figure


def _colour(record: Record) -> str:
    role = collection.role(record)
    return {"ours": style.OURS_STYLE[0], "floor": style.GREY}.get(role, style.COLOURS[0])
