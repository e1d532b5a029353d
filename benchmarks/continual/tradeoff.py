# SPDX-License-Identifier: Apache-2.0
"""Stability against plasticity: which methods learn new tasks better than all that forget as little."""

from __future__ import annotations

from collections.abc import Sequence

from ..report import DASH
from ..report import table as markdown_table
from .groups import Group, by_basis
from .targets import CIL, lines_of_lambda, text

PLASTICITY, FORGETTING = "plasticity", "forgetting_max"
A_LAST, A_AVG = "A_last_sample_weighted", "A_avg_sample_weighted"
WORDS = (
    "Stability against plasticity. New task: accuracy on a task right after it was learned, mean over "
    "tasks. Forgetting: loss from the best accuracy to the end. A method is on the front if no other one of "
    "the same problem, adapters and training is as good in both means and better in one."
)


def measured(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups that can be compared with each other, of every setting with a line over lambda; those of a
    single task forget nothing and are left out."""
    return [
        known
        for some in by_basis(groups)
        if any(len(line) > 2 for line in lines_of_lambda(some))
        and (known := [entry for entry in some if entry.metric(CIL, FORGETTING) is not None])
    ]


def means(entry: Group) -> tuple[float, float]:
    """(forgetting, accuracy on a task just learned), both in points, means over the seeds."""
    forgetting, plasticity = (entry.metric(CIL, name) for name in (FORGETTING, PLASTICITY))
    assert forgetting is not None and plasticity is not None
    return forgetting.mean, plasticity.mean


def front(groups: Sequence[Group]) -> list[Group]:
    """The groups that no other one dominates, by forgetting."""
    places = [means(entry) for entry in groups]
    kept = [
        (place, entry)
        for place, entry in zip(places, groups, strict=True)
        if not any(other[0] <= place[0] and other[1] >= place[1] and other != place for other in places)
    ]
    return [entry for _, entry in sorted(kept, key=lambda one: one[0])]


def table(groups: Sequence[Group]) -> list[str]:
    """The table of one setting, by forgetting."""
    best = front(groups)
    heads = ["method", "lambda", "seeds", "forgetting", "new task", "A_last", "A_avg", "on the front"]
    rows = [
        [
            entry.name, f"{entry.ewc_lambda:,.10g}" if entry.ewc_lambda else DASH, str(len(entry.seeds)),
            *(text(entry.metric(CIL, name)) for name in (FORGETTING, PLASTICITY, A_LAST, A_AVG)),
            "yes" if entry in best else "",
        ]
        for entry in sorted(groups, key=means)
    ]  # fmt: skip
    return markdown_table(heads, rows)


def markdown(groups: Sequence[Group]) -> list[str]:
    """The tables of a suite; nothing where lambda was not varied."""
    return [line for some in measured(groups) for line in (WORDS, "", *table(some))]
