# SPDX-License-Identifier: Apache-2.0
"""The order of accesses: each wrong program has its finding, and none once it is repaired."""

from __future__ import annotations

import pytest
import torch
from ptx import small

pytestmark = small.needed

# Block 0 writes a number and says so; the others wait for that and read the number.
MESSAGE = """setp.ne.u32 %p1, %tid, 0; @%p1 bra over; setp.ne.u32 %p2, %cta, 0; @%p2 bra reader;
st.global.b32 [%a], 42; {0} bra over;
reader: {1} setp.eq.u32 %p3, %r2, 0; @%p3 bra reader; {2} ld.global.b32 %r1, [%a];
st.global.b32 [%a+8], %r1; over:"""


def message(write: str, read: str, after: str = "") -> set[str]:
    found: set[str] = set()
    for seed in range(4):
        data = torch.zeros(4, dtype=torch.int32)
        report = small.run(MESSAGE.format(write, read, after), data, grid=2, seed=seed, shuffled=False)
        found |= report.kinds()
        assert data[2] == 42 or found
    return found


@pytest.mark.parametrize(
    ("write", "read", "after", "right"),
    [
        ("st.release.gpu.b32 [%a+4], 1;", "ld.acquire.gpu.b32 %r2, [%a+4];", "", True),
        ("st.relaxed.gpu.b32 [%a+4], 1;", "ld.acquire.gpu.b32 %r2, [%a+4];", "", False),
        ("st.release.gpu.b32 [%a+4], 1;", "ld.relaxed.gpu.b32 %r2, [%a+4];", "", False),
        ("st.release.cta.b32 [%a+4], 1;", "ld.acquire.gpu.b32 %r2, [%a+4];", "", False),
        ("st.release.gpu.b32 [%a+4], 1;", "ld.acquire.cta.b32 %r2, [%a+4];", "", False),
        ("atom.acq_rel.gpu.add.u32 %r3, [%a+4], 1;", "atom.acq_rel.gpu.add.u32 %r2, [%a+4], 0;", "", True),
        ("atom.relaxed.gpu.add.u32 %r3, [%a+4], 1;", "atom.relaxed.gpu.add.u32 %r2, [%a+4], 0;", "", False),
        ("red.release.gpu.add.u32 [%a+4], 1;", "atom.acquire.gpu.or.b32 %r2, [%a+4], 0;", "", True),
        (
            "fence.acq_rel.gpu; red.relaxed.gpu.add.u32 [%a+4], 1;",
            "ld.relaxed.gpu.b32 %r2, [%a+4];",
            "fence.acq_rel.gpu;",
            True,
        ),
        (
            "membar.gl; st.volatile.global.b32 [%a+4], 1;",
            "ld.volatile.global.b32 %r2, [%a+4];",
            "membar.gl;",
            True,
        ),
        (
            "red.relaxed.gpu.add.u32 [%a+4], 1;",
            "ld.relaxed.gpu.b32 %r2, [%a+4];",
            "fence.acq_rel.gpu;",
            False,
        ),
        (
            "fence.acq_rel.gpu; red.relaxed.gpu.add.u32 [%a+4], 1;",
            "ld.relaxed.gpu.b32 %r2, [%a+4];",
            "",
            False,
        ),
        (
            "fence.acq_rel.cta; red.relaxed.gpu.add.u32 [%a+4], 1;",
            "ld.relaxed.gpu.b32 %r2, [%a+4];",
            "fence.acq_rel.gpu;",
            False,
        ),
        (
            "fence.acq_rel.gpu; red.relaxed.gpu.add.u32 [%a+4], 1;",
            "ld.relaxed.gpu.b32 %r2, [%a+4];",
            "fence.acq_rel.cta;",
            False,
        ),
        ("st.global.b32 [%a+4], 1;", "ld.global.b32 %r2, [%a+4];", "", False),
    ],
)
def test_between_blocks(write: str, read: str, after: str, right: bool) -> None:
    """A number passes between blocks by a release and an acquire for the whole GPU, and not otherwise."""
    assert message(write, read, after) == (set() if right else {"race"})


