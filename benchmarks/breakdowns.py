# SPDX-License-Identifier: Apache-2.0
"""How the time of a call is divided among operations."""

from __future__ import annotations

import collections
from typing import Any

import torch

from fused_ewclora import profiling

from .case import Case, Run
from .harness import Record

NAMED = 12  # operations that a breakdown names; the others are summed as "other"


def _operation(event: Any) -> str:
    """The outermost operation of this library around an event (its op or its range), else the event's own
    name."""
    name, parent = str(event.name), event
    while parent is not None:
        if str(parent.name).startswith("fused_ewclora"):
            name = str(parent.name).partition("(")[0].replace("::", ".").removesuffix("_")
        parent = parent.cpu_parent
    return name


def breakdown(run: Run) -> dict[str, float]:
    """Shares of the CPU time of one call by operation, largest first. They include the overhead of
    torch.profiler per operation."""
    with (
        profiling.enable(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        run()
    spent: collections.Counter[str] = collections.Counter()
    for event in profile.events():
        spent[_operation(event)] += max(0.0, event.self_cpu_time_total)
    total = sum(spent.values()) or 1.0
    shares = {name: round(value / total, 4) for name, value in spent.most_common(NAMED)}
    return {**shares, "other": round(max(0.0, 1.0 - sum(shares.values())), 4)}


def add(case: Case, records: list[Record]) -> None:
    """Gives every measured record of the case its breakdown."""
    runs = {provider.name: provider.run for provider in case.providers}
    for record in records:
        if "seconds" in record and record["provider"] in runs:
            record["breakdown"] = breakdown(runs[record["provider"]])
