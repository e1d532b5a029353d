"""A table that can be printed (`print(report)`) and whose rows are plain data (`report.rows`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


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

    def __str__(self) -> str:
        lines = [self.title]
        if self.rows:
            columns = list(self.rows[0])
            cells = [columns, *([_cell(row[column]) for column in columns] for row in self.rows)]
            widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
            numeric = [any(isinstance(row[c], (int, float)) for row in self.rows) for c in columns]
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
