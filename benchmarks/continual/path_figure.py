# SPDX-License-Identifier: Apache-2.0
"""The picture of path.py, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from ..collection import Record
from ..plots import style
from .figures import LOOKS
from .path import EARLIER, FIRST, NEW, SPLITS

PANELS = (FIRST, EARLIER, NEW)


def draw(records: Sequence[Record]) -> Figure:
    """Losses over the way from task 1 to the last: a column for the first task, for all tasks so far and for
    the new one, a row for training and for test examples; means over seeds, thin lines are single seeds."""
    note = (
        "From one number of tasks to the next the weights are interpolated on a straight line. Losses are "
        "task-aware; the new task is the one at the right end of a way."
    )
    title = f"{records[0]['suite']}: loss on the lines between tasks"
    figure = style.figure(6.2, title, records, note)
    axes = figure.subplots(len(SPLITS), len(PANELS), squeeze=False, sharex=True)
    methods = list(dict.fromkeys(record["method"] for record in records))
    for row, split in zip(axes, SPLITS, strict=True):
        for axis, of in zip(row, PANELS, strict=True):
            for method, (colour, _, line) in zip(methods, LOOKS * len(methods), strict=False):
                curves = [curve(r, of, split) for r in records if r["method"] == method]
                for values in curves if len(curves) > 1 else ():
                    axis.plot(places(records[0]), values, color=colour, linewidth=0.6, alpha=0.35)
                axis.plot(places(records[0]), np.mean(curves, axis=0), color=colour, linestyle=line,
                          linewidth=1.8, label=method, gid=method)  # fmt: skip
            axis.set_title(f"{of}, {split}", fontsize=style.SMALL + 1)
            axis.set_yscale("log")
            axis.grid(alpha=0.25)
            axis.set_xticks(range(1, len(records[0]["ways"]) + 2))
        row[0].set_ylabel("loss")
    for axis in axes[-1]:
        axis.set_xlabel("tasks learned")
    axes[0][0].legend(fontsize=style.SMALL)
    return figure


def places(record: Record) -> list[float]:
    """Where the points lie: a whole number is a number of tasks; NaN parts the ways, whose curves may jump
    where other tasks count."""
    return [x for way in record["ways"] for x in (*(way["from"] + 1.0 + p for p in way["places"]), np.nan)]


def curve(record: Record, of: str, split: str) -> list[float]:
    """The losses at `places`."""
    return [y for way in record["ways"] for y in (*way["values"][of][split]["loss"], np.nan)]
