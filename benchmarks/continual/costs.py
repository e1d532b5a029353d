# SPDX-License-Identifier: Apache-2.0
"""The cost of a training step at every task of a sequence: time, peak memory, and state of the method.

Steps of all tasks are timed in turns. In one long run the first and the last task would be minutes apart, and
the speed of a machine varies by more than the differences to be measured. So there is one model per task,
with the history of that task, and a round is one step of each in random order.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from fused_ewclora.demo.environment import timestamp
from fused_ewclora.demo.memory import peak_bytes
from fused_ewclora.errors import ArgumentError

from .. import machine
from .histories import LOOPED, QUICK, Batch, Network, State, prepared

Record = dict[str, Any]

TASKS = 10
ROUNDS = 60
FLAT = 1.03  # limit of the last value over the first one for costs that must not grow


def rounds_of(steps: Sequence[Callable[[], Any]], rounds: int, seed: int) -> list[list[float]]:
    """Seconds of every step in every round, `[steps][rounds]`; each round has its own order, so that
    no step always follows the same one."""
    order = random.Random(seed)
    seconds: list[list[float]] = [[] for _ in steps]
    collecting = gc.isenabled()
    gc.disable()  # a collection would distort the time of a step
    try:
        for _ in range(rounds):
            for number in order.sample(range(len(steps)), len(steps)):
                start = time.perf_counter()
                steps[number]()
                seconds[number].append(time.perf_counter() - start)
    finally:
        if collecting:
            gc.enable()
    return seconds


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """{"p20", "p50", "p80"}."""
    values = torch.tensor(seconds, dtype=torch.float64)
    return {f"p{percent}": values.quantile(percent / 100).item() for percent in (20, 50, 80)}


def ratios_to_first(seconds: Sequence[Sequence[float]]) -> list[float]:
    """The median over rounds of the time at a task over the time at the first task in the same round."""
    return [
        statistics.median(own / first for own, first in zip(task, seconds[0], strict=True))
        for task in seconds
    ]


def measure(
    name: str,
    kind: str,
    options: Mapping[str, Any],
    *,
    tasks: int = TASKS,
    rounds: int = ROUNDS,
    network: Network | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Record:
    """The costs of one method over `tasks` tasks, as a record (record_schema.json).

    kind and options: a method of `METHODS` and its keywords, or `LOOPED` with those of SDLoRA. Images are
    random, because costs depend only on shapes; the exception are the subspaces of InfLoRA, part of its
    state_bytes, whose sizes depend on the images. Raises `ArgumentError` for numbers that are not positive or
    an unknown kind, and `EWCLoRAError` for a state that fails its checks.

        >>> record = measure("LoRA", "LoRA", {}, tasks=2, rounds=3, network=QUICK)
    """
    for label, value in (("tasks", tasks), ("rounds", rounds)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{label}: expected an integer >= 1, got {value!r}")
    network, place = network or Network(), torch.device(device)
    states, batch = prepared(name, kind, options, tasks, network, place, seed)
    seconds = rounds_of([partial(state.step, batch) for state in states], rounds, seed)
    return {
        "cost": "step",
        "method": name,
        "kind": kind,
        "options": dict(options),
        "model": network.described(),
        "tasks": tasks,
        "step_seconds": [quantiles(samples) for samples in seconds],
        "ratio_to_first": ratios_to_first(seconds),
        "step_peak_bytes": [_peak(state, batch, place) for state in states],
        "state_bytes": [state.state_bytes() for state in states],
        "adapter_parameters": [state.adapter_parameters() for state in states],
        "rounds": rounds,
        "environment": machine.environment(place.type),
        "time": timestamp(),
    }


def _peak(state: State, batch: Batch, device: torch.device) -> int:
    """The peak of a step, including the gradients, which are allocated in it."""
    state.optimizer.zero_grad()
    return peak_bytes(lambda: state.step(batch), device)[1]


def methods(tasks: int) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, kind, options) of the methods that are measured."""
    return [
        ("LoRA", "LoRA", {}),
        ("EWC-LoRA", "EWCLoRA", {"ewc_lambda": 1.0}),
        ("SD-LoRA", "SDLoRA", {}),
        ("SD-LoRA-RR", "SDLoRA", {"ranks": [10, 10, 10, 10, 8, 8, 8, 8, 6]}),
        ("SD-LoRA, loop over tasks", LOOPED, {"normalization": "factors"}),
        ("CoDyRA", "CoDyRA", {}),
        ("InfLoRA", "InfLoRA", {"total_tasks": tasks}),
        ("KeepLoRA", "KeepLoRA", {"epsilon_w": 0.3, "epsilon_f": 0.5}),
        ("O-LoRA", "OLoRA", {}),
        ("N-LoRA", "NLoRA", {"lambda_1": 1e-5}),
        ("IEL", "IEL", {"beta": 1.0}),
        ("ITA", "ITA", {"alpha": 1.0}),
        ("P&M", "PerturbAndMerge", {}),
        ("CL-LoRA", "CLLoRA", {"shared": r"backbone\.blocks\.0\..*"}),
        ("Factor-EWC", "FactorEWC", {"ewc_lambda": 1.0}),
    ]


