# SPDX-License-Identifier: Apache-2.0
"""Records of one case as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .case import OURS
from .collection import verdict_of
from .harness import Record

HEAD = (
    f"  {'provider':33}{'p50 ms':>9} {'[p20, p80]':>19}{'peer/ours':>11}{'GFLOP/s':>9}{'GB/s':>7}"
    f"{'ceiling':>9}{'peak MiB':>10}{'error':>10}"
)


def _share(record: Record) -> str:
    share = record["fraction_of_ceiling"]
    return "" if share is None else f"{share:.0%}"


def _line(record: Record, ours: float) -> str:
    name = f"  {record['provider']:33}"
    if "failed" in record:
        return f"{name}  {record['failed']}"
    p20, p50, p80 = (record["seconds"][key] * 1e3 for key in ("p20", "p50", "p80"))
    peak = record.get("peak_bytes")
    error = "floor" if record["error_fp64"] is None else f"{record['error_fp64']:.1e}"
    return (
        f"{name}{p50:9.3f} {f'[{p20:.3f}, {p80:.3f}]':>19}{p50 / 1e3 / ours:11.2f}"
        f"{record['gflops_per_second']:9.1f}{record['gbytes_per_second']:7.1f}{_share(record):>9}"
        f"{'' if peak is None else f'{peak / 2**20:.1f}':>10}{error:>10}"
    )


def _breakdown(record: Record) -> str:
    parts = [f"{name} {share:.0%}" for name, share in record["breakdown"].items() if share >= 0.03]
    return f"  {record['provider']}: {', '.join(parts)}"


def lines(title: str, records: Sequence[Record], rows: Sequence[Record]) -> list[str]:
    """A line per provider with its ratio to ours; breakdowns of times; a line per target."""
    ours = next((r["seconds"]["p50"] for r in records if r["provider"] == OURS and "seconds" in r), math.nan)
    output = ["", title, HEAD, *(_line(record, ours) for record in records)]
    output += [_breakdown(record) for record in records if "breakdown" in record]
    return output + [
        f"  {verdict_of(row)}: {row['target']} (ratio {row['ratio']:.3f}, limit {row['limit']:.3f})"
        for row in rows
    ]
