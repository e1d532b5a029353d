# SPDX-License-Identifier: Apache-2.0
"""The suites: their operations, and how their cases are listed and built, for CPUs and GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from . import (
    breakdowns,
    end_to_end,
    ewc_penalty,
    fisher_accumulate,
    growth,
    l1_penalty,
    lora_linear,
    merge,
    registry,
    structured,
)
from .case import Case
from .harness import Record
from .place import Place
from .workload import Workload


class Suite(NamedTuple):
    """plan: the workloads of a preset; after: adds fields to measured records on a CPU; share: of the seconds
    per provider, less than 1 for curves, whose many points support each other."""

    ops: Sequence[str]
    plan: Callable[[str], list[Workload]]
    build: Callable[[Workload, Place], Case]
    after: Callable[[Case, list[Record]], None] = lambda case, records: None
    share: float = 1.0


def _of_registry(module: Any, others: Mapping[str, Any] | None = None, **more: Any) -> Suite:
    """The suite of a module, and of other operations with the modules that build them."""
    modules = {**dict.fromkeys(module.OPS, module), **(others or {})}
    ops = tuple(modules)

    def build(workload: Workload, place: Place) -> Case:
        case: Case = modules[workload.op].build(workload, place)
        return case

    return Suite(ops, lambda preset: registry.workloads(ops, preset), build, **more)


SUITES: dict[str, Suite] = {
    "ewc_penalty": _of_registry(ewc_penalty, {"structured_penalty": structured, "l1_penalty": l1_penalty}),
    "fisher_accumulate": _of_registry(fisher_accumulate, {"fisher_sums": structured}),
    "lora_linear": _of_registry(lora_linear),
    "merge": _of_registry(merge),
    "end_to_end": _of_registry(end_to_end, after=breakdowns.add),
    "growth": Suite(growth.OPS, growth.plan, growth.build, share=0.3),
}
