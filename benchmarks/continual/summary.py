# SPDX-License-Identifier: Apache-2.0
"""Runs in tables: a row per method of a suite, mean and standard deviation over its seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from fused_ewclora.demo.spread import Spread
from fused_ewclora.report import Report

from ..collection import Record
from ..report import table as markdown_table
from . import costs, recorded
from .groups import MIB, Group, by_suite, group, newest_costs
from .targets import CIL, SUITE, TIL, Goal, goals, text, verdict

__all__ = ["goals", "markdown", "overview", "render", "table"]
Row = dict[str, Any]
ACCURACY = "accuracy in percent, mean ± standard deviation over seeds"
EVERY = "accuracy in percent on all tasks, learned or not, mean ± standard deviation over seeds"
COSTS = "costs, mean ± standard deviation over seeds"


class Column(NamedTuple):
    """A column of a rendered table: the key of `table`'s rows, its heading and digits after the point."""

    key: str
    heading: str
    digits: int = 1
    same: str | None = None  # this column is left out where its values equal those of `same`


ACCURACIES = (
    Column("A_last", "A_last"),
    Column("A_last_task_mean", "A_last, mean of tasks", same="A_last"),
    Column("A_avg", "A_avg"),
    Column("A_avg_task_mean", "A_avg, mean of tasks", same="A_avg"),
    Column("forgetting", "forgetting"),
    Column("bwt", "BWT"),
    Column("new_task", "new task"),
    Column("aware_A_last", "task-aware A_last"),
    Column("aware_A_last_task_mean", "task-aware A_last, mean of tasks", same="aware_A_last"),
    Column("aware_bwt", "task-aware BWT"),
)
OF_EVERY = (
    Column("transfer", "Transfer"),
    Column("average", "Average"),
    Column("last", "Last"),
    Column("zero_shot", "zero-shot"),
    Column("zero_shot_transfer", "zero-shot, tasks from the second on"),
)
TIMES = ("step_ms", "prepare_seconds", "end_seconds")
OF_COSTS = (
    Column("step_ms", "step, ms"),
    Column("prepare_seconds", "before a task, s", 2),
    Column("end_seconds", "after a task, s", 2),
    Column("state_mib_first", "state, MiB, first task", 2),
    Column("state_mib_last", "last task", 2),
    Column("parameters_first", "adapter parameters, first task", 0),
    Column("parameters_last", "last task", 0),
)
METRICS = {
    "A_last": (CIL, "A_last_sample_weighted"),
    "A_last_task_mean": (CIL, "A_last_task_mean"),
    "A_avg": (CIL, "A_avg_sample_weighted"),
    "A_avg_task_mean": (CIL, "A_avg_task_mean"),
    "forgetting": (CIL, "forgetting_max"),
    "bwt": (CIL, "bwt"),
    "new_task": (CIL, "plasticity"),
    "aware_A_last": (TIL, "A_last_sample_weighted"),
    "aware_A_last_task_mean": (TIL, "A_last_task_mean"),
    "aware_bwt": (TIL, "bwt"),
    **{column.key: ("every_task", column.key) for column in OF_EVERY},
}
VALUES: dict[str, Callable[[list[Record]], float]] = {  # of the tasks of a run
    "step_ms": lambda tasks: statistics.median(task["step_ms"] for task in tasks),
    "prepare_seconds": lambda tasks: statistics.fmean(task["prepare_seconds"] for task in tasks),
    "end_seconds": lambda tasks: statistics.fmean(task["end_seconds"] for task in tasks),
    "state_mib_first": lambda tasks: tasks[0]["state_bytes"] / MIB,
    "state_mib_last": lambda tasks: tasks[-1]["state_bytes"] / MIB,
    "parameters_first": lambda tasks: tasks[0]["adapter_parameters"],
    "parameters_last": lambda tasks: tasks[-1]["adapter_parameters"],
}


def table(records: Iterable[Record]) -> list[Row]:
    """One row per suite, method and setting of it, with a `Spread` over seeds for every measure.

    Plain values are "suite", "method" (with its setting where there are several), "kind", "seeds",
    "seeds_of_suite" (how many different ones its suite has: a method with fewer is incomplete), "tasks" and
    "machines". Accuracies are in percent; unless named otherwise they are class-incremental and weighted by
    samples; "new_task" is that of a task just learned. Times are per step and per task; None for a method
    that ran on several machines. A measure that is not defined, such as BWT of one task, or Transfer where
    tasks are not tested before they are learned, is None.
    """
    return [_row(entry, of_suite) for of_suite in by_suite(group(records)).values() for entry in of_suite]


