# SPDX-License-Identifier: Apache-2.0
"""Loads, stores and atomics: values, bounds, alignment, what was never written, and what accesses cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx import machine, small, text

pytestmark = small.needed
AT = "mul.wide.u32 %d1, %tid, {0}; add.u64 %d2, %a, %d1; add.u64 %d3, %b, %d1; cvt.u32.u64 %r9, %d1;"


def test_widths() -> None:
    """Every width, single and in vectors, through global, shared and generic addresses."""
    for kind, vector, size in (
        ("b16", 1, 2),
        ("b32", 1, 4),
        ("b64", 1, 8),
        ("b32", 2, 8),
        ("b16", 4, 8),
        ("b32", 4, 16),
        ("b64", 2, 16),
        ("b32", 8, 32),
    ):
        letter = {"b16": "h", "b32": "r", "b64": "d"}[kind]
        first = 20
        parts = [f"%{letter}{first + n}" for n in range(vector)]
        operand = parts[0] if vector == 1 else "{" + ", ".join(parts) + "}"
        suffix = f"{kind}" if vector == 1 else f"v{vector}.{kind}"
        source = torch.randint(0, 256, (32 * size,), dtype=torch.uint8)
        out = torch.zeros_like(source)
        body = AT.format(size) + f"ld.global.{suffix} {operand}, [%d2];"
        if size <= 16:
            body += f"""st.shared.{suffix} [%r9], {operand}; mov.u32 %r10, memory; add.u32 %r10, %r10, %r9;
                cvt.u64.u32 %d5, %r10;
            cvta.shared.u64 %d5, %d5; ld.{suffix} {operand}, [%d5];"""
        report = small.run(body + f"st.{suffix} [%d3], {operand};", source, out, shared=32 * size)
        assert not report.findings and torch.equal(source, out), suffix


def test_signs() -> None:
    """Narrow loads extend by the sign of their type."""
    source = torch.tensor([0xFF80, 0x0180], dtype=torch.int32).to(torch.uint16).view(torch.uint8)
    out = torch.zeros(4, dtype=torch.int32)
    body = """ld.global.s8 %r1, [%a]; ld.global.u8 %r2, [%a]; ld.global.s16 %r3, [%a];
        ld.global.u16 %r4, [%a];
    setp.eq.u32 %p1, %tid, 0; @%p1 st.global.v4.b32 [%b], {%r1, %r2, %r3, %r4};"""
    assert not small.run(body, source, out).findings
    assert out.tolist() == [-128, 128, -128, 0xFF80]


@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics(space: str) -> None:
    """Each operation, from many warps and blocks, with the sum of f32 and old values."""
    place = "[%a]" if space == "global" else "[memory]"
    grid = 3 if space == "global" else 1
    count = 64 * grid
    move = "bar.sync 0; setp.eq.u32 %p9, %tid, 0;" + (
        "@%p9 ld.shared.b32 %r7, [memory]; @%p9 st.global.b32 [%a], %r7;" if space == "shared" else ""
    )
    start = (
        """setp.eq.u32 %p8, %tid, 0; ld.global.b32 %r7, [%a]; bar.sync 0; @%p8 st.shared.b32 [memory], %r7;
            bar.sync 0;"""
        if space == "shared"
        else ""
    )
    thread = "mad.lo.u32 %r1, %cta, 64, %tid;"
    for operation, kind, value, before, wanted in (
        ("add", "u32", "%r1", 5, 5 + count * (count - 1) // 2),
        ("min", "s32", "%r2", 0, -(count - 1)),
        ("max", "s32", "%r2", -7, 0),
        ("min", "u32", "%r2", 5, 0),
        ("max", "u32", "%r1", 5, count - 1),
        ("inc", "u32", "49", 0, count % 50),
        ("or", "b32", "%r1", 0, (1 << (count - 1).bit_length()) - 1),
        ("and", "b32", "%r3", -1, 0),
        ("exch", "b32", "9", 5, 9),
    ):
        data = torch.tensor([before], dtype=torch.int32)
        for form in ("atom", "red") if operation != "exch" else ("atom",):
            data.fill_(before)
            target = "%r8, " if form == "atom" else ""
            body = f"""{start}{thread} neg.s32 %r2, %r1; and.b32 %r3, %tid, 31; shl.b32 %r3, 1, %r3;
                not.b32 %r3, %r3;"""
            report = small.run(
                f"{body} {form}.{space}.{operation}.{kind} {target}{place}, {value}; {move}",
                data,
                grid=grid,
                threads=64,
                shared=64,
            )
            assert not report.findings and data.item() == wanted, (form, operation, kind)
    sums = torch.zeros(1)
    assert not small.run(
        f"{start} atom.{space}.add.f32 %r1, {place}, 0f3F000000; {move}",
        sums,
        grid=grid,
        threads=64,
        shared=64,
    ).findings
    assert sums.item() == count / 2
    if space == "global":
        doubles = torch.zeros(1, dtype=torch.float64)
        assert not small.run(
            "red.global.add.f64 [%a], 0d3FE0000000000000;", doubles, grid=2, threads=64
        ).findings
        assert doubles.item() == 64
        tickets, out = torch.zeros(1, dtype=torch.int64), torch.zeros(128, dtype=torch.int64)
        body = """atom.global.add.u64 %d5, [%a], 1; shl.b64 %d6, %d5, 3; add.u64 %d6, %b, %d6;
            st.global.b64 [%d6], %d5;"""
        assert not small.run(body, tickets, out, grid=2, threads=64).findings
        assert out.tolist() == list(range(128))  # old values, each once
        taken = torch.zeros(2, dtype=torch.int32)
        body = (
            "atom.global.cas.b32 %r1, [%a], 0, 7; setp.eq.u32 %p1, %r1, 0; @%p1 red.global.add.u32 [%a+4], 1;"
        )
        assert not small.run(body, taken, grid=2, threads=64).findings and taken.tolist() == [7, 1]


def test_bounds() -> None:
    """A byte behind the end of a tensor, of shared memory or of the parameters, and before the begin."""
    data = torch.zeros(8, dtype=torch.int32)
    for inside, outside in (
        ("ld.global.b32 %r1, [%a+28];", "ld.global.b32 %r1, [%a+32];"),
        ("ld.global.v2.b32 {%r1, %r2}, [%a+24];", "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%a+32];"),
        ("st.global.b32 [%a], 0;", "st.global.b32 [%a+-4], 0;"),
        ("red.global.add.u32 [%a+28], 0;", "red.global.add.u32 [%a+32], 0;"),
        ("st.shared.b32 [memory+60], 1;", "st.shared.b32 [memory+64], 1;"),
        ("mov.u32 %r1, 60; st.shared.b32 [%r1+-60], 1;", "mov.u32 %r1, 0; st.shared.b32 [%r1+-4], 1;"),
        ("ld.param.b64 %d1, [p_a];", "ld.param.b64 %d1, [p_a+8];"),
    ):
        assert small.kinds(inside, data, shared=64) == set(), inside
        assert small.kinds(outside, data, shared=64) == {"out of bounds"}, outside


def test_alignment() -> None:
    """Accesses are aligned to their size, vectors to that of the whole."""
    data = torch.zeros(16, dtype=torch.int64)
    for right, wrong in (
        ("ld.global.b32 %r1, [%a+4];", "ld.global.b32 %r1, [%a+2];"),
        ("ld.global.v2.b32 {%r1, %r2}, [%a+8];", "ld.global.v2.b32 {%r1, %r2}, [%a+4];"),
        ("st.shared.v4.b32 [memory+16], {%tid, 1, 1, 1};", "st.shared.v4.b32 [memory+8], {%tid, 1, 1, 1};"),
        ("red.global.add.u64 [%a+8], 1;", "red.global.add.u64 [%a+4], 1;"),
    ):
        assert "misaligned" not in small.kinds(right, data, shared=64), right
        assert "misaligned" in small.kinds(wrong, data, shared=64), wrong


def test_never_written() -> None:
    """What was never written may be computed with, but is no value to store, no address and no condition."""
    data, out = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    at = "mul.wide.u32 %d1, %tid, 4; add.u64 %d1, %b, %d1;"
    for line in (
        "add.u32 %r1, %r50, 1; st.global.b32 [%d1], %r1;",
        "st.global.v2.b32 [%b], {%r50, %r50};",
        "add.u64 %d2, %a, %d50; ld.global.b32 %r1, [%d2];",
        "setp.eq.u32 %p1, %r50, 0; @%p1 bra over; over:",
        "setp.eq.u32 %p1, %r50, 0; @%p1 st.global.b32 [%d1], 0;",
        "red.global.add.u32 [%a], %r50;",
        "shfl.sync.idx.b32 %r1, %tid, %r50, 31, -1;",
    ):
        assert "never written" in small.kinds(at + line, data, out), line
        assert "never written" not in small.kinds(
            "mov.u32 %r50, 0; mov.u64 %d50, 0;" + at + line, data, out
        ), line
    assert small.kinds(at + "selp.b32 %r1, %r50, %tid, %p5; st.global.b32 [%d1], %r1;", data, out) == {
        "never written"
    }
    chosen = "setp.lt.u32 %p5, %tid, 0;" + at + "selp.b32 %r1, %r50, %tid, %p5; st.global.b32 [%d1], %r1;"
    assert small.kinds(chosen, data, out) == set()
    load = at + "ld.global.b32 %r1, [%a]; {} st.global.b32 [%d1], %r1;"
    assert small.kinds(load.format(""), data, out, fresh=[0]) == {"never written"}
    assert small.kinds(load.format("mov.u32 %r1, 0;"), data, out, fresh=[0]) == set()
    share = (
        at
        + "cvt.u32.u64 %r4, %d1; shl.b32 %r4, %tid, 2; {} ld.shared.b32 %r1, [%r4]; st.global.b32 [%d1], %r1;"
    )
    assert small.kinds(share.format(""), data, out, shared=128) == {"never written"}
    assert small.kinds(share.format("st.shared.b32 [%r4], 1;"), data, out, shared=128) == set()
    assert small.kinds(share.format("st.shared.b32 [%r4], %r50;"), data, out, shared=128) == {"never written"}


def test_views() -> None:
    """Accesses through a view meet those through its tensor."""
    base = torch.zeros(64, dtype=torch.int32)
    body = "setp.eq.u32 %p1, %cta, 0; @%p1 st.global.b32 [%a], 1; @!%p1 st.global.b32 [%b], 2;"
    assert small.kinds(body, base, base[32:], grid=2) == set()
    assert small.kinds(body.replace("[%a]", "[%a+128]"), base, base[32:], grid=2) == {"race"}
    assert small.kinds(body.replace("[%b]", "[%b+-128]"), base[:48], base[32:], grid=2) == {"race"}


def costs(body: str, mnemonic: str, *tensors: torch.Tensor, **options: object) -> machine.Cost:
    report = small.run(body, *tensors, **options)
    assert not report.findings, list(map(str, report.findings))
    return sum(
        (
            c
            for c, i in zip(report.costs, report.kernel.instructions, strict=False)
            if i.mnemonic.startswith(mnemonic)
        ),
        machine.Cost(),
    )


def wavefronts(addresses: list[int], size: int) -> int:
    """Passes of 128 bytes, each with the most words that one bank has to give."""
    total, lanes = 0, 32 // max(1, size // 4)
    for first in range(0, 32, lanes):
        words = {a // 4 + k for a in addresses[first : first + lanes] for k in range(max(1, size // 4))}
        total += max(sum(w % 32 == bank for w in words) for bank in range(32))
    return total


def test_wavefronts() -> None:
    """Bank conflicts of strides and of wide accesses; one word for all lanes is one pass."""
    for stride, size, wanted in (
        (4, 4, 1), (8, 4, 2), (128, 4, 32), (132, 4, 1), (0, 4, 1), (64, 4, 16), (8, 8, 2),
        (16, 16, 4), (144, 16, 4), (128, 16, 32),
        (0, 16, 4), (256, 8, 32), (2, 2, 1),
    ):  # fmt: skip
        suffix, registers = {
            2: ("b16", "%h1"),
            4: ("b32", "%r1"),
            8: ("v2.b32", "{%r1, %r2}"),
            16: ("v4.b32", "{%r1, %r2, %r3, %r4}"),
        }[size]
        body = f"mul.lo.u32 %r9, %lane, {stride}; ld.shared.{suffix} {registers}, [%r9];"
        cost = costs(body, "ld.shared", shared=8448)
        assert cost.wavefronts == wanted == wavefronts([stride * n for n in range(32)], size), (stride, size)
        assert cost.ideal_wavefronts == max(1, size // 4)


def test_sectors() -> None:
    """Sectors of 32 bytes that a warp asks for, and those that nobody asked for before."""
    data = torch.zeros(4096, dtype=torch.int32)
    data = data[(-data.data_ptr() % 128) // 4 :]
    for stride, wanted in ((4, 4), (8, 8), (32, 32), (0, 1), (16, 16)):
        body = f"mul.wide.u32 %d1, %lane, {stride}; add.u64 %d1, %a, %d1; ld.global.b32 %r1, [%d1];"
        cost = costs(body, "ld.global", data, threads=64)
        assert (cost.executed, cost.lanes, cost.sectors, cost.fresh_sectors) == (2, 64, 2 * wanted, wanted), (
            stride
        )
    assert costs("ld.global.b32 %r1, [%a];", "ld.global", data, grid=3).fresh_sectors == 1


def test_loops() -> None:
    """Rounds and instructions of loops, inner and outer."""
    body = """mov.u32 %r1, 0; outer: mov.u32 %r2, 0; inner: add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, 5;
        @%p1 bra inner;
    add.u32 %r1, %r1, 1; setp.lt.u32 %p2, %r1, 3; @%p2 bra outer;"""
    report = small.run(body, threads=64)
    inner, outer = report.loops()
    assert (inner.iterations, outer.iterations) == (2 * 15, 2 * 3)
    assert inner.mix == {"add": 30, "setp": 30, "bra": 30}
    assert outer.mix == {"mov": 6, "add": 36, "setp": 36, "bra": 36}
    assert outer.cost.executed == sum(outer.mix.values())
    assert report.total().executed == report.steps


def test_indices() -> None:
    """Numbers of threads, warps and blocks, in three dimensions of the grid."""
    kernel = text.kernel(
        """.visible .entry where(.param .u64 out) {
        .reg .b32 %r<9>; .reg .b64 %d<3>; ld.param.u64 %d1, [out];
        mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z; mov.u32 %r4, %nctaid.y;
        mov.u32 %r5, %nctaid.x;
        mad.lo.u32 %r6, %r3, %r4, %r2; mad.lo.u32 %r6, %r6, %r5, %r1; mov.u32 %r7, %ntid.x;
        mov.u32 %r8, %tid.x;
        mad.lo.u32 %r6, %r6, %r7, %r8; mul.wide.u32 %d2, %r6, 4; add.u64 %d1, %d1, %d2;
        st.global.b32 [%d1], %r6; ret; }"""
    )
    out = torch.zeros(2 * 3 * 4 * 64, dtype=torch.int32)
    built = machine.Machine()
    report = built.run(kernel, (2, 3, 4), [built.add(out)], 64)
    assert not report.findings
    np.testing.assert_array_equal(out.numpy(), np.arange(len(out)))


def test_vector_partly_written() -> None:
    """Numbers of a vector are written or not one by one, in registers and in shared memory."""
    body = """setp.ne.u32 %p1, %tid, 0; @%p1 bra over; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%a];
    st.shared.v4.b32 [memory], {%r1, %r2, %r3, %r4}; ld.shared.v2.b32 {%r5, %r6}, [memory];
    st.global.b32 [%b], REGISTER; over:"""
    for register in ("%r1", "%r5", "%r2", "%r6"):
        data, out = torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        built = machine.Machine()
        built.add(data, initialised=False)
        built.written(data[:1])
        built.add(out)
        code = small.kernel(body.replace("REGISTER", register), 2)
        assert built.run(code, (1,), [data, out], 32, 16).kinds() == (
            set() if register in ("%r1", "%r5") else {"never written"}
        )
