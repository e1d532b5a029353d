# SPDX-License-Identifier: Apache-2.0
"""From loops of machine code and the work of a launch to the counts that the machine model takes.

The main loop runs as often as the launch says; other loops are counted once for every time that code reaches
them, which is reported. Where a test that executes the code counted what the text does not show (bank
conflicts, ways not taken), `Executed` corrects the main loop.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

from .machine_model import Counts, Phase
from .sass import Instruction, Loop, Step
from .work import Work


class Executed(TypedDict, total=False):
    """Executed counts of the main loop of a kernel, as JSON: for one iteration, instructions of a warp and
    wavefronts in shared memory of a block. `kernel` names it, `match` says for which constants and options
    (all that are given must agree; "arch" and "dtype" as well)."""

    kernel: str
    match: dict[str, Any]
    instructions: float
    shared_wavefronts: float


@dataclass(frozen=True)
class Main:
    """The main loop as the text has it, for one iteration: instructions of a warp, barriers and wavefronts of
    a block; `unknown`: loops outside whose trips nobody knows."""

    instructions: int = 0
    barriers: int = 0
    shared_wavefronts: float = 0
    drains: int = 0
    trips: float = 0
    unknown: int = 0
    units: Mapping[str, int] = field(default_factory=dict)


def counts(
    tree: Loop, work: Work, warps: int, blocks_per_multiprocessor: int, executed: Executed | None = None
) -> tuple[Counts, Main]:
    """Counts of one launch, and its main loop."""
    nest = main_nest(tree) if work.trips else (tree,)
    trips, share = _trips(work.trips, len(nest) - 1)
    runs = _runs(tree, nest, trips)
    main = nest[-1] if len(nest) > 1 else None
    loops, unknown = [], 0
    known = {id(loop) for loop in (*nest, *(version for version, _ in _versions(nest)))}
    for loop, times in runs:
        if times <= 0:
            continue
        unknown += id(loop) not in known
        conditional = work.rare if loop is tree else share if loop is main else 1.0
        phases = _phases(loop, warps, times, conditional)
        if loop is main and executed is not None:
            phases = _corrected(phases, loop, warps, executed)
        loops.append(tuple(phases))
    # What bulk copies bring is written to shared memory as well.
    bulk = main is not None and any(s.instruction.is_bulk_copy for s in main.own())
    found = Counts(
        work.blocks, blocks_per_multiprocessor, warps, tuple(loops), work.cache_bytes, work.memory_bytes,
        max(work.in_flight, 1.0), work.cache_bytes / 128 if bulk else 0.0,
    )  # fmt: skip
    return found, _described(main, warps, sum(times for loop, times in runs if loop is main), unknown)


def _described(main: Loop | None, warps: int, trips: float, unknown: int) -> Main:
    if main is None:
        return Main(unknown=unknown)
    own = [step.instruction for step in main.own()]
    return Main(
        len(own), sum(i.is_barrier for i in own), warps * sum(i.shared_wavefronts for i in own),
        sum(i.drains for i in own), trips, unknown, main.count(),
    )  # fmt: skip


def main_nest(tree: Loop) -> tuple[Loop, ...]:
    """The main loop with those around it: most products on the matrix units, else of the innermost loops the
    one with the most arithmetic and accesses to memory."""

    def weight(nest: Sequence[Loop]) -> tuple[float, float, int]:
        own = [step.instruction for step in nest[-1].own()]
        flops = sum(i.product.flops for i in own if i.product is not None)
        flops += sum(1 << 16 for i in own if i.unit == "tensor" and i.product is None)
        busy = 0 if nest[-1].inner else sum(i.unit in ("fma", "global") for i in own)
        return flops, busy, len(own)

    return max((nest for nest in tree.nest() if len(nest) > 1), key=weight, default=(tree,))


def _trips(wanted: tuple[float, ...], depth: int) -> tuple[tuple[float, ...], float]:
    """Trips of loops nested `depth` deep, and how often conditional code in the innermost one runs: where the
    code has fewer loops, what was the end of an inner loop has become a condition."""
    if depth == 0:
        return (), 1.0
    if depth >= len(wanted):
        return (*(1.0 for _ in range(depth - len(wanted))), *wanted), 1.0
    merged = math.prod(wanted[depth - 1 :])
    outer = math.prod(wanted[depth - 1 : -1])
    return (*wanted[: depth - 1], merged), (1.0 / wanted[-1] if outer > 1 and wanted[-1] > 0 else 1.0)


def _versions(nest: Sequence[Loop]) -> list[tuple[Loop, int]]:
    """The main loop and those beside it that are the same one, unrolled less, with the trips that one
    iteration of each makes; most unrolled first."""
    if len(nest) < 2:
        return []
    same = [loop for loop in nest[-2].inner if loop is nest[-1] or _ratio(nest[-1], loop) > 0]
    least = min(same, key=Loop.total)
    return sorted(((loop, max(_ratio(loop, least), 1)) for loop in same), key=lambda found: -found[1])


def _ratio(loop: Loop, other: Loop) -> int:
    """How many iterations of `other` one of `loop` does; 0 where they are different loops."""
    one, two = loop.count(), other.count()
    units = [unit for unit in ("tensor", "fma", "global") if one.get(unit) or two.get(unit)]
    ratios = {one.get(unit, 0) / max(two.get(unit, 0), 0.5) for unit in units}
    ratio = ratios.pop() if len(ratios) == 1 else 0.0
    return int(ratio) if ratio == int(ratio) else 0


def _runs(tree: Loop, nest: Sequence[Loop], trips: Sequence[float]) -> list[tuple[Loop, float]]:
    """How often each loop's body runs in a block."""
    versions = _versions(nest)
    found: list[tuple[Loop, float]] = []

    def visit(loop: Loop, times: float, depth: int) -> None:
        """`depth`: of the loop in the nest, -1 outside of it."""
        found.append((loop, times))
        beside_main = 0 <= depth == len(nest) - 2
        left = trips[-1] if beside_main else 0.0
        dealt: dict[int, float] = {}
        for version, each in versions if beside_main else ():
            dealt[id(version)] = float(int(left / each)) if each > 1 else left
            left -= each * dealt[id(version)]
        for inner in loop.inner:
            if id(inner) in dealt:
                visit(inner, times * dealt[id(inner)], depth + 1 if inner is nest[-1] else -1)
            elif depth >= 0 and depth + 1 < len(nest) and inner is nest[depth + 1]:
                visit(inner, times * trips[depth], depth + 1)
            else:
                visit(inner, times, -1)

    visit(tree, 1.0, 0)
    return found