def _row(entry: Group, of_suite: Sequence[Group]) -> Row:
    def cost(key: str) -> Spread | None:
        if key in TIMES and len(entry.machines) > 1:
            return None
        return entry.over_seeds(lambda record: VALUES[key](record["tasks"]))

    return {
        "suite": entry.suite,
        "method": entry.name,
        "kind": entry.kind,
        "seeds": list(entry.seeds),
        "seeds_of_suite": len({seed for other in of_suite for seed in other.seeds}),
        "tasks": entry.tasks,
        "machines": entry.machines,
        **{key: entry.metric(*where) for key, where in METRICS.items()},
        **{key: cost(key) for key in VALUES},
    }


def _shown(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """The columns without averages that are redundant in every row."""
    return [column for column in columns if any(_apart(row[column.key], row, column) for row in rows)]


def _apart(value: Spread | None, row: Row, column: Column) -> bool:
    if column.same is None:
        return True
    other = row[column.same]
    pairs = zip(value.values, other.values, strict=True) if value and other else ()
    return any(abs(a - b) > 1e-6 for a, b in pairs)


def _cells(columns: Sequence[Column], row: Row) -> list[str]:
    of, held = len(row["seeds"]), row["seeds_of_suite"]
    seeds = str(of) if of == held else f"{of} of {held}"
    return [row["method"], seeds, str(row["tasks"]), *(text(row[c.key], c.digits) for c in columns)]


def _tables(rows: Sequence[Row]) -> list[tuple[str, list[str], list[list[str]], list[str]]]:
    """Title, headings, cells and notes of the tables of one suite."""
    tables = []
    every = OF_EVERY if any(row["last"] for row in rows) else ()
    for title, columns, notes in (
        (ACCURACY, ACCURACIES, []), (EVERY, every, []), (COSTS, OF_COSTS, _notes(rows)),
    ):  # fmt: skip
        if not columns:
            continue
        shown = _shown(columns, rows)
        heads = ["method", "seeds", "tasks", *(column.heading for column in shown)]
        tables.append((title, heads, [_cells(shown, row) for row in rows], notes))
    return tables


def _notes(rows: Sequence[Row]) -> list[str]:
    several = [row["method"] for row in rows if len(row["machines"]) > 1]
    return [f"Ran on several machines, hence without times: {', '.join(several)}."] if several else []


def render(rows: Sequence[Row]) -> str:
    """Tables for a terminal: accuracies and costs of every suite."""
    parts = []
    for suite in dict.fromkeys(row["suite"] for row in rows):
        for title, heads, cells, notes in _tables([row for row in rows if row["suite"] == suite]):
            # A heading may occur twice; the keys of a report's rows may not.
            keys = [head + " " * heads[:i].count(head) for i, head in enumerate(heads)]
            lines = [dict(zip(keys, line, strict=True)) for line in cells]
            parts.append(str(Report(f"{suite}: {title}", lines, notes)))
    return "\n\n".join(parts)


def markdown(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The same tables of the rows of one suite, by title, as lines of Markdown."""
    tables = {}
    for title, heads, cells, notes in _tables(rows):
        lines = [f"{title[0].upper()}{title[1:]}:", "", *markdown_table(heads, cells)]
        tables[title] = [*lines, *(part for note in notes for part in (note, ""))]
    return tables


def overview(records: Sequence[Record]) -> str:
    """Tables of the records, and the targets of their suites, for a terminal."""
    rows = table(records)
    judged = goals(records) if any(row["suite"] == SUITE for row in rows) else []
    judged += cost_goals(records) if recorded.costs(records) else []
    lines = [line for goal in judged for line in goal_lines(goal)]
    return "\n\n".join(
        [*([render(rows)] if rows else []), *(["\n".join(["targets", *lines])] if lines else [])]
    )


def cost_goals(records: Sequence[Record]) -> list[Goal]:
    """The targets of costs.py in the form of those of runs, for every machine and model with records of the
    whole stream of a method with targets."""
    whole = [some for some in newest_costs(records) if some[0]["tasks"] == costs.TASKS]
    judged = [costs.goals(some) for some in whole]
    known = [some for some in judged if any(goal["value"] is not None for goal in some)]
    return [{"bound": "most", "details": [], **goal} for some in known or [costs.goals([])] for goal in some]


def goal_lines(goal: Goal) -> list[str]:
    """A goal and its details, for a terminal."""
    head = f"  {verdict(goal):12} {goal['goal']}: {value_text(goal)} (target {target_text(goal)})"
    return [head, *(f"{'':15}{line}" for line in goal["details"])]


def value_text(goal: Goal) -> str:
    """Three digits after the point, or a dash."""
    return "–" if goal["value"] is None else f"{goal['value']:.3f}"


def target_text(goal: Goal) -> str:
    """The limit with ≤ or ≥."""
    return f"{'≤' if goal['bound'] == 'most' else '≥'} {goal['target']:g}"
