# SPDX-License-Identifier: Apache-2.0
"""Which rows of a suite have equal accuracies although their options differ, said in a sentence each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from ..collection import Record
from .groups import Group, by_basis

INTRODUCTION = (
    "Rows that agree are different runs: their options differ, and that changed the answer to no test "
    "example of these seeds."
)


def sentences(groups: Sequence[Group]) -> list[str]:
    """One for every pair of comparable rows with equal accuracy matrices for some seed."""
    pairs = [pair for some in by_basis(groups) for pair in combinations(some, 2)]
    return [line for one, other in pairs if (line := _sentence(one, other))]


def markdown(groups: Sequence[Group]) -> list[str]:
    """The sentences as a list with its introduction; nothing where all rows differ."""
    lines = sentences(groups)
    return [INTRODUCTION, "", *(f"- {line}" for line in lines), ""] if lines else []


def _sentence(one: Group, other: Group) -> str | None:
    runs, others = ({record["seed"]: record for record in entry.records} for entry in (one, other))
    apart = {seed: _apart(runs[seed], others[seed]) for seed in runs if seed in others}
    equal = [seed for seed, points in apart.items() if points == 0.0]
    if not equal:
        return None
    options = ", ".join(_differences(one.options, other.options)) or "nothing but their classes"
    text = f"{one.name} and {other.name} agree for {_seeds(equal)}"
    if rest := [seed for seed in apart if seed not in equal]:
        text += f" and are at most {max(apart[seed] for seed in rest):.1f} points apart for {_seeds(rest)}"
    return f"{text}; they differ in {options}."


def _apart(one: Record, other: Record) -> float:
    """The largest difference of an accuracy after a task on a task, in points, under every protocol."""
    return max(
        abs(a - b)
        for protocol, matrix in one["matrices"].items()
        for row, other_row in zip(matrix, other["matrices"][protocol], strict=True)
        for a, b in zip(row, other_row, strict=True)
    )


def _differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Options that differ, as "name: value against value"."""
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return [
        f"`{name}` ({one.get(name, 'its default')} against {other.get(name, 'its default')})"
        for name in names
    ]


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
