# SPDX-License-Identifier: Apache-2.0
"""Host times of one case as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..collection import verdict_of
from ..harness import Record
from .case import HostCase

HEAD = f"  {'caller':34}{'p50 us':>10} {'[p20, p80]':>22}{'ours/this':>11}{'launches':>10}{'error':>10}"


def _line(record: Record, ours: float) -> str:
    name = f"  {record['provider']:34}"
    if "failed" in record:
        return f"{name}  {record['failed']}"
    p20, p50, p80 = (record["seconds"][key] * 1e6 for key in ("p20", "p50", "p80"))
    launches = "" if record["launches"] is None else record["launches"]
    error = record["results"] if record["error_fp64"] is None else f"{record['error_fp64']:.1e}"
    return (
        f"{name}{p50:10.1f} {f'[{p20:.1f}, {p80:.1f}]':>22}{ours / p50 * 1e6:11.2f}{launches:>10}  {error:>8}"
    )


def lines(title: str, case: HostCase, records: Sequence[Record], rows: Sequence[Record]) -> list[str]:
    """A line per caller with the time of ours over it, and a line per target."""
    medians = (r["seconds"]["p50"] for r in records if r["provider"] == case.ours and "seconds" in r)
    ours = next(medians, math.nan)
    return ["", title, HEAD, *(_line(record, ours) for record in records)] + [
        f"  {verdict_of(row)}: {row['target']} (ratio {row['ratio']:.3f}, limit {row['limit']:.3f})"
        for row in rows
    ]
