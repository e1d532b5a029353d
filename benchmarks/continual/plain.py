# SPDX-License-Identifier: Apache-2.0
"""Which methods of a suite do not beat plain LoRA, said of each in a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from fused_ewclora.demo.spread import Spread

from .groups import Group
from .targets import A_LAST, CIL, text

INTRODUCTION = (
    "Against plain LoRA, final class-incremental accuracy (A_last) seed by seed, in points; a difference "
    "that is smaller than its standard deviation over seeds is no improvement that these runs show:"
)


def sentences(groups: Sequence[Group]) -> list[str]:
    """One for every method that has seeds in common with the row "LoRA"; none without it."""
    plain = next((entry for entry in groups if entry.method == "LoRA"), None)
    if plain is None:
        return []
    return [line for entry in groups if entry is not plain and (line := _sentence(entry, plain))]


def markdown(groups: Sequence[Group]) -> list[str]:
    """The sentences as a list with its introduction."""
    lines = sentences(groups)
    return [INTRODUCTION, "", *(f"- {line}" for line in lines), ""] if lines else []


def _sentence(entry: Group, plain: Group) -> str | None:
    common = sorted(set(entry.seeds) & set(plain.seeds))
    if not common:
        return None
    ours, theirs = (some.of_seeds(common).metric(CIL, A_LAST) for some in (entry, plain))
    if ours is None or theirs is None:
        return None
    difference = Spread.of([a - b for a, b in zip(ours.values, theirs.values, strict=True)])
    seeds = f"{len(common)} seed{'s' if len(common) > 1 else ''}"
    if difference.mean <= 0.0:
        return f"{entry.name} does not beat LoRA: {text(difference)} ({seeds})."
    if difference.deviation is None or difference.mean < difference.deviation:
        return f"{entry.name} is not shown to beat LoRA: +{text(difference)} ({seeds})."
    return f"{entry.name} beats LoRA by {text(difference)} ({seeds})."
