# SPDX-License-Identifier: Apache-2.0
"""The targets of the runs, and whether they are reached."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from fused_ewclora.demo.spread import Spread

from ..collection import Record
from .groups import Group, by_basis, group

SUITE, CHOSEN = "language", "EWC-LoRA"
FORGETTING, GAIN, STEP = 0.75, 0.0, 0.0  # limits of the three targets
PASS, SHORT, MISSING = "PASS", "FALLS SHORT", "NOT MEASURED"
CIL, TIL, A_LAST = "class_incremental", "task_aware", "A_last_sample_weighted"
Goal = dict[str, Any]


def goals(records: Iterable[Record], suite: str = SUITE, chosen: str | None = None) -> list[Goal]:
    """The targets of EWC-LoRA against LoRA in a suite, each as a dict:

        goal     what is to be shown, in words
        target   limit of the value
        bound    "most" or "least": on which side of the limit the value must be
        value    result of the runs; None when methods or seeds are missing
        met      whether the target is reached; None without a value
        details  means, deviations and differences within seeds, one sentence each; or what is missing

    chosen: the method of the first two targets; without it the one called "EWC-LoRA", or else the middle one
    of the lambdas, the lower of two. Only seeds that all compared methods have count. Runs of several
    problems, adapters or trainings are not compared with each other: each of them has targets of its own.
    """
    comparable = _comparable([entry for entry in group(records) if entry.suite == suite])
    both = [some for some in comparable if {entry.kind for entry in some} == {"LoRA", "EWCLoRA"}]
    return [goal for some in both or comparable or [[]] for goal in _goals(some, suite, chosen)]


def lines_of_lambda(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups that differ only in lambda: LoRA, where it was run, and EWC-LoRAs by lambda."""
    all_lines = []
    for some in _comparable(groups):
        plain = [entry for entry in some if entry.kind == "LoRA"][:1]
        lines: dict[str, list[Group]] = {}
        for entry in some:
            if entry.kind == "EWCLoRA":
                rest = {name: value for name, value in entry.options.items() if name != "ewc_lambda"}
                lines.setdefault(json.dumps(rest, sort_keys=True), []).append(entry)
        all_lines += [[*plain, *line] for line in lines.values()]
    return all_lines


def verdict(goal: Goal) -> str:
    """PASS, SHORT or MISSING."""
    return MISSING if goal["met"] is None else PASS if goal["met"] else SHORT


def _comparable(groups: Iterable[Group]) -> list[list[Group]]:
    """LoRA and EWC-LoRA on the same problem, with the same adapters and training and no other protocol."""
    return by_basis(entry for entry in groups if entry.kind in ("LoRA", "EWCLoRA") and not entry.protocol)


def _goals(groups: Sequence[Group], suite: str, chosen: str | None) -> list[Goal]:
    plain = next((entry for entry in groups if entry.kind == "LoRA"), None)
    line = _line(lines_of_lambda(groups), chosen)
    ewc = _chosen([entry for entry in line if entry.kind == "EWCLoRA"], chosen)
    name = ewc.name if ewc else chosen or CHOSEN
    open_goals = [
        _goal(f"{suite}: backward transfer of {name} over that of LoRA, class-incremental", FORGETTING),
        _goal(f"{suite}: task-aware final accuracy of {name} minus that of LoRA, in points", GAIN, "least"),
        _goal(f"{suite}: forgetting rises in no step from LoRA to the largest lambda; largest rise", STEP),
    ]
    if plain is None or ewc is None:
        missing = [text for entry, text in ((plain, "LoRA"), (ewc, name)) if entry is None]
        return [{**goal, "details": [f"no runs of {' and of '.join(missing)}"]} for goal in open_goals]
    pair = _with_common_seeds([plain, ewc])
    several = len(line) > 2  # LoRA and two lambdas
    return [
        _forgetting(open_goals[0], pair),
        _gain(open_goals[1], pair),
        _monotone(open_goals[2], _with_common_seeds(line))
        if several
        else {**open_goals[2], "details": ["a single lambda"]},
    ]


def _goal(words: str, target: float, bound: str = "most") -> Goal:
    return {"goal": words, "target": target, "bound": bound, "value": None, "met": None, "details": []}


