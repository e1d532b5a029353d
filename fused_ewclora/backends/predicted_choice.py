# SPDX-License-Identifier: Apache-2.0
"""Where the machine model predicts the CUDA backend to be clearly faster than Triton, until it is measured.

predicted_choice.json holds, for an architecture, an op, a matmul precision and ranks up to a limit, both
predicted times and what they are for, and for the base product of the LoRA linear the share of BLAS that
Triton's kernel is predicted to reach; `python -m fused_ewclora compile-report --targets --cubin ... --write`
writes it (docs/triton.md). What `measured_choice` knows about an op on an architecture wins.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import measured_choice
from .candidate import Call, Candidate, remembers_choices

TABLE = Path(__file__).with_suffix(".json")
SLOWER, FASTER = measured_choice.SLOWER, measured_choice.FASTER
CLEARLY = 0.8  # the model is rough: what takes a larger share of the other's time is not called faster


@remembers_choices
@functools.cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(TABLE.read_text())
    return found


@remembers_choices
@functools.cache
def entries() -> dict[tuple[str, str, str | None], dict[str, Any]]:
    """The entries of the table by (architecture, op, matmul precision)."""
    return {(entry["arch"], entry["op"], entry["precision"]): entry for entry in _table()["entries"]}


def product_share(arch: str, op: str) -> float | None:
    """The share of the rate of BLAS that Triton's product of `op` is predicted to reach, or None."""
    found: float | None = _table()["products"].get(arch, {}).get(op)
    return found


def outperformed(op: str, candidate: Candidate, call: Call, others: Iterable[Candidate]) -> str | None:
    """Why one of `others` is predicted to be faster than `candidate` for `call`, or None."""
    arch = call.arch or ""
    if candidate.backend != SLOWER or (arch, op) in measured_choice.entries():
        return None
    entry = entries().get((arch, op, call.precision))
    if entry is None or call.rank is None or call.rank > entry["rank"]:
        return None
    if not any(other.backend == FASTER and other.supports(call) is None for other in others):
        return None
    return (
        f"{FASTER!r} is predicted to be faster, {entry['cuda_us']:.0f} us against "
        f"{entry['triton_us']:.0f} us for {entry['shape']} (machine model of one {entry['machine']}; not "
        "measured)"
    )


def derived(table: dict[str, Any]) -> dict[str, Any]:
    """The content of predicted_choice.json from the table of targets.

    CUDA is preferred for an op and a precision where it is clearly faster in every row that has both
    backends, up to the largest rank among them.
    """
    groups: dict[tuple[str, str], dict[tuple[str, int], dict[str, Any]]] = {}
    for row in table["rows"]:
        if row["precision"] is not None and row["rank"] is not None:
            pair = groups.setdefault((row["op"], row["precision"]), {}).setdefault(
                (row["shape"], row["rank"]), {}
            )
            pair[row["backend"]] = row
    made = []
    for (op, precision), pairs in groups.items():
        both = [pair for pair in pairs.values() if {SLOWER, FASTER} <= set(pair)]
        faster = all(pair[FASTER]["seconds"] <= CLEARLY * pair[SLOWER]["seconds"] for pair in both)
        # What decides is fp32 F: no call says what dtype its F has.
        if not faster or not any("fp32 F" in pair[SLOWER]["shape"] for pair in both):
            continue
        rank, pair = max(
            ((pair[SLOWER]["rank"], pair) for pair in both if "fp32 F" in pair[SLOWER]["shape"]),
            key=lambda found: found[0],
        )
        made.append({
            "arch": table["arch"],
            "op": op,
            "precision": precision,
            "rank": rank,
            "cuda_us": round(1e6 * pair[FASTER]["seconds"], 1),
            "triton_us": round(1e6 * pair[SLOWER]["seconds"], 1),
            "shape": pair[SLOWER]["shape"],
            "machine": table["machine"],
        })  # fmt: skip
    return {"entries": made, "products": {table["arch"]: _products(table)}}


def _products(table: dict[str, Any]) -> dict[str, float]:
    """For each op with a base product, the mean of its floors over its predicted times."""
    shares: dict[str, list[float]] = {}
    for row in table["rows"]:
        if row["algorithm"] == "prologue" and row["kernels"] == ["lora_linear_kernel"]:
            shares.setdefault(row["op"], []).append(1 / row["ratio"])
    return {op: round(sum(found) / len(found), 2) for op, found in shares.items()}


def write(table: dict[str, Any], path: Path) -> None:
    """Writes what `derived` makes of the table of targets."""
    made = derived(table)
    lines = ",\n".join("  " + json.dumps(entry) for entry in made["entries"])
    entries_text = f"[\n{lines}\n ]" if lines else "[]"
    path.write_text(f'{{\n "entries": {entries_text},\n "products": {json.dumps(made["products"])}\n}}\n')
