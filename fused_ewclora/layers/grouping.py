"""Tables with one row for many parts that are alike, such as the experts of a mixture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .parts import Part

MAX_RANGES = 4  # in one name
Row = dict[str, Any]


def grouped_rows(entries: Iterable[tuple[Part | None, Row]], added: Sequence[str]) -> list[Row]:
    """Rows whose parts differ only by their index, and that are equal but for their name and the columns in
    `added`, become one row, in which these are sums."""
    rows: dict[tuple[Any, ...], Row] = {}
    indices: dict[tuple[Any, ...], list[int]] = {}
    for part, row in entries:
        name, others = row["name"], tuple(value for key, value in row.items() if key not in ("name", *added))
        if part is None or part.index is None or part.name != f"{part.index}.{part.leaf}":
            rows[(name, others)] = row
            continue
        owner, _, rest = name.rpartition(part.name)
        key = (owner, part.leaf + rest, others)
        if key in rows:
            for column in added:
                rows[key][column] += row[column]
        rows.setdefault(key, row)
        indices.setdefault(key, []).append(part.index)
    for key, found in indices.items():
        rows[key]["name"] = f"{key[0]}{_ranges(found)}.{key[1]}"
    return list(rows.values())


def _ranges(indices: list[int]) -> str:
    """`0-2,5`, or of many ranges `0-63 (17)`."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and index == ranges[-1][-1] + 1:
            ranges[-1][1:] = [index]
        else:
            ranges.append([index])
    if len(ranges) > MAX_RANGES:
        return f"{min(indices)}-{max(indices)} ({len(indices)})"
    return ",".join("-".join(map(str, ends)) for ends in ranges)