def test_chains() -> None:
    """What a block saw before its release is visible behind it too, through its barrier and another warp."""
    body = """setp.eq.u32 %p1, %cta, 0; @!%p1 bra second; st.global.b32 [%a], 42; bar.sync 0;
    setp.ne.u32 %p2, %tid, 32; @%p2 bra over; {0}.global.add.u32 %r3, [%a+4], 1; bra over;
    second: setp.ne.u32 %p2, %tid, 0; @%p2 bra third;
    again: atom.acq_rel.gpu.global.add.u32 %r2, [%a+4], 0; setp.eq.u32 %p3, %r2, 0; @%p3 bra again;
    third: {1} setp.ne.u32 %p2, %tid, 33; @%p2 bra over; ld.global.b32 %r1, [%a]; st.global.b32 [%a+8], %r1;
    over:"""
    for first, barrier, wanted in (
        ("atom.acq_rel.gpu", "bar.sync 0;", set()),
        ("atom.relaxed.gpu", "bar.sync 0;", {"race"}),
        ("atom.acq_rel.gpu", "", {"race"}),
    ):
        writer = body.format(first, barrier).replace(
            "st.global.b32 [%a], 42;", "setp.eq.u32 %p4, %tid, 0; @%p4 st.global.b32 [%a], 42;"
        )
        found: set[str] = set()
        for seed in range(4):
            data = torch.zeros(4, dtype=torch.int32)
            found |= small.run(writer, data, grid=2, threads=64, shuffled=False, seed=seed).kinds()
            assert wanted or data[2] == 42
        assert found == wanted, (first, barrier)


def test_scopes_of_atomics() -> None:
    """Atomics for one block race with those of another, those for the GPU do not."""
    data = torch.zeros(1, dtype=torch.int32)
    for scope, grid, wanted in (("cta", 2, {"race"}), ("cta", 1, set()), ("gpu", 2, set())):
        assert (
            small.kinds(f"red.relaxed.{scope}.global.add.u32 [%a], 1;", data, grid=grid, threads=64) == wanted
        )
    assert data.item() == 3 * 64 * 5
    assert small.kinds("red.global.add.u32 [%a], 1; st.global.b32 [%a], %tid;", data, threads=64) == {"race"}


def test_scopes_in_a_block() -> None:
    """Inside of a block, a fence for the block and relaxed atomics of shared memory are enough."""
    body = """setp.ne.u32 %p1, %lane, 0; @%p1 bra over; setp.eq.u32 %p2, %warp, 0; @!%p2 bra reader;
    st.shared.b32 [memory], 42; {0} atom.relaxed.cta.shared.exch.b32 %r2, [memory+4], 1; bra over;
    reader: ld.relaxed.cta.shared.b32 %r2, [memory+4]; setp.ne.u32 %p3, %r2, 1; @%p3 bra reader;
    {1} ld.shared.b32 %r1, [memory]; st.global.b32 [%a], %r1; over:"""
    first = """setp.eq.u32 %p4, %tid, 0; @%p4 st.shared.b32 [memory+4], 0; bar.sync 0;"""
    out = torch.zeros(1, dtype=torch.int32)
    options = {"threads": 64, "shared": 64}
    assert (
        small.kinds(first + body.format("fence.acq_rel.cta;", "fence.acq_rel.cta;"), out, **options) == set()
    )
    assert out.item() == 42
    assert small.kinds(first + body.format("", "fence.acq_rel.cta;"), out, **options) == {"race"}
    assert small.kinds(first + body.format("membar.cta;", ""), out, **options) == {"race"}


EXCHANGE = """shl.b32 %r4, %tid, 2; st.shared.b32 [%r4], %tid; {0}
xor.b32 %r5, %r4, {2}; ld.shared.b32 %r1, [%r5]; {1} st.shared.b32 [%r4], %r1;"""


def test_between_warps() -> None:
    """Warps exchange through shared memory between two barriers: one against reading early, one against
    writing early."""
    options = {"threads": 64, "shared": 256}
    assert small.kinds(EXCHANGE.format("bar.sync 0;", "bar.sync 0;", 128), **options) == set()
    for first, second in (
        ("", "bar.sync 0;"),
        ("bar.sync 0;", ""),
        ("bar.warp.sync -1;", "bar.sync 0;"),
        ("bar.sync 0;", "bar.warp.sync -1;"),
    ):
        assert small.kinds(EXCHANGE.format(first, second, 128), **options) == {"race"}


