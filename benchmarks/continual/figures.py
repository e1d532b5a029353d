# SPDX-License-Identifier: Apache-2.0
"""The pictures of pictures.py, drawn with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..collection import Record
from ..plots import style
from .groups import MIB, REFERENCE, Group
from .targets import CIL, TIL, lines_of_lambda
from .tradeoff import FORGETTING, PLASTICITY, front, means

ACROSS, LEGEND_COLUMNS = 3, 3  # panels of matrices, names
HATS = (style.OURS_STYLE[0], *style.COLOURS)
LOOKS = tuple(  # colours first, then again with other lines; markers all differ
    (HATS[i % len(HATS)], ("o", *style.MARKERS)[i], "-" if i < len(HATS) else "--") for i in range(12)
)
ACCURACY_HEIGHT = 4.9  # inches
NAMES = {CIL: "class-incremental", TIL: "task-aware"}


def _records(groups: Sequence[Group]) -> list[Record]:
    return [record for group in groups for record in group.records]


def _seeds(groups: Sequence[Group]) -> str:
    """The seeds of the means: those of most methods, then the exceptions."""
    seeds_by_name = {group.name: ", ".join(map(str, group.seeds)) for group in groups}
    usual = max(seeds_by_name.values(), key=list(seeds_by_name.values()).count)
    others = [f"{name}: {seeds}" for name, seeds in seeds_by_name.items() if seeds != usual]
    return f"seeds {usual} ({'; '.join(others)})" if others else f"seeds {usual}"


def matrices(title: str, groups: Sequence[Group], protocol: str) -> Figure:
    """Mean accuracy after task t (row) on task i (column), a panel per method, on one scale of colours."""
    accuracies = [group.matrix(protocol) for group in groups]
    tasks = max(len(matrix) for matrix in accuracies)
    across = min(ACROSS, len(accuracies))
    down = math.ceil(len(accuracies) / across)
    size = min(0.92 * style.WIDTH / across, 0.75 + 0.42 * tasks)  # inches, of a panel
    note = (
        f"Row: after this task. Column: on this task. Means over {_seeds(groups)}. All panels have one scale "
        "of colours."
    )
    figure = style.figure(1.2 + down * (size * 0.86 + 0.25), title, _records(groups), note)
    axes = figure.subplots(down, across, squeeze=False)
    low, high = (
        min(np.nanmin(matrix) for matrix in accuracies),
        max(np.nanmax(matrix) for matrix in accuracies),
    )
    scale = {"vmin": 10.0 * math.floor(low / 10.0), "vmax": 10.0 * math.ceil(high / 10.0)}
    digits = 1 if size / tasks > 0.33 else 0  # what fits into a cell
    for axis, group, matrix in zip(axes.flat, groups, accuracies, strict=False):
        shown = axis.imshow(matrix, cmap="viridis", aspect="auto", **scale)
        axis.set_title(group.name, fontsize=style.SMALL + 1)
        axis.set_gid(group.name)
        ticks = range(len(matrix))
        axis.set_xticks(ticks, [str(i + 1) for i in ticks], fontsize=style.SMALL - 1)
        axis.set_yticks(ticks, [str(i + 1) for i in ticks], fontsize=style.SMALL - 1)
        axis.tick_params(length=0)
        for t, i in zip(*np.tril_indices(len(matrix)), strict=True):
            dark = shown.norm(matrix[t, i]) < 0.6
            axis.text(i, t, f"{matrix[t, i]:.{digits}f}", ha="center", va="center",
                      fontsize=style.SMALL - 1.0, color="white" if dark else "black")  # fmt: skip
        for side in axis.spines.values():
            side.set_visible(False)
    for axis in axes.flat[len(accuracies) :]:
        axis.set_visible(False)
    figure.colorbar(shown, ax=axes, shrink=min(1.0, 2.5 / down + 0.2), aspect=30, label="accuracy (%)")
    return figure


def accuracy(title: str, groups: Sequence[Group]) -> Figure:
    """Sample-weighted accuracy on all tasks so far, over tasks: means, bands of a standard deviation, names
    and last means beside the lines. Plain LoRA is grey, for comparison."""
    note = (
        f"Lines: means over {_seeds(groups)}; bands: a standard deviation to either side. Accuracy is "
        "weighted by the tasks' test examples. Beside the lines: the last mean."
    )
    figure = style.figure(ACCURACY_HEIGHT, title, _records(groups), note)
    axes = figure.subplots(1, 2)
    longest = max(group.tasks for group in groups)
    looks = _accuracy_looks(groups)
    for axis, protocol in zip(axes, (CIL, TIL), strict=True):
        ends, texts = [], []
        for group, (colour, marker) in zip(groups, looks, strict=True):
            curves = group.curves(protocol)
            x, mean = np.arange(1, group.tasks + 1), curves.mean(axis=0)
            if len(curves) > 1:
                apart = curves.std(axis=0, ddof=1)
                axis.fill_between(x, mean - apart, mean + apart, color=colour, alpha=0.1, linewidth=0.0)
            axis.plot(x, mean, color=colour, marker=marker, linewidth=1.8, markersize=5.0, gid=group.name)
            ends.append((float(x[-1]), float(mean[-1])))
            texts.append(f"{mean[-1]:.1f} {group.name}")
        axis.set_title(f"{NAMES[protocol]}", fontsize=10)
        axis.set(xlabel="tasks learned", xticks=range(1, longest + 1))
        axis.grid(alpha=0.25)
        style.label_right(axis, ends, texts, ACCURACY_HEIGHT - 1.7, [colour for colour, _ in looks])
    axes[0].set_ylabel("accuracy on all tasks so far (%)")
    return figure


def _accuracy_looks(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """A colour and a marker for every group, none twice: LoRA is grey."""
    others = zip(HATS, ("o", *style.MARKERS), strict=False)
    return [(style.GREY, ".") if group.kind == REFERENCE else next(others) for group in groups]


def over_lambda(title: str, groups: Sequence[Group]) -> Figure:
    """Backward transfer and accuracies over lambda; LoRA is lambda 0, left of a gap in the axis."""
    note = (
        f"Large: means over {_seeds(groups)}, bars: standard deviations; small: single seeds. LoRA is lambda "
        "0, beyond the gap in the axis."
    )
    figure = style.figure(4.9, title, _records(groups), note)
    axes = figure.subplots(1, 2)
    lambdas = [group.ewc_lambda for group in groups]
    zero = min(value for value in lambdas if value > 0.0) / 10.0
    places = [value or zero for value in lambdas]
    panels = (
        ("backward transfer (points)", ((CIL, "bwt", NAMES[CIL]), (TIL, "bwt", NAMES[TIL]))),
        ("class-incremental accuracy (%)", (
            (CIL, "A_last_sample_weighted", "all tasks, after the last"),
            (CIL, "plasticity", "a task just learned"),
        )),
    )  # fmt: skip
    for axis, (label, curves) in zip(axes, panels, strict=True):
        for (protocol, name, words), (colour, marker, _) in zip(curves, LOOKS, strict=False):
            spreads = [group.metric(protocol, name) for group in groups]
            known = [(x, spread) for x, spread in zip(places, spreads, strict=True) if spread is not None]
            for x, spread in known:
                beside = [0.9 * x] * len(spread.values)
                axis.plot(beside, spread.values, color=colour, marker=marker, markersize=3,
                          linestyle="none", alpha=0.4)  # fmt: skip
            axis.errorbar(
                [x for x, _ in known], [s.mean for _, s in known],
                yerr=[s.deviation or 0.0 for _, s in known], color=colour, marker=marker, markersize=7,
                capsize=3, linewidth=1.5, label=words, gid=f"{protocol} {name}",
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_xlim(zero / 2.0, max(places) * 2.0)
        axis.set_xticks(places, [_short(value) for value in lambdas])
        axis.minorticks_off()
        if 0.0 in lambdas:
            _gap(axis, zero * math.sqrt(10.0))
        axis.set(xlabel="lambda", ylabel=label)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=style.SMALL)
    return figure


def tradeoff(title: str, groups: Sequence[Group]) -> Figure:
    """Accuracy on a task just learned over forgetting: EWC-LoRAs joined by lambda, other methods as points,
    and the front of the best of them."""
    note = (
        f"Means over {_seeds(groups)}; bars: standard deviations. Best is the upper left corner. Lines join "
        "the lambdas of EWC-LoRA; the dashed one is the front, the methods that no other one dominates."
    )
    figure, legend, axes = _panels(5.2, title, _records(groups), note, 1, len(groups), 1)
    (axis,) = axes
    for line in lines_of_lambda(groups):
        axis.plot(*zip(*map(means, line), strict=True), color=style.GREY, linewidth=1.2, zorder=1,
                  gid="lambda")  # fmt: skip
    axis.plot(*zip(*map(means, front(groups)), strict=True), color="black", linestyle="--", linewidth=0.8,
              zorder=1, gid="front")  # fmt: skip
    for number, group in enumerate(groups):
        colour, marker, _ = LOOKS[number % len(LOOKS)]
        spreads = [group.metric(CIL, name) for name in (FORGETTING, PLASTICITY)]
        x_bar, y_bar = ((spread and spread.deviation) or 0.0 for spread in spreads)
        x, y = means(group)
        axis.errorbar([x], [y], xerr=x_bar, yerr=y_bar, color=colour, marker=marker, markersize=7, capsize=2,
                      linestyle="none", linewidth=0.8, label=group.name, gid=group.name)  # fmt: skip
    axis.set(xlabel="forgetting (points)", ylabel="accuracy on a task just learned (%)")
    axis.grid(alpha=0.25)
    _legend(legend, axis)
    return figure


def costs(title: str, records: Sequence[Record]) -> Figure:
    """Step time, memory, state and numbers of adapters over tasks, a line per method."""
    rounds = sorted({record["rounds"] for record in records})
    rounds_text = str(rounds[0]) if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    note = (
        f"Step time: median over {rounds_text} rounds, in which the states of all tasks took turns, of the "
        "ratio to the first task's. State: what a method keeps beside the plain model."
    )
    figure, legend, axes = _panels(7.8, title, records, note, 2, len(records))
    panels: tuple[tuple[str, Callable[[Record], list[Any]], str], ...] = (
        ("step time, ratio to the first task", lambda r: r["ratio_to_first"], "linear"),
        ("memory at a step's peak (MiB)", lambda r: _mib(r["step_peak_bytes"]), "linear"),
        ("state (MiB)", lambda r: _mib(r["state_bytes"]), "log"),
        ("numbers in adapters (thousands)", lambda r: [n / 1e3 for n in r["adapter_parameters"]], "log"),
    )  # fmt: skip
    for axis, (label, values, scale) in zip(axes, panels, strict=True):
        for record, (colour, marker, line) in zip(records, LOOKS, strict=False):
            x = range(1, record["tasks"] + 1)
            axis.plot(x, values(record), color=colour, marker=marker, linestyle=line, linewidth=1.6,
                      markersize=5, label=record["method"], gid=record["method"], alpha=0.85)  # fmt: skip
        axis.set(xlabel="task", ylabel=label, xticks=range(1, records[0]["tasks"] + 1), yscale=scale)
        if scale == "log":
            style.plain_ticks(axis.yaxis)
        axis.grid(alpha=0.25)
    axes[0].axhline(1.0, color="black", linewidth=0.8, zorder=0)
    _legend(legend, axes[0])
    return figure


def _mib(values: Sequence[int | None]) -> list[float]:
    return [math.nan if value is None else value / MIB for value in values]


def _panels(
    height: float, title: str, records: Sequence[Record], note: str, rows: int, names: int, columns: int = 2
) -> tuple[Figure, Any, list[Any]]:
    """A figure with `rows` of `columns` panels, and above them an empty axis for a legend of names."""
    above = 0.19 * math.ceil(names / LEGEND_COLUMNS) + 0.1
    figure = style.figure(height + above, title, records, note)
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[above, *[(height - 1.0) / rows] * rows])
    legend = figure.add_subplot(grid[0, :])
    legend.set_axis_off()
    return (
        figure,
        legend,
        [figure.add_subplot(grid[row, column]) for row in range(1, rows + 1) for column in range(columns)],
    )


def _legend(where: Any, axis: Any) -> None:
    """A legend for the lines of all panels, outside of them."""
    where.legend(*axis.get_legend_handles_labels(), loc="center", ncols=LEGEND_COLUMNS, fontsize=style.SMALL,
                 handlelength=3.0, frameon=False, borderaxespad=0.0)  # fmt: skip


def _short(value: float) -> str:
    """1000 or 1e5."""
    return f"{value:g}" if value < 1e4 else f"{value:.3g}".replace("e+0", "e").replace("e+", "e")


def _gap(axis: Any, x: float) -> None:
    """Two strokes through the axis at `x`."""
    for factor in (0.93, 1.07):
        axis.plot([x * factor], [0.0], marker=[(-0.4, -1.0), (0.4, 1.0)], markersize=9, color="black",
                  clip_on=False, transform=axis.get_xaxis_transform(), linestyle="none")  # fmt: skip
