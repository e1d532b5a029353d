# SPDX-License-Identifier: Apache-2.0
"""Tables with one row for many parts that are alike, such as the experts of a mixture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
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


def abbreviated(rows: Iterable[Row], count: str, added: Sequence[str] = ()) -> list[Row]:
    """Rows that are equal but for numbers in their dotted names, and for the columns in `added`, become one
    row, named like `blocks.0-11.attn.qkv`; its column `count` is their number, and those in `added` are
    sums."""
    alike: dict[tuple[Any, ...], list[tuple[tuple[int, ...], Row]]] = {}
    for row in rows:
        parts = row["name"].split(".")
        numbers = tuple(int(part) for part in parts if _is_index(part))
        template = tuple(None if _is_index(part) else part for part in parts)
        others = tuple(value for key, value in row.items() if key not in ("name", *added))
        alike.setdefault((template, others), []).append((numbers, row))
    return [
        _joined(template, group, count, added)
        for (template, _), members in alike.items()
        for group in _blocks(members)
    ]


def _is_index(part: str) -> bool:
    return part.isascii() and part.isdigit()


def _blocks(members: list[tuple[tuple[int, ...], Row]]) -> Iterator[list[tuple[tuple[int, ...], Row]]]:
    """The members in groups whose numbers are all combinations of those at each place."""
    values = [{numbers[i] for numbers, _ in members} for i in range(len(members[0][0]))]
    if math.prod(map(len, values)) == len(members):
        yield members
        return
    place = next(i for i, found in enumerate(values) if len(found) > 1)
    for value in sorted(values[place]):
        yield from _blocks([member for member in members if member[0][place] == value])


def _joined(
    template: Sequence[str | None],
    members: list[tuple[tuple[int, ...], Row]],
    count: str,
    added: Sequence[str],
) -> Row:
    columns = zip(*(numbers for numbers, _ in members), strict=True)
    name = ".".join(_ranges(sorted(set(next(columns)))) if part is None else part for part in template)
    row = {"name": name, count: len(members)}
    for key, value in members[0][1].items():
        if key != "name":
            row[key] = sum(other[key] for _, other in members) if key in added else value
    return row


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