def test_between_lanes() -> None:
    """Lanes of one warp need its barrier likewise; a shuffle is none."""
    options = {"threads": 32, "shared": 128}
    assert small.kinds(EXCHANGE.format("bar.warp.sync -1;", "bar.warp.sync -1;", 4), **options) == set()
    assert small.kinds(EXCHANGE.format("bar.sync 0;", "bar.sync 0;", 4), **options) == set()
    assert small.kinds(EXCHANGE.format("", "", 0), **options) == set()  # its own
    for first in ("", "shfl.sync.bfly.b32 %r9, %tid, 1, 31, -1;"):
        assert small.kinds(EXCHANGE.format(first, "bar.warp.sync -1;", 4), **options) == {"race"}
    assert small.kinds(EXCHANGE.format("bar.warp.sync -1;", "", 4), **options) == {"race"}


def test_reads_of_several() -> None:
    """A write waits for every reader, also if these read in turn."""
    body = """setp.lt.u32 %p1, %warp, 3; @%p1 ld.shared.b32 %r1, [memory]; {0}
    setp.eq.u32 %p2, %tid, 96; @%p2 st.shared.b32 [memory], 7;"""
    start = "setp.eq.u32 %p3, %tid, 0; @%p3 st.shared.b32 [memory], 1; bar.sync 0;"
    options = {"threads": 128, "shared": 64, "seeds": range(6)}
    assert small.kinds(start + body.format("bar.sync 0;"), **options) == set()
    some = "@%p1 bar.sync 1, 96; setp.ge.u32 %p4, %warp, 2; @%p4 bar.sync 2, 64;"
    assert small.kinds(start + body.format(some), **options) == set()  # by way of warp 2
    assert small.kinds(start + body.format("setp.ge.u32 %p4, %warp, 2; @%p4 bar.sync 2, 64;"), **options) == {
        "race"
    }


def test_same_value() -> None:
    """Lanes and warps that write the same number hurt nobody."""
    out = torch.zeros(1, dtype=torch.int32)
    body = "st.global.b32 [%a], 5;"
    assert small.kinds(body, torch.full((1,), 5, dtype=torch.int32), threads=64) == set()
    assert small.kinds(body.replace("5;", "%tid;"), out, threads=64) == {"race"}
    assert small.kinds(body.replace("5;", "%tid;"), out, threads=32) == {"race"}


def test_constant_loads() -> None:
    """ld.nc may not read what the launch writes, whatever the order."""
    body = "setp.eq.u32 %p1, %tid, 0; @%p1 st.global.b32 [%a], 3; bar.sync 0; {} st.global.b32 [%b], %r1;"
    data, out = torch.zeros(2, dtype=torch.int32), torch.full((1,), 3, dtype=torch.int32)
    assert small.kinds(body.format("ld.global.nc.b32 %r1, [%a];"), data, out, threads=64) == {"race"}
    assert small.kinds(body.format("ld.global.b32 %r1, [%a];"), data, out, threads=64) == set()


# All threads of block 0 store, one says so behind a barrier; one of block 1 sees it, all read behind a
# barrier.
THROUGH_BARRIERS = """mul.wide.u32 %d1, %tid, 4; add.u64 %d1, %a, %d1; setp.ne.u32 %p1, %tid, 0;
setp.ne.u32 %p2, %cta, 0; @%p2 bra reader; st.global.b32 [%d1], 42; {0} bar.sync 0; @%p1 bra over;
red.relaxed.gpu.global.add.u32 [%a+512], 1; bra over;
reader: @%p1 bra seen;
again: ld.relaxed.gpu.global.b32 %r2, [%a+512]; setp.eq.u32 %p3, %r2, 0; @%p3 bra again;
seen: bar.warp.sync -1; bar.sync 0; {1} ld.global.b32 %r1, [%d1]; st.global.b32 [%d1+256], %r1; over:"""


@pytest.mark.parametrize(
    ("write", "read", "right"),
    [
        ("membar.gl;", "membar.gl;", True),
        ("fence.sc.gpu;", "fence.sc.gpu;", True),
        ("fence.sc.gpu;", "", False),
        ("", "fence.sc.gpu;", False),
        ("fence.sc.cta;", "fence.sc.gpu;", False),
        ("fence.acq_rel.gpu;", "fence.acq_rel.gpu;", False),
    ],
)
def test_fences_around_barriers(write: str, read: str, right: bool) -> None:
    """Fences of different threads synchronise where they are sequentially consistent, and not otherwise."""
    found: set[str] = set()
    for seed in range(4):
        data = torch.zeros(132, dtype=torch.int32)
        body = THROUGH_BARRIERS.format(write, read)
        found |= small.run(body, data, grid=2, threads=64, seed=seed, shuffled=False).kinds()
        assert found or (data[64:128] == 42).all()
    assert found == (set() if right else {"race"})
