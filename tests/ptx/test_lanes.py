# SPDX-License-Identifier: Apache-2.0
"""Lanes of a warp: shuffles, votes, parting and meeting again, and what may not happen apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx import small

pytestmark = small.needed
STORE = "mul.wide.u32 %d1, %tid, 4; add.u64 %d1, %a, %d1; st.global.b32 [%d1], %r1;"


def result(body: str, threads: int = 32, **options: object) -> list[int]:
    """What each thread leaves in %r1, without findings."""
    out = torch.zeros(threads, dtype=torch.int32)
    report = small.run(body + STORE, out, threads=threads, **options)
    assert not report.findings, list(map(str, report.findings))
    return out.tolist()


def shuffled(mode: str, lane: int, by: int, control: int) -> tuple[int, bool]:
    """The lane that is read, and whether it is inside, as the PTX ISA says it."""
    segment, clamp = control >> 8 & 31, control & 31
    low = lane & segment
    high = low | clamp & ~segment & 31
    source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": low | by & ~segment & 31}[mode]
    inside = source >= high if mode == "up" else source <= high
    return (source, True) if inside else (lane, False)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode: str) -> None:
    """Every distance, in segments of every size, with the predicate."""
    for by in (0, 1, 2, 7, 16, 31):
        for control in (0x1F, 0x0, 0x181F, 0x1C07, 0x1800):
            got = result(
                f"add.u32 %r2, %lane, 100; shfl.sync.{mode}.b32 %r1|%p1, %r2, {by}, {control}, -1;"
                "selp.b32 %r3, 1000, 0, %p1; add.u32 %r1, %r1, %r3;"
            )
            for lane in range(32):
                source, inside = shuffled(mode, lane, by, control)
                assert got[lane] == 100 + source + 1000 * inside, (by, control, lane)


def test_votes() -> None:
    """Ballots and agreement of all lanes, with negated predicates; one lane is elected."""
    assert (
        result("setp.gt.u32 %p1, %lane, 20; vote.sync.ballot.b32 %r1, %p1, -1;")
        == [np.int32(np.uint32(0xFFE00000)).item()] * 32
    )
    for limit, yes in ((32, (1, 1, 1)), (5, (0, 1, 0)), (0, (0, 0, 1))):
        for name, wanted in zip(("all", "any", "uni"), yes, strict=True):
            body = f"""setp.lt.u32 %p1, %lane, {limit}; vote.sync.{name}.pred %p2, %p1, -1;
                selp.b32 %r1, 1, 0, %p2;"""
            assert result(body) == [wanted] * 32
            turned = {"all": limit == 0, "any": limit < 32, "uni": limit != 5}[name]
            assert result(body.replace("%p1, -1", "!%p1, -1")) == [int(turned)] * 32
    assert result("elect.sync _|%p1, -1; selp.b32 %r1, 1, 0, %p1;") == [1] + [0] * 31


def test_parting() -> None:
    """Both sides of a branch, loops of as many rounds as the lane's number, branches by table, early ends."""
    assert (
        result(
            """setp.lt.u32 %p1, %lane, 10; @%p1 bra less; mov.u32 %r1, 7; bra.uni both;
        less: mov.u32 %r1, 3; both: add.u32 %r1, %r1, 1;"""
        )
        == [4] * 10 + [8] * 22
    )
    assert result(
        """mov.u32 %r1, 0; mov.u32 %r2, 0; again: setp.ge.u32 %p1, %r2, %lane; @%p1 bra over;
        add.u32 %r1, %r1, %r2; add.u32 %r2, %r2, 1; bra again; over: bar.warp.sync -1;"""
    ) == [n * (n - 1) // 2 for n in range(32)]
    assert result(
        """rem.u32 %r2, %lane, 3; table: .branchtargets first, second, third; brx.idx %r2, table;
        first: mov.u32 %r1, 5; bra over; second: mov.u32 %r1, 6; bra over; third: mov.u32 %r1, 7; over:"""
    ) == [5 + n % 3 for n in range(32)]
    out = torch.zeros(32, dtype=torch.int32)
    report = small.run("mov.u32 %r1, 1; setp.gt.u32 %p1, %lane, 7; @%p1 exit;" + STORE, out)
    assert not report.findings and out.tolist() == [1] * 8 + [0] * 24


def test_meeting() -> None:
    """Lanes that part meet at a collective instruction; at different ones they wait forever."""
    parted = "setp.lt.u32 %p1, %lane, 4; mov.u32 %r1, 1; @%p1 bra less; {0} bra both; less: {1} both: {2}"
    whole = "shfl.sync.bfly.b32 %r1, %lane, 1, 31, -1;"
    assert small.kinds(parted.format("mov.u32 %r1, 2;", "", whole)) == set()
    assert small.kinds(parted.format(whole, "", whole)) == {"divergence"}
    assert small.kinds(parted.format("bar.sync 0;", "", "bar.warp.sync -1;")) == {"divergence"}
    assert small.kinds(parted.format("bar.sync 0;", "bar.sync 0;", "")) == {"divergence"}
    assert small.kinds("setp.lt.u32 %p1, %lane, 4; @%p1 bar.sync 0;") == {"divergence"}
    assert small.kinds("setp.lt.u32 %p1, %tid, 64; @%p1 bar.sync 1, 64;", threads=128) == set()


def test_members() -> None:
    """The lanes that an instruction names are those that execute it, and shuffles read these only."""
    part = "mov.u32 %r1, 0; setp.ge.u32 %p1, %lane, 16; @%p1 bra over; {} over:"
    assert small.kinds(part.format("shfl.sync.bfly.b32 %r1, %lane, 1, 31, 0xffff;")) == set()
    assert small.kinds(part.format("vote.sync.ballot.b32 %r1, %p1, 0xffff;")) == set()
    assert small.kinds(part.format("shfl.sync.bfly.b32 %r1, %lane, 16, 31, 0xffff;")) == {"divergence"}
    assert small.kinds("shfl.sync.bfly.b32 %r1, %lane, 1, 31, 0xffff;") == {"divergence"}
    assert small.kinds("vote.sync.ballot.b32 %r1, %p1, 0xffff;".replace("%p1", "1")) == {"divergence"}


def test_block_barriers() -> None:
    """Whole, counted and named barriers let go when all have come, and an arrival does not wait."""
    chat = """mul.wide.u32 %d2, %tid, 4; cvt.u32.u64 %r4, %d2; {0}
        st.shared.b32 [%r4], %tid; {1} xor.b32 %r4, %r4, 128; ld.shared.b32 %r1, [%r4];"""
    for barrier in ("bar.sync 0;", "barrier.sync 3, 64;", "bar.sync 5, 64;", "barrier.cta.sync.aligned 1;"):
        assert result(chat.format("", barrier), threads=64, shared=256) == [n ^ 32 for n in range(64)]
    split = """setp.eq.u32 %p1, %warp, 0; mov.u32 %r1, 0; @!%p1 bra reader;
        st.shared.b32 [memory], 9; bar.warp.sync -1; bar.arrive 2, 64; bra over;
        reader: bar.sync 2, 64; ld.shared.b32 %r1, [memory]; over:"""
    assert result(split, threads=64, shared=64) == [0] * 32 + [9] * 32
    assert "race" in small.kinds(
        split.replace("bar.sync 2, 64; ld", "ld") + STORE,
        torch.zeros(64, dtype=torch.int32),
        threads=64,
        shared=64,
    )


def test_deadlock() -> None:
    """Barriers that a warp never reaches, loops without end, and waiting for a block that is not resident."""
    assert small.kinds(
        "setp.eq.u32 %p1, %warp, 0; @%p1 bra o; bar.sync 1; bra e; o: bar.sync 2; e:", threads=64
    ) == {"deadlock"}
    assert small.kinds("bar.sync 1, 96;", threads=64) == {"deadlock"}
    assert small.kinds("bar.sync 1, 64;", threads=64) == set()
    assert small.kinds("again: bra again;", limit=2000) == {"deadlock"}
    wait = """setp.ne.u32 %p1, %tid, 0; @%p1 bra over; xor.b32 %r1, %cta, {}; mul.wide.u32 %d1, %cta, 4;
        add.u64 %d1, %a, %d1;
        atom.global.add.u32 %r2, [%d1], 1; mul.wide.u32 %d2, %r1, 4; add.u64 %d2, %a, %d2;
        again: ld.acquire.gpu.global.u32 %r3, [%d2]; setp.eq.u32 %p2, %r3, 0; @%p2 bra again; over:"""
    for other, resident, shuffled, wanted in (
        (1, 2, False, set()), (2, 2, False, {"deadlock"}), (2, 4, False, set()),
        (2, 2, True, {"deadlock"}), (2, 4, True, set()),
    ):  # fmt: skip
        found = set()
        for seed in range(4):
            flags = torch.zeros(4, dtype=torch.int32)
            report = small.run(
                wait.format(other),
                flags,
                grid=4,
                resident=resident,
                shuffled=shuffled,
                seed=seed,
                limit=20_000,
            )
            found |= report.kinds()
        assert found == wanted, (other, resident, shuffled)
