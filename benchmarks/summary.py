# SPDX-License-Identifier: Apache-2.0
"""The summary of a GPU run: a table per op, and a row per target that says PASS or FALL SHORT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from . import records, registry
from .case import OURS
from .collection import verdict_of
from .extras import Unavailable
from .goals import Goal, row
from .harness import FLOOR, Record
from .place import AGAIN, CUDA

LABELS = (
    "model", "adapters", "vectors", "length", "rows", "samples", "tokens", "mode", "pass", "rank",
    "precision", "optimizer",
)  # fmt: skip
SHORT_OPS = {"lora_linear_slices": "k,v of", "soft_threshold": "threshold"}  # beside others in a suite
SHORT_VALUES = {"forward": "fwd", "backward": "bwd", "float32": "fp32", "bfloat16": "bf16"}
SHORT_NAMES = {
    registry.FROZEN: "frozen", registry.UNSLOTH: "Unsloth's", registry.COMPILED_COMPOSITION: "compile",
    FLOOR: "floor", "product of equal FLOPs": "product", "eager autograd": "eager",
    registry.COMPILED: "compile", "torch.func vmap(grad)": "vmap", registry.LOOP: "one by one",
    registry.EXPLICIT: "explicit", registry.WITHOUT: "no EWC", "frozen base": "frozen",
    "added to slices in place": "in place", registry.BATCH_MODE_PEERS[0]: "square and add",
    "addmm_ in the dtype of W": "addmm_", "product and sum in fp32": "fp32 sum", AGAIN: "again",
    CUDA: "cuda",
}  # fmt: skip
Case = Mapping[str, Record]


def by_case(results: Sequence[Record]) -> list[dict[str, Record]]:
    """Records grouped by case, by provider."""
    cases: dict[str, dict[str, Record]] = {}
    for record in results:
        cases.setdefault(records.key(record), {})[record["provider"]] = record
    return list(cases.values())


def label(record: Record) -> str:
    values = [str(record["shape"][name]) for name in LABELS if name in record["shape"]]
    op = [SHORT_OPS[record["op"]]] if record["op"] in SHORT_OPS else []
    dtype = record["dtype"].removeprefix("fisher ")
    return " ".join(SHORT_VALUES.get(value, value) for value in [*op, *values, dtype])


def line(case: Case) -> str:
    """Ours in microseconds, the prediction and ours over it, eager host time, share of the ceiling; then ours
    over each other provider."""
    first = next(iter(case.values()))
    ours = case.get(OURS, {})
    if "seconds" not in ours:
        reason = ours.get("failed") or first.get("failed") or "ours is missing"
        return f"  {label(first):42} FAILED {reason[:120]}"
    median = ours["seconds"]["p50"]
    host = ours.get("host_seconds")
    part = ours.get("fraction_of_ceiling")
    ratios = []
    for name, record in case.items():
        if name == OURS or record.get("failed", "").startswith(Unavailable.__name__):
            continue  # peers that are not installed are listed once, at the end
        short = SHORT_NAMES.get(name, name.replace(f"{OURS} triton:", ":"))
        ratios.append(
            f"{short} {median / record['seconds']['p50']:.2f}" if "seconds" in record else f"{short} FAILED"
        )
    guess = ours.get("predicted_seconds") or float("nan")
    times = f"{median * 1e6:9.1f} {guess * 1e6:9.1f} {median / guess:5.2f}"
    times += f" {host * 1e6 if host is not None else float('nan'):9.0f} {part or 0.0:5.2f}"
    # Everything should be captured in a graph: times of anything else include its launches.
    eager = {"events": " (not captured)", "wall": " (host's clock)"}.get(ours["timing"], "")
    return f"  {label(first):42}{times}{eager}  {' '.join(ratios)}"


def unavailable(suites: Mapping[str, Sequence[Record]]) -> list[str]:
    """What was not measured because it is not installed."""
    reasons = [r.get("failed", "") for results in suites.values() for r in results]
    return list(dict.fromkeys(why for why in reasons if why.startswith(Unavailable.__name__)))


def tables(suites: Mapping[str, Sequence[Record]]) -> list[str]:
    """All measured cases."""
    lines = []
    for suite, results in suites.items():
        if results:
            columns = "us, predicted us, measured / predicted, eager us, share of ceiling"
            lines += ["", f"{suite}: {columns}; ours / other (below 1: ours is faster)"]
            lines += [line(case) for case in by_case(results)]
    return lines


def targets(goals: Sequence[Goal], suites: Mapping[str, Sequence[Record]]) -> tuple[list[str], list[str]]:
    """Lines of the table of targets, and their verdicts."""
    lines, verdicts = ["", "targets: ours / other, limit"], []
    for goal in goals:
        result = row(goal, by_case(suites.get(goal.suite, [])))
        verdicts.append(verdict_of(result))
        lines.append(
            f"  {verdicts[-1]:12} {goal.target.name:52} {result['ratio']:8.3f}  limit {result['limit']:.3f}"
        )
    return lines, verdicts
