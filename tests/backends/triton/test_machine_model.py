# SPDX-License-Identifier: Apache-2.0
"""The machine model on fixed counts: what is known of the kernels, and how resources overlap.

Counts of the first tests are those of earlier kernels, executed instruction by instruction; the ranges are
the predictions made from them by hand. No test compiles anything.
"""

from __future__ import annotations

import dataclasses

import pytest

from fused_ewclora.backends.triton.tools import kernel_counts, machine_model, sass
from fused_ewclora.backends.triton.tools.machine_model import MACHINES, Counts, Phase, predict
from fused_ewclora.backends.triton.tools.work import Work

H200 = MACHINES["sm_90"]
ELEMENTS = 48 * 1024 * 1024  # of F of all k and v of ViT-L
MODEST = 1e6  # bytes in flight, more than any latency needs


def penalty(
    instructions: float, wavefronts: float, warps: int, barriers: int, tile: int, flops: float
) -> float:
    """Microseconds of a walk over tiles of fp32 F, four blocks for each multiprocessor."""
    blocks = 4 * 132
    shared = 0.25 * instructions
    walk = Phase(
        {
            "alu": 0.35 * instructions,
            "fma": 0.2 * instructions,
            "shared": shared,
            "control": 0.2 * instructions,
        },
        ELEMENTS / tile / blocks,
        {("tf32", False): flops},
        shared=wavefronts,
        barriers=barriers,
    )
    bytes_moved = 4 * ELEMENTS + 2 * 10e6
    counts = Counts(blocks, 2, warps, ((walk,),), bytes_moved / blocks, bytes_moved, MODEST)
    return 1e6 * predict(counts, H200).seconds


@pytest.mark.parametrize(("wavefronts", "expected"), [(2200, 117), (2640, 140)])
def test_penalty_high(wavefronts: float, expected: float):
    """516 instructions in each of 8 warps, 8 barriers and 2200 to 2640 wavefronts for 16 KiB of F are 117 to
    140 us, limited by shared memory."""
    assert penalty(516, wavefronts, 8, 8, 4096, 48 * 8 * 2048) == pytest.approx(expected, rel=0.03)


def test_penalty_highest():
    """Three tf32 products for one: 149 to 188 us."""
    assert 149 <= penalty(768, 1412, 4, 11, 2048, 96 * 4 * 2048) <= 188


def product(k: int, waves: int, drains: bool) -> float:
    """Share of BLAS of a product in blocks of 128 x 256 and steps of 64, four wgmma of two warp groups."""
    trips, one = k / 64, {("half", True): 2 * 128 * 256 * 16.0}
    wait = Phase({"control": 20}, trips, barriers=1)
    step = Phase({"control": 12, "alu": 4}, trips, one, shared=160, drains=drains)
    loop = (wait, step, step, step, step, dataclasses.replace(wait, instructions={"control": 4}, barriers=2))
    outside = (Phase({"alu": 300, "control": 300, "shared": 35}, 1, {}, 1280, 600, 10, 1),)
    blocks = 132 * waves
    cached = (128 + 256) * k * 2 + 128 * 256 * 2
    counts = Counts(blocks, 1, 8, (outside, loop), cached, 0, MODEST, cached / 128)
    flops = 2.0 * 128 * 256 * k * blocks
    return flops / H200.blas / predict(counts, H200).seconds


def test_serialised_product():
    """A wait behind every wgmma costs dx of fc1 a third of what BLAS reaches."""
    assert product(4096, 3, drains=True) == pytest.approx(0.685, abs=0.05)
    assert product(4096, 3, drains=False) > product(4096, 3, drains=True)


def test_cache_limits_products():
    """Tiles of 128 x 256 take 85 FLOP from a byte of the second-level cache, which is then what limits."""
    assert product(4096, 3, drains=False) == pytest.approx(7e12 * 85.3 / H200.blas, rel=0.04)


def test_rows_pass():
    """u and dB: partial sums for every 128 rows, written and read again, are half of the bytes of dy."""
    rows, columns = 99 * 128, 4096
    read, partial = 2.0 * rows * columns, 4.0 * 16 * 99 * columns
    walk = Counts(297, 4, 4, ((Phase({"alu": 100}, 22),),), 0, read + partial, MODEST)
    add = Counts(64, 5, 4, ((Phase({"fma": 64}, 24),),), 0, partial, MODEST)
    floor = read / H200.memory
    together = (predict(walk, H200).resources["memory"] + predict(add, H200).resources["memory"]) / floor
    assert together == pytest.approx(1.5, abs=0.01)


def test_fisher_per_sample():
    """128 x 128 of F, 197 tokens as 7 steps of 32: 1.9 to 2.1 times the weight gradient, by the cache."""
    steps = 64 * 7
    loop = (
        Phase({"control": 90, "alu": 10}, steps, {("half", True): 2 * 128 * 128 * 32.0}, 192, barriers=3),
    )
    cached = steps * 256 * 32 * 2 + 8 * 128 * 128
    counts = Counts(256, 1, 8, (loop,), cached, 0, MODEST, cached / 128)
    prediction = predict(counts, H200)
    assert prediction.limited_by == "second-level cache"
    weight_gradient = 2.0 * 64 * 197 * 4096 * 1024 / H200.blas
    assert 1.9 <= prediction.seconds / weight_gradient <= 2.12


def test_copy():
    """Bytes in and out at the bandwidth of a copy, where enough of them are in flight."""
    counts = Counts(10_000, 8, 4, ((Phase({"alu": 10}),),), 0, 4.3e9, MODEST)
    prediction = predict(counts, H200)
    assert prediction.limited_by == "memory" and prediction.resources["memory"] == pytest.approx(1e-3)
    few = dataclasses.replace(counts, in_flight=1024.0)  # 8 KiB on each multiprocessor, 800 clocks away
    assert predict(few, H200).resources["memory"] == pytest.approx(
        4.3e9 / (132 * 8 * 1024 / (800 / 1.755e9)), rel=1e-6
    )


