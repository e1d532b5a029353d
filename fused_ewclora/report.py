# SPDX-License-Identifier: Apache-2.0
"""A table that can be printed (`print(report)`) and whose rows are plain data (`report.rows`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH = 100  # of lines with names, as far as these can be shortened
LEAST = 16  # characters that are left of a shortened text


def size_text(count: int) -> str:
    """A number of bytes, such as `1.50 MiB`."""
    size, units = float(count), iter(("bytes", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while size >= 1024 and unit != "TiB":
        size, unit = size / 1024, next(units)
    return f"{count} bytes" if unit == "bytes" else f"{size:.2f} {unit}"


def _shortened(text: str, width: int) -> str:
    """The text, without its middle where it is longer than `width`."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[head + 1 - width :]}"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (tuple, list)):
        return " ".join(map(_cell, value))
    return str(value)


@dataclass(frozen=True)
class Report:
    """A table, to be printed.

    Args:
        title: the first line.
        rows: dicts with the same keys, the columns.
        notes: lines below the table.
        summary: totals, which are not printed.
        table: where there are many rows, fewer that are printed in their place.

    Examples:
        >>> print(fe.Report("ranks", [{"name": "qkv", "r": 8}]))
        ranks
          name  r
          qkv   8
    """

    title: str
    rows: Sequence[dict[str, Any]]
    notes: Sequence[str] = ()
    summary: dict[str, Any] = field(default_factory=dict)
    table: Sequence[dict[str, Any]] | None = None

    def __repr__(self) -> str:
        return f"<Report {self.title!r}: {len(self.rows)} rows; print() shows them>"

    def __str__(self) -> str:
        lines = [self.title]
        rows = self.rows if self.table is None else self.table
        if rows:
            columns = list(rows[0])
            cells = [columns, *([_cell(row[column]) for column in columns] for row in rows)]
            widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
            if self.table is not None:
                widest = max(range(len(columns)), key=widths.__getitem__)
                excess = sum(widths) + 2 * len(columns) - WIDTH
                widths[widest] = min(widths[widest], max(widths[widest] - excess, LEAST))
                cells = [[_shortened(*pair) for pair in zip(line, widths, strict=True)] for line in cells]
            numeric = [any(isinstance(row[c], (int, float)) for row in rows) for c in columns]
            for line in cells:
                aligned = (
                    text.rjust(width) if right else text.ljust(width)
                    for text, width, right in zip(line, widths, numeric, strict=True)
                )
                lines.append("  " + "  ".join(aligned).rstrip())
        return "\n".join([*lines, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """All contents as plain containers, for JSON.

        Returns:
            A dict with the fields.
        """
        return {
            "title": self.title,
            "rows": [dict(row) for row in self.rows],
            "summary": dict(self.summary),
            "notes": list(self.notes),
        }
