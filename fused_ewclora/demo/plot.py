# SPDX-License-Identifier: Apache-2.0
"""The picture of the demo: accuracy of both methods over tasks, mean and every seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..metrics import PROTOCOLS
from .palette import BLUE, ORANGE
from .protocol import Result
from .report import EWC, PLAIN, of_method

STYLES = {PLAIN: (ORANGE, "s"), EWC: (BLUE, "o")}


def plot(path: Path, results: list[Result], title: str) -> None:
    """Class-incremental and task-aware A_t (sample-weighted) after each task; thin lines are seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(PROTOCOLS))
    for axis, protocol in zip(axes, PROTOCOLS, strict=True):
        for method, (colour, marker) in STYLES.items():
            curves = np.array([r.metrics.curve(protocol=protocol) for r in of_method(results, method)])
            tasks = np.arange(1, curves.shape[1] + 1)
            for curve in curves:
                axis.plot(tasks, curve, color=colour, linewidth=0.8, alpha=0.4)
            mean = curves.mean(axis=0)
            axis.plot(tasks, mean, color=colour, marker=marker, linewidth=2.2, label=f"{method} (mean)")
            above = mean[-1] >= np.mean([r.metrics.curve(protocol=protocol)[-1] for r in results])
            axis.annotate(
                f"{mean[-1]:.1f}",
                (tasks[-1], mean[-1]),
                xytext=(7, 6 if above else -12),
                textcoords="offset points",
                color=colour,
            )
        axis.plot([], [], color="grey", linewidth=0.8, label="single seeds")
        axis.set_title(f"{protocol.replace('_', '-')} accuracy")
        axis.set_xlabel("tasks learned")
        axis.set_xticks(tasks)
        axis.set_xlim(0.8, tasks[-1] + 0.5)
        axis.margins(y=0.12)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on all classes so far (%)")
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
