# SPDX-License-Identifier: Apache-2.0
"""Asynchronous copies: cp.async of lanes, tiles by the copy engine, and mbarriers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx import machine, small

pytestmark = small.needed

COPY = """mul.wide.u32 %d1, %tid, 16; add.u64 %d2, %a, %d1; add.u64 %d3, %b, %d1; shl.b32 %r9, %tid, 4;
    {before}
cp.async.cg.shared.global [%r9], [%d2], 16{size}; cp.async.commit_group; {wait} xor.b32 %r8, %r9, {other};
ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [%r8]; {more} st.global.v4.b32 [%d3], {{%r1, %r2, %r3, %r4}};
cp.async.wait_all;"""


def copied(
    wait: str, other: int = 0, size: str = "", before: str = "", more: str = "", threads: int = 64
) -> tuple[set[str], np.ndarray]:
    source = torch.arange(1, 4 * threads + 1, dtype=torch.int32)
    out = torch.zeros_like(source)
    body = COPY.format(wait=wait, other=other, size=size, before=before, more=more)
    found = small.kinds(body, source, out, threads=threads, shared=16 * threads)
    return found, out.reshape(threads, 4).numpy()


def test_cp_async() -> None:
    """A copy is read after its own wait by its lane, and after a barrier by others."""
    source = np.arange(1, 257).reshape(64, 4)
    for wait in ("cp.async.wait_group 0;", "cp.async.wait_all;"):
        found, out = copied(wait)
        assert not found and (out == source).all()
        found, out = copied(wait + "bar.sync 0;", other=512)
        assert not found and (out == np.roll(source, 32, 0)).all()
        assert "race" in copied(wait, other=512)[0]
        assert copied(wait, other=16)[0] == {"race"}
        assert copied(wait + "bar.warp.sync -1;", other=16)[0] == set()
    assert copied("")[0] == {"too early"}
    assert copied("cp.async.wait_group 1;")[0] == {"too early"}
    assert "too early" in copied("bar.sync 0;", other=512)[0]
    assert copied("cp.async.commit_group; cp.async.wait_group 1;")[0] == set()  # an empty group comes later


def test_sizes() -> None:
    """What is not copied is zero, also for a source in part out of bounds, or ignored."""
    source = np.arange(1, 257).reshape(64, 4)
    wait = "cp.async.wait_all;"
    for size in (0, 4, 8, 12, 16):
        found, out = copied(wait, size=f", {size}")
        assert not found and (out == np.where(np.arange(4) < size // 4, source, 0)).all(), size
    found, out = copied(wait, size=", %p1", before="setp.lt.u32 %p1, %tid, 9;")
    assert not found and (out[:9] == 0).all() and (out[9:] == source[9:]).all()
    assert "out of bounds" in copied(wait, size=", 20")[0]
    last = "setp.eq.u32 %p2, %tid, 63; selp.b64 %d4, 8, 0, %p2; add.u64 %d2, %d2, %d4;"
    assert "misaligned" in copied(wait, before=last)[0]
    behind = last.replace("8, 0", "16, 0")
    assert "out of bounds" in copied(wait, before=behind)[0]
    none = behind + "selp.b32 %r20, 0, 16, %p2;"
    found, out = copied(wait, before=none, size=", %r20")
    assert not found and (out[63] == 0).all() and (out[:63] == source[:63]).all()


def test_overwriting() -> None:
    """The target of a copy may not be written before it has landed, nor while others read it."""
    assert "too early" in copied("st.shared.b32 [%r9], 5; cp.async.wait_all;")[0]
    again = "cp.async.cg.shared.global [%r9], [%d2], 16;"
    own = copied("cp.async.wait_all; bar.sync 0;", more=again)
    assert own[0] == set()
    assert copied("cp.async.wait_all; bar.sync 0;", other=512, more=again)[0] == {"race"}
    assert copied("cp.async.wait_all; bar.sync 0;", other=512, more="bar.sync 0;" + again)[0] == set()


def test_unwaited() -> None:
    """A warp may not end while a copy of its is in flight."""
    body = """shl.b32 %r9, %tid, 4; mul.wide.u32 %d1, %tid, 16; add.u64 %d2, %a, %d1;
        cp.async.cg.shared.global [%r9], [%d2], 16; cp.async.commit_group;"""
    source = torch.zeros(128, dtype=torch.int32)
    assert small.kinds(body, source, shared=512) == {"too early"}
    assert small.kinds(body + "cp.async.wait_all;", source, shared=512) == set()


# ---- tiles

TILE = """setp.ne.u32 %p1, %tid, 0; @%p1 bra.uni ready; mbarrier.init.shared::cta.b64 [memory+{bar}], 1;
    fence.proxy.async.shared::cta;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [memory+{bar}], {bytes};
cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes
 [memory], [%d9, {{{corner}}}], [memory+{bar}];
