# SPDX-License-Identifier: Apache-2.0
"""Predicts the time of a kernel from counts of its compiled code: a model, not a measurement.

A kernel takes as long as the resource that it uses most, of the multiprocessor that has most blocks, or as
one block after the other takes by itself, whichever is longer: resident blocks overlap perfectly, what a
block does between two barriers overlaps perfectly, and phases that barriers separate add up. What this leaves
out (conflicts that counts do not show, unequal blocks, misses of the instruction cache, a lower clock) makes
kernels slower, so predictions are optimistic. docs/triton.md, "Predictions".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..cost_model import LAUNCH, RATES


class Machine(NamedTuple):
    """Constants of a GPU; clocks are those of a multiprocessor, instructions those of a warp."""

    name: str
    multiprocessors: int
    clock: float  # Hz
    memory: float  # bytes/s of a copy, read and written
    cache: float  # bytes/s from the second-level cache to all multiprocessors
    half: float  # FLOP per clock of 16-bit products
    tf32: float
    synchronous: float  # share of these that mma.sync reaches
    blas: float  # FLOP/s of 16-bit products through BLAS
    issued: float = 4  # instructions per clock
    issued_by_warp: float = 0.5  # at most, by one warp: a dependent instruction waits for four clocks or more
    wavefronts: float = 1  # of 128 bytes per clock, shared memory and first-level cache together


# H200: 132 multiprocessors at 1.755 GHz (boost clock of the data sheet, base of NVIDIA's dense figures: 4096
# FLOP per clock in bf16 are 949 TFLOP/s). Bandwidth of a copy and BLAS were measured on one; the cache is
# assumed (published microbenchmarks of the H100 have 5.5 to 7 TB/s), and so is 0.62 for mma.sync (those
# benchmarks reach 62 % of the wgmma peak with it).
# A100: data sheet; all of its matrix instructions are mma.sync, bandwidth and BLAS as in `cost_model`.
MACHINES = {
    "sm_90": Machine(
        "H200", 132, 1.755e9, RATES["sm_90"].bandwidth, 7e12, 4096, 2048, 0.62, RATES["sm_90"].half
    ),
    "sm_80": Machine(
        "A100", 108, 1.41e9, RATES["sm_80"].bandwidth, 4e12, 2048, 1024, 1.0, RATES["sm_80"].half
    ),
}

# Instructions per clock of each unit, from the table of arithmetic throughput in the CUDA programming guide
# (lanes per clock / 32). `fma` also executes integer multiplications, which take two slots (`_pipes`).
THROUGHPUT = {"fma": 4.0, "alu": 2.0, "special": 0.5, "double": 2.0, "shuffle": 1.0}

# Clocks that a phase takes beyond its busiest resource, for what it waits for; assumed, near published
# latencies: a barrier, a first load from shared memory, a dependent mma.sync or shuffle, and the way of the
# last asynchronous product through the pipe until its accumulators can be read.
LATENCY = {"barrier": 30.0, "shared": 30.0, "tensor": 35.0, "shuffle": 25.0, "drain": 90.0}
MEMORY_LATENCY = 800.0  # clocks from DRAM under load; what is in flight meanwhile limits the bandwidth


@dataclass(frozen=True)
class Phase:
    """What a block does between two barriers, `trips` times.

    `instructions` by unit (`sass.UNITS`) are those of one warp; `flops` by (operands, asynchronous) and
    wavefronts, in shared memory and in the first-level cache, those of the block. `barriers` end it, or are
    inside (counts without phases); `drains` waits for asynchronous products.
    """

    instructions: Mapping[str, float]
    trips: float = 1
    flops: Mapping[tuple[str, bool], float] = field(default_factory=dict)
    shared: float = 0
    cached: float = 0
    barriers: float = 0
    drains: float = 0

    def issued(self) -> float:
        return sum(self.instructions.values())


@dataclass(frozen=True)
class Counts:
    """One launch. `loops` are the phases of one iteration each, in order. Bytes from the second-level cache
    are those of a block, those of DRAM of all blocks, `in_flight` what a block has asked for and not
    received, and `copied` the wavefronts in which bulk copies write its shared memory, while nobody waits."""

    blocks: int
    blocks_per_multiprocessor: int
    warps: int  # of a block
    loops: tuple[tuple[Phase, ...], ...]
    cache_bytes: float = 0
    memory_bytes: float = 0
    in_flight: float = math.inf
    copied: float = 0


class Prediction(NamedTuple):
    """Seconds of each resource, and of all: the largest, plus filling the machine once."""

    resources: dict[str, float]
    fill: float
    waves: float  # blocks over those that run side by side

    @property
    def limited_by(self) -> str:
        return max(self.resources, key=lambda name: self.resources[name])

    @property
    def seconds(self) -> float:
        return self.resources[self.limited_by] + self.fill


def predict(counts: Counts, machine: Machine) -> Prediction:
    """The time of a launch on an idle machine, without what the launch costs the host or the driver."""
    parallel = min(counts.blocks, machine.multiprocessors * max(counts.blocks_per_multiprocessor, 1))
    busiest = math.ceil(counts.blocks / machine.multiprocessors)  # blocks of one multiprocessor, in all
    phases = [phase for loop in counts.loops for phase in loop]
    clocks: dict[str, float] = {}
    for phase in phases:
        for name, used in _pipes(phase, counts.warps, machine).items():
            clocks[name] = clocks.get(name, 0.0) + phase.trips * busiest * used
    clocks["shared memory"] = clocks.get("shared memory", 0.0) + busiest * counts.copied / machine.wavefronts
    turns = math.ceil(busiest / max(counts.blocks_per_multiprocessor, 1))
    clocks["one block after the other"] = turns * sum(
        _chain(loop, counts.warps, machine) for loop in counts.loops
    )
    resources = {name: used / machine.clock for name, used in clocks.items()}
    share = machine.cache / machine.multiprocessors
    resources["second-level cache"] = busiest * counts.cache_bytes / share
    # Little's law: what is in flight, over the latency.
    reachable = parallel * counts.in_flight / (MEMORY_LATENCY / machine.clock)
    resources["memory"] = counts.memory_bytes / min(machine.memory, reachable)
    return Prediction(resources, MEMORY_LATENCY / machine.clock, counts.blocks / parallel)


def _pipes(phase: Phase, warps: int, machine: Machine) -> dict[str, float]:
    """Clocks that one block keeps each resource of a multiprocessor busy for."""
    used = {"issue": warps * phase.issued() / machine.issued}
    pipes = dict(phase.instructions)
    pipes["fma"] = pipes.get("fma", 0.0) + 2 * pipes.get("imad", 0.0)
    for unit, rate in THROUGHPUT.items():
        used[unit] = warps * pipes.get(unit, 0.0) / rate
    used["shared memory"] = (phase.shared + phase.cached) / machine.wavefronts
    used["tensor"] = _tensor(phase, machine, asynchronous=False) + _tensor(phase, machine, asynchronous=True)
    return used


def _tensor(phase: Phase, machine: Machine, asynchronous: bool) -> float:
    """Clocks of the products of one block. A pipe that never rests lowers the clock: what BLAS reaches is the
    most that asynchronous products reach."""
    peak = machine.multiprocessors * machine.clock * machine.half
    share = min(machine.blas / peak, 1.0) if asynchronous else machine.synchronous
    rates = {"half": machine.half, "tf32": machine.tf32, "other": machine.half}
    return sum(
        flops / (rates[operands] * share) for (operands, a), flops in phase.flops.items() if a is asynchronous
    )


def _chain(loop: tuple[Phase, ...], warps: int, machine: Machine) -> float:
    """Clocks of one block alone for all trips of a loop: what it waits for adds up."""
    if not loop:
        return 0.0
    now = done = 0.0  # of the block; of its asynchronous products
    start = 0.0
    for _ in range(2):  # the second iteration is one of many
        start = now
        for phase in loop:
            done = max(done, now) + _tensor(phase, machine, asynchronous=True)
            now += _alone(phase, warps, machine)
            if phase.drains:
                now = max(now, done) + phase.drains * LATENCY["drain"]
    asynchronous = sum(_tensor(phase, machine, asynchronous=True) for phase in loop)
    return loop[0].trips * max(now - start, asynchronous)


def _alone(phase: Phase, warps: int, machine: Machine) -> float:
    """Clocks of one block for a phase, without its asynchronous products."""
    used = _pipes(replace(phase, flops={k: v for k, v in phase.flops.items() if not k[1]}), warps, machine)
    used["issue of a warp"] = phase.issued() / machine.issued_by_warp
    latency = sum(LATENCY[unit] for unit in ("shared", "shuffle") if phase.instructions.get(unit))
    latency += LATENCY["tensor"] if any(not a for _, a in phase.flops) else 0.0
    # Without phases, every barrier ends one.
    return max(used.values()) + max(phase.barriers, 1.0) * latency + phase.barriers * LATENCY["barrier"]


def in_a_row(seconds: Sequence[float]) -> float:
    """Seconds of launches that follow one another."""
    return sum(seconds) + LAUNCH * max(len(seconds) - 1, 0)
