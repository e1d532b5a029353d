# SPDX-License-Identifier: Apache-2.0
"""Where launches are so small that the CUDA backend was measured to be faster than Triton.

measured_choice.json holds, for an architecture and an op, the most work of a call up to which that is so, and
the record that shows it; `python -m benchmarks.choose` writes it. Without an entry Triton is preferred; while
there is none at all, choices are made without this module.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .candidate import Call, Candidate, remembers_choices

TABLE = Path(__file__).with_suffix(".json")
SLOWER, FASTER = "triton", "cuda"


@remembers_choices
@functools.cache
def entries() -> dict[tuple[str, str], dict[str, Any]]:
    """The entries of the table by (architecture, op)."""
    return {(entry["arch"], entry["op"]): entry for entry in json.loads(TABLE.read_text())["entries"]}


def work(call: Call) -> int | None:
    """Multiplications of the base product of a LoRA linear, or `Call.work` of other ops."""
    if call.shape is not None:
        return call.shape.rows * call.shape.d_in * call.shape.d_out
    return call.work


def outperformed(op: str, candidate: Candidate, call: Call, others: Iterable[Candidate]) -> str | None:
    """Why one of `others` was measured to be faster than `candidate` for `call`, or None."""
    if candidate.backend != SLOWER:
        return None
    entry = entries().get((call.arch or "", op))
    if entry is None or (size := work(call)) is None or size > entry["work"]:
        return None
    if not any(other.backend == FASTER and other.supports(call) is None for other in others):
        return None
    return f"{FASTER!r} was measured to be faster up to work {entry['work']:.3g} ({entry['record']})"