def _phases(loop: Loop, warps: int, trips: float, share: float) -> list[Phase]:
    """One iteration, cut at barriers and where asynchronous products are waited for."""
    phases: list[Phase] = []
    part: list[Step] = []
    for step in loop.own():
        part.append(step)
        if step.instruction.is_barrier or step.instruction.drains:
            phases.append(_phase(part, warps, trips, share))
            part = []
    if part or not phases:
        phases.append(_phase(part, warps, trips, share))
    return phases


def _phase(steps: Iterable[Step], warps: int, trips: float, share: float) -> Phase:
    instructions: dict[str, float] = {}
    flops: dict[tuple[str, bool], float] = {}
    sums = dict.fromkeys(("shared", "cached", "barriers", "drains"), 0.0)
    for step in steps:
        instruction, times = step.instruction, 1.0 if step.certain else share
        instructions[instruction.unit] = instructions.get(instruction.unit, 0.0) + times
        if (product := instruction.product) is not None:
            key = (product.operands, product.asynchronous)
            flops[key] = flops.get(key, 0.0) + times * warps * product.flops
        sums["shared"] += times * warps * instruction.shared_wavefronts
        sums["cached"] += times * warps * instruction.cached_wavefronts
        sums["barriers"] += times * instruction.is_barrier
        sums["drains"] += times * instruction.drains
    return Phase(instructions, trips, flops, **sums)


def _corrected(phases: list[Phase], loop: Loop, warps: int, executed: Executed) -> list[Phase]:
    """The phases with the counts that were executed, spread as in the text."""
    own: list[Instruction] = [step.instruction for step in loop.own()]
    more = executed["instructions"] / len(own) if "instructions" in executed else 1.0
    static = warps * sum(i.shared_wavefronts for i in own)
    conflicts = executed["shared_wavefronts"] / static if "shared_wavefronts" in executed and static else 1.0
    return [
        replace(
            phase,
            instructions={unit: more * n for unit, n in phase.instructions.items()},
            shared=conflicts * phase.shared,
        )
        for phase in phases
    ]


def executed_for(found: Iterable[Executed], kernel: str, properties: Mapping[str, Any]) -> Executed | None:
    """The first record of executed counts that is about this kernel."""
    for one in found:
        agree = all(properties.get(name) == value for name, value in one.get("match", {}).items())
        if one["kernel"] == kernel and agree:
            return one
    return None