def _judged(goal: Goal, value: float, details: Sequence[str]) -> Goal:
    met = value <= goal["target"] if goal["bound"] == "most" else value >= goal["target"]
    return {**goal, "value": value, "met": met, "details": list(details)}


def _line(lines: Sequence[list[Group]], chosen: str | None) -> list[Group]:
    """The line with the chosen method, otherwise the one with the most lambdas."""
    for line in lines:
        if (chosen or CHOSEN) in [entry.method for entry in line]:
            return line
    return max(lines, key=len, default=[]) if chosen is None else []


def _chosen(of_line: Sequence[Group], chosen: str | None) -> Group | None:
    wanted = next((entry for entry in of_line if entry.method == (chosen or CHOSEN)), None)
    if wanted or chosen or not of_line:
        return wanted
    return of_line[(len(of_line) - 1) // 2]


def _with_common_seeds(groups: Sequence[Group]) -> list[Group]:
    common = set.intersection(*(set(entry.seeds) for entry in groups))
    return [entry.of_seeds(sorted(common)) for entry in groups] if common else []


def _forgetting(goal: Goal, pair: Sequence[Group]) -> Goal:
    if (spreads := _metrics(pair, CIL, "bwt")) is None:
        return {**goal, "details": ["no seed that both have, or a single task"]}
    plain, ewc = spreads
    details = [*_means("backward transfer", pair, spreads), _paired("backward transfer", pair, spreads)]
    if plain.mean >= 0.0:
        return {**goal, "details": [*details, "LoRA forgot nothing: there is no ratio"]}
    # With the signs of both: a method that forgets nothing has a ratio of at most 0.
    return _judged(goal, ewc.mean / plain.mean, details)


def _gain(goal: Goal, pair: Sequence[Group]) -> Goal:
    if (spreads := _metrics(pair, TIL, A_LAST)) is None:
        return {**goal, "details": ["no seed that both have"]}
    plain, ewc = spreads
    details = [
        *_means("task-aware final accuracy", pair, spreads),
        _paired("task-aware final accuracy", pair, spreads),
    ]
    return _judged(goal, ewc.mean - plain.mean, details)


def _monotone(goal: Goal, line: Sequence[Group]) -> Goal:
    if (spreads := _metrics(line, CIL, "bwt")) is None:
        return {**goal, "details": ["no seed that all have, or a single task"]}
    steps = [_paired("backward transfer", line[i : i + 2], spreads[i : i + 2]) for i in range(len(line) - 1)]
    rises = [before.mean - after.mean for before, after in pairwise(spreads)]
    return _judged(goal, max(rises), [*_means("backward transfer", line, spreads), *steps])


def _metrics(groups: Sequence[Group], protocol: str, name: str) -> list[Spread] | None:
    spreads = [entry.metric(protocol, name) for entry in groups]
    known = [spread for spread in spreads if spread is not None]
    return known if groups and len(known) == len(spreads) else None


def _means(what: str, groups: Sequence[Group], spreads: Sequence[Spread]) -> list[str]:
    seeds = f"seed{'s' if len(groups[0].seeds) > 1 else ''} {', '.join(map(str, groups[0].seeds))}"
    return [
        f"{what} of {entry.name}: {text(spread, 2)} (lambda {entry.ewc_lambda:g}; {seeds})"
        for entry, spread in zip(groups, spreads, strict=True)
    ]


def _paired(what: str, pair: Sequence[Group], spreads: Sequence[Spread]) -> str:
    differences = Spread.of([b - a for a, b in zip(spreads[0].values, spreads[1].values, strict=True)])
    values = ", ".join(f"{value:+.2f}" for value in differences.values)
    return f"{pair[1].name} minus {pair[0].name}, {what} seed by seed: {values}; mean {text(differences, 2)}"


def text(spread: Spread | None, digits: int = 1) -> str:
    """Mean and deviation; only the mean for one seed or where all seeds agree; a dash without a value."""
    if spread is None:
        return "–"
    mean = f"{round(spread.mean, digits) + 0.0:,.{digits}f}"  # + 0: no "-0.0"
    return f"{mean} ± {spread.deviation:.{digits}f}" if len(set(spread.values)) > 1 else mean