def test_waves_quantised():
    """One block more than multiprocessors takes as long as twice as many."""
    phase = Phase({"fma": 1000}, 100, barriers=1)
    times = [predict(Counts(n, 1, 8, ((phase,),)), H200).seconds for n in (132, 133, 264)]
    assert times[1] == pytest.approx(times[2]) and times[1] > 1.9 * times[0]


def test_resident_blocks_overlap():
    """Phases of one block add up; of blocks side by side the busiest resource counts."""
    loop = (Phase({"fma": 200}, 1, barriers=1), Phase({"shared": 100}, 1, shared=800, barriers=1))
    alone = predict(Counts(132, 1, 8, (loop,)), H200)
    assert alone.limited_by == "one block after the other"
    assert (
        alone.resources["one block after the other"]
        > alone.resources["shared memory"] + alone.resources["fma"]
    )
    four = predict(Counts(4 * 132, 4, 8, (loop,)), H200)
    assert four.limited_by == "shared memory" and four.resources["shared memory"] == pytest.approx(
        4 * 800 / 1.755e9
    )


def test_integer_products_cost_two():
    """A multiplication of integers takes two slots of the fp32 pipe."""
    times = [
        predict(Counts(132, 1, 32, ((Phase({unit: 1e4}),),)), H200).resources["fma"]
        for unit in ("fma", "imad")
    ]
    assert times[1] == pytest.approx(2 * times[0])


def loop(*opcodes: str, inner: tuple[sass.Loop, ...] = ()) -> sass.Loop:
    return sass.Loop((*(sass.Step(sass.Instruction(opcode, "R1, R2"), True) for opcode in opcodes), *inner))


def work(*trips: float) -> Work:
    return Work(132, trips, 0, 0, 1e6)


def runs(tree: sass.Loop, *trips: float) -> list[float]:
    counts, _ = kernel_counts.counts(tree, work(*trips), 4, 1)
    return [phases[0].trips for phases in counts.loops]


def test_unrolled_versions_share_trips():
    """Ten trips are two of the version that does four and two of the one that does one."""
    tree = loop("MOV", inner=(loop(*["FFMA"] * 8, "LDG"), loop("MOV")))
    assert runs(tree, 10) == [1, 10, 1]
    tree = loop("MOV", inner=(loop(*["FFMA"] * 8, *["LDG"] * 4), loop("FFMA", "FFMA", "LDG", "MOV")))
    assert runs(tree, 10) == [1, 2, 2]


def test_flattened_loops():
    """Two loops that became one run the product of their trips; the end of the inner one is a condition."""
    one = sass.Loop((
        sass.Step(sass.Instruction("HMMA.1688.F32.TF32", "R1, R2"), True),
        sass.Step(sass.Instruction("FFMA"), False),
    ))  # fmt: skip
    counts, main = kernel_counts.counts(loop("MOV", inner=(one,)), work(64, 7), 4, 1)
    (phase,) = counts.loops[1]
    assert phase.trips == main.trips == 448 and phase.instructions == {
        "tensor": 1,
        "fma": pytest.approx(1 / 7),
    }
    nested = loop("MOV", inner=(loop("FFMA", inner=(loop("HMMA.1688.F32.TF32"),)),))
    assert runs(nested, 64, 7) == [1, 64, 448]


def test_other_loops_once():
    """Loops whose trips nobody knows are counted once, and the report says how many there are."""
    tree = loop("MOV", inner=(loop("HMMA.1688.F32.TF32"), loop("FADD", "LDG")))
    counts, main = kernel_counts.counts(tree, work(5), 4, 1)
    assert [phases[0].trips for phases in counts.loops] == [1, 5, 1] and main.unknown == 1


def test_executed_counts_win():
    """Executed counts replace those of the text in the main loop, and only there."""
    executed: kernel_counts.Executed = {
        "kernel": "k", "match": {"PRECISION": "tf32"}, "instructions": 6, "shared_wavefronts": 60,
    }  # fmt: skip
    tree = loop("STS", inner=(loop("HMMA.1688.F32.TF32", "LDS.128", "FADD"),))
    counts, main = kernel_counts.counts(tree, work(5), 4, 1, executed)
    outside, inside = (phases[0] for phases in counts.loops)
    assert main.shared_wavefronts == 16  # 4 warps of 4
    assert (inside.shared, inside.issued(), outside.shared, outside.issued()) == (60, 6, 4, 1)
    assert kernel_counts.executed_for([executed], "k", {"PRECISION": "tf32", "RP": 16}) == executed
    assert kernel_counts.executed_for([executed], "k", {"PRECISION": "bf16"}) is None


def test_phases_end_at_barriers():
    """A barrier or a wait for asynchronous products ends a phase."""
    drain = sass.Step(sass.Instruction("WARPGROUP.DEPBAR.LE", "gsb0, 0x0"), True)
    steps = loop("LDS", "BAR.SYNC", "FADD").steps
    (phases,) = kernel_counts.counts(sass.Loop((*steps, drain, *steps)), work(), 4, 1)[0].loops
    assert [(p.barriers, p.drains) for p in phases] == [(1, 0), (0, 1), (1, 0), (0, 0)]


def test_constants_agree():
    """The model and the one that chooses algorithms assume the same bandwidth and rate of BLAS."""
    for arch, machine in MACHINES.items():
        rates = machine_model.RATES[arch]
        assert (machine.memory, machine.blas) == (rates.bandwidth, rates.half)
        assert machine.blas <= machine.multiprocessors * machine.clock * machine.half
