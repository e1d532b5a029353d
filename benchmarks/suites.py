"""The suites: their operations, and how their cases are listed and built, for CPUs and GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import (
    breakdowns,
    end_to_end,
    ewc_penalty,
    fisher_accumulate,
    growth,
    lora_linear,
    merge,
    registry,
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


def _of_registry(module: Any, **more: Any) -> Suite:
    return Suite(module.OPS, lambda preset: registry.workloads(module.OPS, preset), module.build, **more)


SUITES: dict[str, Suite] = {
    "ewc_penalty": _of_registry(ewc_penalty),
    "fisher_accumulate": _of_registry(fisher_accumulate),
    "lora_linear": _of_registry(lora_linear),
    "merge": _of_registry(merge),
    "end_to_end": _of_registry(end_to_end, after=breakdowns.add),
    "growth": Suite(growth.OPS, growth.plan, growth.build, share=0.3),
}
