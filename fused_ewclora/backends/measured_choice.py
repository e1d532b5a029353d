"""Where launches are so small that the CUDA backend was measured to be faster than Triton.

measured_choice.json holds, for an architecture and an op, the most work of a call up to which that is so, and
the record that shows it; `python -m benchmarks.choose` writes it. Without an entry Triton is preferred.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from .candidate import Call

TABLE = Path(__file__).with_suffix(".json")
SLOWER, FASTER = "triton", "cuda"


@functools.cache
def _entries(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(entry["arch"], entry["op"]): entry for entry in json.loads(path.read_text())["entries"]}


def work(call: Call) -> int | None:
    """Multiplications of the base product of a LoRA linear, or `Call.work` of other ops."""
    if call.shape is not None:
        return call.shape.rows * call.shape.d_in * call.shape.d_out
    return call.work


def outrun(op: str, call: Call) -> str | None:
    """Why the backend FASTER is expected to serve `call` sooner than SLOWER, or None."""
    entry = _entries(TABLE).get((call.arch or "", op))
    if entry is None or (size := work(call)) is None or size > entry["work"]:
        return None
    return f"{FASTER!r} was measured to be faster up to work {entry['work']:.3g} ({entry['record']})"
