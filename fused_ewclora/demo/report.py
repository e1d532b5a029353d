# SPDX-License-Identifier: Apache-2.0
"""Tables, the conclusion in words, and the JSON record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..literals import Protocol
from ..metrics import PROTOCOLS
from .environment import versions
from .files import replace_text
from .protocol import Result
from .spread import Spread

PLAIN, EWC = "LoRA", "EWC-LoRA"
METHODS = (PLAIN, EWC)
SHOWN = {
    "A_last_sample_weighted": "A_last",
    "A_avg_sample_weighted": "A_avg",
    "forgetting_max": "forgetting",
    "bwt": "BWT",
    "plasticity": "new task",
}
GOAL = 0.30  # target of the demo: backward transfer smaller than that of plain LoRA by this share


def of_method(results: list[Result], method: str) -> list[Result]:
    """The runs of one method, in the order of the seeds."""
    return sorted((r for r in results if r.method == method), key=lambda r: r.seed)


def aggregate(results: list[Result]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """method -> protocol -> metric -> mean and std over the seeds."""
    out: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for method in METHODS:
        summaries = [r.metrics.summary() for r in of_method(results, method)]
        out[method] = {protocol: {} for protocol in PROTOCOLS}
        for protocol in PROTOCOLS:
            for name in summaries[0][protocol]:
                values = [s[protocol][name] for s in summaries]
                known = [v for v in values if v is not None]
                if len(known) == len(values):
                    spread = Spread.of(known)
                    out[method][protocol][name] = {"mean": spread.mean, "std": spread.deviation or 0.0}
    return out


def matrix_text(results: list[Result], method: str, protocol: Protocol) -> str:
    """The mean accuracy matrix over the seeds: row = after training task t, column = accuracy on task i."""
    mean = np.mean([r.metrics.matrix(protocol) for r in of_method(results, method)], axis=0)
    lines = [
        f"  {method}, {protocol.replace('_', '-')} accuracy in % (row: after task, column: on task), mean"
    ]
    lines.append("        " + "".join(f"{i + 1:7d}" for i in range(len(mean))))
    for t, row in enumerate(mean):
        lines.append(f"  {t + 1:6d}" + "".join(f"{value:7.1f}" for value in row[: t + 1]))
    return "\n".join(lines)


def metrics_text(summary: dict[str, Any], seeds: int) -> str:
    """One line per method and protocol."""
    lines = [f"  mean +- standard deviation over {seeds} seed{'s' if seeds > 1 else ''}, in %"]
    lines.append(f"  {'protocol':18s} {'method':9s}" + "".join(f"{title:>15s}" for title in SHOWN.values()))
    for protocol in PROTOCOLS:
        for method in METHODS:
            values = summary[method][protocol]
            cells = "".join(f"{values[k]['mean']:8.2f} +-{values[k]['std']:5.2f}" for k in SHOWN)
            lines.append(f"  {protocol.replace('_', '-'):18s} {method:9s}{cells}")
    return "\n".join(lines)


def cost_text(rows: list[dict[str, Any]]) -> str:
    """Time and peak memory of a step, fused and plain."""
    lines = ["  one training step (forward, backward, penalty), medians of interleaved repeats"]
    for row in rows:
        shape = ", ".join(f"{key} {row[key]}" for key in ("dim", "blocks", "tokens", "batch", "rank"))
        lines.append(f"  {row['model']} ({shape})")
        lines.append(
            f"    time         fused {row['fused_ms']:9.2f} ms    plain {row['plain_ms']:9.2f} ms    "
            f"plain / fused {row['plain_ms'] / row['fused_ms']:.2f}"
        )
        lines.append(
            f"    peak memory  fused {row['fused_peak_mib']:9.2f} MiB   "
            f"plain {row['plain_peak_mib']:9.2f} MiB   "
            f"plain / fused {row['plain_peak_mib'] / row['fused_peak_mib']:.2f}"
        )
    return "\n".join(lines)


def compare(summary: dict[str, Any]) -> dict[str, float | bool]:
    """The comparison in numbers: the reduction of backward transfer, and the gain in final accuracy."""
    plain, ewc = (summary[m]["class_incremental"] for m in METHODS)
    bwt_plain, bwt_ewc = plain["bwt"]["mean"], ewc["bwt"]["mean"]
    smaller = (abs(bwt_plain) - abs(bwt_ewc)) / abs(bwt_plain) if bwt_plain else 0.0
    gain = ewc["A_last_sample_weighted"]["mean"] - plain["A_last_sample_weighted"]["mean"]
    return {"bwt_reduction": smaller, "a_last_gain": gain, "goal_reached": smaller >= GOAL and gain >= 0.0}


def conclusion(summary: dict[str, Any], tasks: int, seeds: int) -> str:
    """The results in words, whether the goal is reached or not."""
    claim = compare(summary)
    plain, ewc = (summary[m]["class_incremental"] for m in METHODS)
    change, gain = float(claim["bwt_reduction"]), float(claim["a_last_gain"])
    a_plain, a_ewc = (values["A_last_sample_weighted"]["mean"] for values in (plain, ewc))
    new_plain, new_ewc = (values["plasticity"]["mean"] for values in (plain, ewc))
    text = (
        f"After {tasks} tasks and over {seeds} seed{'s' if seeds > 1 else ''}, plain LoRA lost "
        f"{-plain['bwt']['mean']:.1f} points of accuracy on its earlier tasks and EWC-LoRA "
        f"{-ewc['bwt']['mean']:.1f}: backward transfer is {abs(change):.0%} "
        f"{'smaller' if change >= 0 else 'LARGER'} with EWC.\n"
        f"The final accuracy on all classes is {a_ewc:.1f} % instead of {a_plain:.1f} % "
        f"({gain:+.1f} points).\n"
        f"The accuracy on a task just learned, the price of stability, is {new_ewc:.1f} % instead of "
        f"{new_plain:.1f} %."
    )
    if claim["goal_reached"]:
        return f"{text}\nEWC kept more of the earlier tasks, and the final accuracy is not lower."
    missed = []
    if change < GOAL:
        missed.append(f"a backward transfer at least {GOAL:.0%} smaller")
    if gain < 0.0:
        missed.append("a final accuracy that is not lower")
    return (
        f"{text}\nThis run falls short of {' and of '.join(missed)}. "
        "A larger --ewc-lambda protects more and learns less."
    )


def record(results: list[Result], **rest: Any) -> dict[str, Any]:
    """All data of the tables, as plain containers."""

    def rows(r: Result, protocol: Protocol) -> list[list[float]]:
        return [list(row[: t + 1]) for t, row in enumerate(r.metrics.matrix(protocol).tolist())]

    runs = [
        {
            "method": r.method,
            "seed": r.seed,
            "ewc_lambda": r.ewc_lambda,
            "classes": r.classes,
            "test_sizes": r.metrics.test_sizes,
            "matrices": {protocol: rows(r, protocol) for protocol in PROTOCOLS},
            "metrics": r.metrics.summary(),
            "penalties": r.penalties,
            "train_seconds": r.train_seconds,
            "fisher_seconds": r.fisher_seconds,
        }
        for r in results
    ]
    return {**rest, "versions": versions(), "runs": runs}


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Writes the record; a reader never sees half a file."""
    replace_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")