NAMES = tuple(name for name, _, _ in methods(TASKS))


def measure_all(
    names: Sequence[str] | None = None,
    *,
    device: str = "cpu",
    quick: bool = False,
    rounds: int | None = None,
) -> Iterator[Record]:
    """Records of the methods of these names, None for all, one after the other; quick: three tasks of a tiny
    model, few rounds."""
    tasks, usual, network = (3, 3, QUICK) if quick else (TASKS, ROUNDS, Network())
    rounds = usual if rounds is None else rounds
    for name, kind, options in methods(tasks):
        if not names or name in names:
            yield measure(name, kind, options, tasks=tasks, rounds=rounds, network=network, device=device)


class Target(NamedTuple):
    """A limit for a method: a value of its record, as a multiple of the same value at an earlier task."""

    method: str
    what: str
    limit: float
    value: Callable[[Record], float]


TARGETS = (
    Target("SD-LoRA", "time of a step at task 10, x task 1", 1.35, lambda r: float(r["ratio_to_first"][-1])),
    # Over all tasks: a single ratio of 60 rounds is uncertain by 2 %, as those of plain LoRA show.
    Target(
        "EWC-LoRA",
        "time of a step at task 10, x task 1, on the line through all tasks",
        FLAT,
        lambda r: trend(r["ratio_to_first"]),
    ),
    Target(
        "EWC-LoRA",
        "peak memory of a step, largest of 10 tasks, x task 1",
        FLAT,
        lambda r: _growth(r["step_peak_bytes"]),
    ),
    # Before the end of task 1 there is no Fisher.
    Target(
        "EWC-LoRA",
        "bytes kept, most of tasks 2 to 10, x task 2",
        FLAT,
        lambda r: _growth(r["state_bytes"][1:]),
    ),
)


def goals(records: Sequence[Record]) -> list[Record]:
    """{"goal", "target", "value", "met"} of every target, from the last record of its method over ten tasks;
    value and met are None where there is none."""
    last = {record["method"]: record for record in records if record.get("tasks") == TASKS}
    return [_judged(target, last.get(target.method)) for target in TARGETS]


def _judged(target: Target, record: Record | None) -> Record:
    value = None if record is None else target.value(record)
    met = None if value is None else value <= target.limit
    return {"goal": f"{target.method}: {target.what}", "target": target.limit, "value": value, "met": met}


def trend(ratios: Sequence[float]) -> float:
    """The last value over the first one on the least-squares line through all of them."""
    slope, first = np.polyfit(np.arange(len(ratios)), np.asarray(ratios), 1)
    return float(1.0 + slope * (len(ratios) - 1) / first)


def _growth(values: Sequence[int]) -> float:
    return max(values) / values[0]