ready: bar.sync 0; {wait} {read}"""
WAIT = "again: mbarrier.try_wait.parity.shared::cta.b64 %p2, [memory+{bar}], {parity}; @!%p2 bra.uni again;"
READ = """mov.u32 %r10, %tid; mul.wide.u32 %d5, %tid, 4; add.u64 %d5, %a, %d5; shl.b32 %r11, %tid, 2;
next: setp.ge.u32 %p3, %r11, {bytes}; @%p3 bra done; ld.shared.b32 %r1, [%r11]; st.global.b32 [%d5], %r1;
add.u32 %r11, %r11, 256; add.u64 %d5, %d5, 256; bra next; done:"""


def tile(
    tensor: torch.Tensor, box: tuple[int, ...], corner: tuple[int, ...], swizzle: int = 0, **change: str
) -> tuple[set[str], torch.Tensor]:
    """The findings of a copy, and what lies in shared memory then."""
    size = tensor.element_size() * int(np.prod(box))
    out = torch.full((size // tensor.element_size(),), 7, dtype=tensor.dtype)
    corner_text = ", ".join(map(str, reversed(corner)))
    known = {
        "bar": size,
        "bytes": size,
        "rank": len(box),
        "corner": corner_text,
        "wait": WAIT.format(bar=size, parity=0),
        "read": READ.format(bytes=size),
    }
    body = "mov.b64 %d9, m0; cvta.param.u64 %d9, %d9;" + TILE.format(**{**known, **change})
    found = small.kinds(
        body, out, machine.TensorMap(tensor, box, swizzle), threads=64, shared=size + 8, limit=200_000
    )
    return found, out


def expected(
    tensor: torch.Tensor, box: tuple[int, ...], corner: tuple[int, ...], swizzle: int
) -> torch.Tensor:
    """The box with zeros outside of the tensor, its 16-byte pieces changed about as the swizzle says."""
    whole = torch.zeros(box, dtype=tensor.dtype)
    for place in np.ndindex(*box):
        at = tuple(c + p for c, p in zip(corner, place, strict=True))
        if all(0 <= a < e for a, e in zip(at, tensor.shape, strict=True)):
            whole[place] = tensor[at]
    flat = whole.reshape(-1, 16 // tensor.element_size())
    out = torch.empty_like(flat)
    for piece in range(len(flat)):
        out[piece ^ (piece >> 3 & max(swizzle // 16, 1) - 1)] = flat[piece]
    return out.reshape(-1)


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_tiles(swizzle: int) -> None:
    """Boxes of one to three dimensions, inside and over every border, with each swizzle."""
    for dtype in (torch.float32, torch.bfloat16):
        inner = (swizzle or 64) // dtype.itemsize
        source = torch.randn(3, 20, 72).to(dtype)
        for tensor, box, corners in (
            (source[0, 0], (inner,), [(0,), (-8,), (60,)]),
            (source[1], (16, inner), [(0, 0), (8, 8), (-3, -4), (12, 64)]),
            (source[:, :, :64], (2, 8, inner), [(1, 4, 8), (2, -1, 0), (-2, 0, 0)]),
        ):
            for corner in corners:
                found, out = tile(tensor, box, corner, swizzle)
                assert not found
                assert torch.equal(out, expected(tensor, box, corner, swizzle)), (box, corner)


def test_waiting() -> None:
    """Data of a tile are read after a wait for the phase that it completes."""
    source = torch.randn(32, 32)
    good = ((32, 32), (0, 0), 128)
    assert tile(source, *good)[0] == set()
    assert tile(source, *good, wait="")[0] & {"too early", "race"}
    assert tile(source, *good, wait=WAIT.format(bar=4096, parity=1))[0] & {
        "too early",
        "race",
    }  # the phase before
    assert tile(source, *good, bytes="2048", read="")[0] == {"deadlock"}
    assert tile(source, *good, bytes="8192", read="")[0] == {"deadlock"}
    assert tile(source, *good, bar="4104")[0] == {"out of bounds"}
    assert (
        "race" in tile(source, *good, bar="2048", wait=WAIT.format(bar=2048, parity=0))[0]
    )  # over its own barrier


def test_tiles_after_writes() -> None:
    """Tiles over what lanes wrote come behind a proxy fence, over what they read behind a barrier."""
    source = torch.randn(32, 32)
    out = torch.zeros(1024)
    start = """mov.b64 %d9, m0; cvta.param.u64 %d9, %d9; shl.b32 %r7, %tid, 2; st.shared.b32 [%r7], %tid;
        {0} bar.sync 0;"""
    body = TILE.replace("fence.proxy.async.shared::cta;", "{fence}")
    known = {
        "bar": 4096,
        "bytes": 4096,
        "rank": 2,
        "corner": "0, 0",
        "wait": WAIT.format(bar=4096, parity=0),
        "read": READ.format(bytes=4096),
    }
    for fence, wanted in (("fence.proxy.async.shared::cta;", set()), ("", {"race"})):
        code = start.format(fence) + body.format(fence="", **known)
        found = small.kinds(
            code, out, machine.TensorMap(source, (32, 32), 0), threads=64, shared=4104, limit=200_000
        )
        assert found == wanted, fence
    reads = """shl.b32 %r7, %tid, 2; st.shared.b32 [%r7], %tid; fence.proxy.async.shared::cta; bar.sync 0;
        xor.b32 %r7, %r7, 128; ld.shared.b32 %r6, [%r7];"""
    for barrier, wanted in (("bar.sync 0;", set()), ("", {"race", "too early"})):
        code = "mov.b64 %d9, m0; cvta.param.u64 %d9, %d9;" + reads + barrier + body.format(fence="", **known)
        found = small.kinds(
            code,
            out,
            machine.TensorMap(source, (32, 32), 0),
            threads=64,
            shared=4104,
            limit=200_000,
            seeds=range(6),
        )
        assert found <= wanted and bool(found) == bool(wanted), barrier


def test_written_source() -> None:
    """A tile of what the launch wrote itself needs a proxy fence."""
    source = torch.zeros(8, 16)
    for fence, wanted in (("fence.proxy.async;", set()), ("", {"race"})):
        write = f"""mul.wide.u32 %d1, %tid, 4; add.u64 %d1, %b, %d1; st.global.b32 [%d1], 0f3F800000;
            st.global.b32 [%d1+256], 0f3F800000; {fence} bar.sync 0;"""
        known = {
            "bar": 512,
            "bytes": 512,
            "rank": 2,
            "corner": "0, 0",
            "wait": WAIT.format(bar=512, parity=0),
            "read": READ.format(bytes=512),
        }
        out = torch.zeros(128)
        unfenced = TILE.replace("fence.proxy.async.shared::cta;", "").format(**known)
        code = write + "mov.b64 %d9, m0; cvta.param.u64 %d9, %d9;" + unfenced
        found = small.kinds(
            code,
            out,
            source,
            machine.TensorMap(source, (8, 16), 0),
            threads=64,
            shared=520,
            limit=200_000,
            seeds=[0],
        )
        assert found == wanted, fence
        assert wanted or (out == 1).all()
        source.zero_()


def test_wrong_tiles() -> None:
    """Targets that are misaligned or too large, coordinates of another rank, tensors that are not known."""
    source = torch.randn(32, 32)
    out = torch.zeros(1)
    code = """mov.b64 %d9, m0; cvta.param.u64 %d9, %d9; setp.ne.u32 %p1, %tid, 0; @%p1 bra.uni over;
        mbarrier.init.shared.b64 [memory+8192], 1;
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
    [memory+{at}], [%d9, {{{corner}}}], [memory+{bar}]; over:"""
    for at, bar, wanted in (
        (0, 8192, set()),
        (512, 8192, {"misaligned"}),
        (8192, 8192, {"out of bounds"}),
        (0, 8200, {"mbarrier"}),
    ):
        found = small.kinds(
            code.format(at=at, bar=bar, corner="0, 0"),
            out,
            machine.TensorMap(source, (32, 32), 128),
            shared=8208,
        )
        assert found == wanted, (at, bar)
    with pytest.raises(NotImplementedError, match="dimensions"):
        small.run(
            code.format(at=0, bar=8192, corner="0, 0, 0").replace("2d", "3d"),
            out,
            machine.TensorMap(source, (32, 32), 128),
            shared=8208,
        )
    with pytest.raises(NotImplementedError, match="narrower"):
        small.run(
            code.format(at=0, bar=8192, corner="0, 0"),
            out,
            machine.TensorMap(source, (32, 16), 128),
            shared=8208,
        )


# ---- mbarriers

PASS = """setp.eq.u32 %p1, %tid, 0; @%p1 mbarrier.init.shared.b64 [memory+8], {count}; bar.sync 0;
setp.ge.u32 %p4, %tid, 32; @%p4 bra reader; {write} mbarrier.arrive.shared.b64 _, [memory+8]; bra over;
reader: {wait} ld.shared.b32 %r1, [memory]; st.global.b32 [%a], %r1; over:"""
WRITE = "@%p1 st.shared.b32 [memory], 42;"


def passed(count: int = 32, write: str = WRITE, wait: str | None = None, body: str = PASS) -> set[str]:
    wait = WAIT.format(bar=8, parity=0) if wait is None else wait
    code = body.format(count=count, write=write, wait=wait)
    return small.kinds(code, torch.zeros(1, dtype=torch.int32), threads=64, shared=64, limit=200_000)


def test_phases() -> None:
    """What is written before an arrival is read after the wait for its phase."""
    assert passed() == set()
    assert "race" in passed(wait="")
    assert "race" in passed(wait=WAIT.format(bar=8, parity=1))
    assert passed(count=33) == {"deadlock"}
    arrive = "mbarrier.arrive.shared.b64 _, [memory+8];"
    assert passed(body=PASS.replace("{write} " + arrive, arrive + " {write}")) == {"race"}


def test_rounds() -> None:
    """A ring of one place: full and empty phases by turns, with the parity of the round."""
    ring = """setp.eq.u32 %p1, %tid, 0; @%p1 mbarrier.init.shared.b64 [memory+8], 32;
        @%p1 mbarrier.init.shared.b64 [memory+16], 32; bar.sync 0;
    mov.u32 %r5, 0; setp.ge.u32 %p4, %tid, 32; @%p4 bra reader;
    writer: and.b32 %r6, %r5, 1; xor.b32 %r7, %r6, 1; {empty}
    @%p1 st.shared.b32 [memory], %r5; mbarrier.arrive.shared.b64 _, [memory+8];
    add.u32 %r5, %r5, 1; setp.lt.u32 %p5, %r5, 5; @%p5 bra writer; bra over;
    reader: and.b32 %r6, %r5, 1; {full}
    ld.shared.b32 %r1, [memory]; mul.wide.u32 %d1, %r5, 4; add.u64 %d1, %a, %d1; st.global.b32 [%d1], %r1;
    mbarrier.arrive.shared.b64 _, [memory+16]; add.u32 %r5, %r5, 1; setp.lt.u32 %p5, %r5, 5;
    @%p5 bra reader; over:"""
    empty = "e: mbarrier.try_wait.parity.shared.b64 %p2, [memory+16], %r7; @!%p2 bra e;"
    full = "f: mbarrier.try_wait.parity.shared.b64 %p2, [memory+8], %r6; @!%p2 bra f;"
    out = torch.full((5,), -1, dtype=torch.int32)
    options = {"threads": 64, "shared": 64, "limit": 50_000, "seeds": range(4)}
    assert small.kinds(ring.format(empty=empty, full=full), out, **options) == set()
    assert out.tolist() == list(range(5))
    assert "race" in small.kinds(ring.format(empty="", full=full), out, **options)
    assert "race" in small.kinds(ring.format(empty=empty, full=""), out, **options)
    assert small.kinds(ring.format(empty=empty.replace("%r7", "%r6"), full=full), out, **options) == {
        "deadlock"
    }


def test_misuse() -> None:
    """mbarriers that are not initialised, initialised twice, not visible yet, misaligned, or gone."""
    options = {"shared": 64, "threads": 32}
    first = "setp.eq.u32 %p1, %tid, 0; @%p1 mbarrier.init.shared.b64 [memory], {0}; bar.sync 0;"
    arrive = "@%p1 mbarrier.arrive.shared.b64 _, [memory];"
    assert small.kinds(first.format(1) + arrive, **options) == set()
    assert small.kinds("setp.eq.u32 %p1, %tid, 0;" + arrive, **options) == {"mbarrier"}
    assert small.kinds(first.format(1) * 2, **options) == {"mbarrier"}
    assert (
        small.kinds(
            first.format(1) + "@%p1 mbarrier.inval.shared.b64 [memory]; bar.sync 0;" + first.format(2),
            **options,
        )
        == set()
    )
    assert small.kinds(
        first.format(1) + "@%p1 mbarrier.inval.shared.b64 [memory]; bar.sync 0;" + arrive, **options
    ) == {"mbarrier"}
    assert small.kinds(first.format(0), **options) == {"mbarrier"}
    assert small.kinds(
        first.format(1).replace("bar.sync 0;", "setp.eq.u32 %p1, %tid, 1;") + arrive, **options
    ) == {"race"}
    assert small.kinds(first.format(1).replace("[memory]", "[memory+4]"), **options) == {"misaligned"}
    assert small.kinds(first.format(2) + "@%p1 mbarrier.arrive.shared.b64 _, [memory], 3;", **options) == {
        "mbarrier"
    }
    counted = first.format(1) + "@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [memory], 64;" + arrive
    assert small.kinds(counted, **options) == {"mbarrier"}  # the second arrival in one phase


def test_invalidated_early() -> None:
    """An mbarrier may not be invalidated while a copy is to complete it."""
    source = torch.randn(32, 32)
    bar = "@%p9 mbarrier.inval.shared.b64 [memory+4096];"
    start = "setp.eq.u32 %p9, %tid, 0;"
    found, _ = tile(source, (32, 32), (0, 0), wait=start + bar, read="")
    assert "mbarrier" in found
    found, _ = tile(source, (32, 32), (0, 0), read="bar.sync 0;" + start + bar)
    assert found == set()
