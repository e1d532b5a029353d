# SPDX-License-Identifier: Apache-2.0
"""Matrix instructions against NumPy, in every layout, and what has to come before and after them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx import machine, small

pytestmark = small.needed
LANE = np.arange(32)
G, T = LANE // 4, LANE % 4  # the group of a lane, and its place in it
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}


def numbers(kind: str, *shape: int) -> torch.Tensor:
    """Random numbers that `kind` has."""
    values = torch.randn(*shape).to(DTYPES[kind])
    return (values.view(torch.int32) & -8192).view(torch.float32) if kind == "tf32" else values


def words(fragments: torch.Tensor) -> torch.Tensor:
    """[lanes, elements] as words, two 16-bit elements in each."""
    return fragments.contiguous().view(torch.int32)


def loads(name: str, register: str, count: int, lane: str = "%lane") -> str:
    """Words [lane, count] of a tensor into registers."""
    lines = [f"mul.wide.u32 %d1, {lane}, {4 * count}; add.u64 %d1, %{name}, %d1;"]
    return "\n".join(lines + [f"ld.global.b32 {register.format(n)}, [%d1+{4 * n}];" for n in range(count)])


def stored(name: str, register: str, count: int, lane: str = "%lane") -> str:
    """Registers into words [lane, count] of a tensor."""
    lines = [f"mul.wide.u32 %d1, {lane}, {4 * count}; add.u64 %d1, %{name}, %d1;"]
    return "\n".join(lines + [f"st.global.b32 [%d1+{4 * n}], {register.format(n)};" for n in range(count)])


def listed(register: str, count: int) -> str:
    return "{" + ", ".join(register.format(n) for n in range(count)) + "}"


def fragment_a(a: torch.Tensor) -> torch.Tensor:
    """Of a 16 x k operand, as the PTX ISA lays it out: [lanes, elements in the order of registers]."""
    per = 4 // a.element_size()
    parts = []
    for register in range(a.numel() // 32 // per):
        for e in range(per):
            parts.append(a[G + 8 * (register % 2), T * per + e + 4 * per * (register // 2)])
    return torch.stack(parts, 1)


def fragment_b(b: torch.Tensor) -> torch.Tensor:
    """Of a k x 8 operand."""
    per = 4 // b.element_size()
    parts = [
        b[T * per + e + 4 * per * register, G]
        for register in range(b.numel() // 32 // per)
        for e in range(per)
    ]
    return torch.stack(parts, 1)


def fragment_c(c: torch.Tensor) -> torch.Tensor:
    """Of a 16 x n sum."""
    return torch.stack(
        [c[G + 8 * (i // 2 % 2), i // 4 * 8 + 2 * T + i % 2] for i in range(c.numel() // 32)], 1
    )


@pytest.mark.parametrize(("kind", "k"), [("bf16", 8), ("bf16", 16), ("f16", 16), ("tf32", 4), ("tf32", 8)])
def test_mma(kind: str, k: int) -> None:
    """A 16 x 8 product of one warp is the sum plus the exact product, rounded once."""
    a, b, c = numbers(kind, 16, k), numbers(kind, k, 8), torch.randn(16, 8)
    fragments = [words(fragment_a(a)), words(fragment_b(b)), words(fragment_c(c))]
    counts = [f.shape[1] for f in fragments]
    out = torch.zeros(32, 4)
    body = loads("b", "%r1{}", counts[0]) + loads("c", "%r2{}", counts[1]) + loads("e", "%r3{}", 4)
    body += f"""mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {listed("%r4{}", 4)},
    {listed("%r1{}", counts[0])},
    {listed("%r2{}", counts[1])}, {listed("%r3{}", 4)};""" + stored("a", "%r4{}", 4)
    assert not small.run(body, out, *fragments).findings
    assert torch.equal(out, fragment_c((c.double() + a.double() @ b.double()).float()))


def test_tf32_operands() -> None:
    """The low bits of a tf32 operand are ignored."""
    a, b = torch.randn(16, 8), torch.randn(8, 8)
    body = loads("b", "%r1{}", 4) + loads("c", "%r2{}", 2)
    body += """mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r40, %r41, %r42, %r43},
    {%r10, %r11, %r12, %r13}, {%r20, %r21}, {0, 0, 0, 0};"""
    out = torch.zeros(32, 4)
    assert not small.run(
        body + stored("a", "%r4{}", 4), out, words(fragment_a(a)), words(fragment_b(b))
    ).findings
    cut_a, cut_b = ((x.view(torch.int32) & -8192).view(torch.float32).double() for x in (a, b))
    assert torch.equal(out, fragment_c((cut_a @ cut_b).float()))


def pieces(matrix: np.ndarray, trans: bool) -> np.ndarray:
    """What each lane holds of an 8 x 8 matrix of 16-bit elements, as a word."""
    m = matrix.T if trans else matrix
    return (m[G, 2 * T].astype(np.uint32) | m[G, 2 * T + 1].astype(np.uint32) << 16).view(np.int32)


FILL = """mul.wide.u32 %d1, %lane, 16; add.u64 %d1, %b, %d1; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1];
    shl.b32 %r9, %lane, 4; st.shared.v4.b32 [%r9], {%r1, %r2, %r3, %r4};"""


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices(count: int, trans: str) -> None:
    """ldmatrix takes rows from the lanes of each matrix, stmatrix is its inverse, and lanes meet before."""
    rows = np.random.default_rng(0).integers(0, 1 << 16, (32, 8), dtype=np.uint16)
    source, out = torch.from_numpy(rows.view(np.int32).copy()), torch.zeros(32, count, dtype=torch.int32)
    registers = listed("%r2{}", count)
    load = f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers}, [%r9];" + stored(
        "a", "%r2{}", count
    )
    assert small.kinds(FILL + load, out, source, shared=512) == {"race"}
    assert small.kinds(FILL + "bar.warp.sync -1;" + load, out, source, shared=512) == set()
    wanted = np.stack([pieces(rows[8 * m : 8 * m + 8], bool(trans)) for m in range(count)], 1)
    assert (out.numpy() == wanted).all()
    back = torch.zeros(32, 4, dtype=torch.int32)
    whole = "{%r1, %r2, %r3, %r4}"
    store = loads("b", "%r2{}", count)
    store += (
        f"shl.b32 %r9, %lane, 4; stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r9], {registers};"
    )
    read = f"""setp.lt.u32 %p1, %lane, {8 * count}; @%p1 ld.shared.v4.b32 {whole}, [%r9];
        mul.wide.u32 %d1, %lane, 16;
    add.u64 %d1, %a, %d1; @%p1 st.global.v4.b32 [%d1], {whole};"""
    assert small.kinds(store + read, back, out, shared=512) == {"race"}
    assert small.kinds(store + "bar.warp.sync -1;" + read, back, out, shared=512) == set()
    assert (back.numpy().view(np.uint16)[: 8 * count] == rows[: 8 * count]).all()
    wrong = load.replace("[%r9]", "[%r9+8]")
    assert "misaligned" in small.kinds(FILL + "bar.warp.sync -1;" + wrong, out, source, shared=512)
    assert "out of bounds" in small.kinds(
        FILL + "bar.warp.sync -1;" + load.replace("[%r9]", "[%r9+512]"), out, source, shared=512
    )


def test_movmatrix() -> None:
    """The fragment of the transposed matrix."""
    rows = np.random.default_rng(0).integers(0, 1 << 16, (8, 8), dtype=np.uint16)
    out, source = torch.zeros(32, 1, dtype=torch.int32), torch.from_numpy(pieces(rows, False)).reshape(32, 1)
    body = (
        loads("b", "%r1{}", 1) + "movmatrix.sync.aligned.m8n8.trans.b16 %r20, %r10;" + stored("a", "%r2{}", 1)
    )
    assert not small.run(body, out, source).findings
    assert (out.numpy()[:, 0] == pieces(rows, True)).all()


# ---- warp groups


def descriptor(start: int, leading: int, stride: int, swizzle: int) -> int:
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def image(x: torch.Tensor, swizzle: int, across: bool) -> tuple[np.ndarray, int, int]:
    """A [rows, k] operand as bytes of shared memory, with its leading and stride offsets: contiguous along
    k, or along its rows."""
    rows, k = x.shape
    size = x.element_size()
    raw = x.contiguous().view(torch.uint8).numpy().reshape(rows, k, size)
    row, column = np.meshgrid(np.arange(rows), np.arange(k), indexing="ij")
    if across:
        leading, stride = (16 * swizzle, 8 * swizzle) if swizzle else (128, 256)
        byte = row * size
        if swizzle:
            at = byte // swizzle * leading + column // 8 * stride + column % 8 * swizzle + byte % swizzle
        else:
            at = byte // 16 * stride + column // 8 * leading + column % 8 * 16 + byte % 16
    else:
        leading, stride = (16, 8 * swizzle) if swizzle else (128, 16 * k * size // 2)
        byte = column * size
        at = (
            row * swizzle + byte
            if swizzle
            else row // 8 * stride + row % 8 * 16 + byte // 16 * leading + byte % 16
        )
    if swizzle:
        at = at ^ (at >> 7 & swizzle // 16 - 1) << 4
    out = np.zeros(-(-(int(at.max()) + size) // 1024) * 1024, dtype=np.uint8)
    for e in range(size):
        out[at + e] = raw[:, :, e]
    return out, leading, stride


COPY = """shl.b32 %r9, %tid, 4; mul.wide.u32 %d2, %tid, 16; add.u64 %d2, %b, %d2;
fill: setp.ge.u32 %p1, %r9, {bytes}; @%p1 bra filled; ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%d2];
st.shared.v4.b32 [%r9], {{%r1, %r2, %r3, %r4}};
add.u32 %r9, %r9, {step}; add.u64 %d2, %d2, {step}; bra fill; filled: {fence} bar.sync 0; {zero} {before}
setp.ne.u32 %p2, {scale}, 0; {product} wgmma.commit_group.sync.aligned; {after} {wait} {store}"""
FENCE, BEFORE, WAIT = (
    "fence.proxy.async.shared::cta;",
    "wgmma.fence.sync.aligned;",
    "wgmma.wait_group.sync.aligned 0;",
)


def group(
    kind: str = "bf16", n: int = 16, steps: int = 1, swizzle: tuple[int, int] = (128, 128),
    across: tuple[bool, bool] = (False, False),
    registers: bool = False, scale: int = 1, signs: tuple[int, int] = (1, 1),
    threads: int = 128, check: bool = True, **change: str,
) -> set[str]:  # fmt: skip
    """The findings of a 64 x n product of a warp group; the sum is compared unless something was found."""
    k = 32 // DTYPES[kind].itemsize
    a, b = numbers(kind, 64, k * steps), numbers(kind, n, k * steps)
    (left, *offsets_a), (right, *offsets_b) = image(a, swizzle[0], across[0]), image(b, swizzle[1], across[1])
    data = torch.from_numpy(np.concatenate([left, right]).view(np.int32).copy())
    out = torch.zeros(128, n // 2)
    names = [f"%r{100 + i}" for i in range(n // 2)]
    sums = "{" + ", ".join(names) + "}"
    fragments: list[torch.Tensor] = []
    load, product = "", ""
    for step in range(steps):
        steps_of = [
            (16 if is_across else 1) * (s if is_across else 32)
            for is_across, s in zip(across, swizzle, strict=True)
        ]
        second = descriptor(len(left) + step * steps_of[1], *offsets_b, swizzle[1])
        trans = [int(x) for x in across] if kind != "tf32" else []
        if registers:
            parts = [fragment_a(a[16 * w : 16 * w + 16, k * step : k * step + k]) for w in range(4)]
            fragments.append(words(torch.cat(parts)))
            first, trans = listed("%r2{}", 4), trans[1:]
            load = loads("c", "%r2{}", 4, "%tid")
        else:
            first = str(descriptor(step * steps_of[0], *offsets_a, swizzle[0]))
            product += f"mov.b64 %d20, {first}; "
            first = "%d20"
        tail = "".join(f", {t}" for t in trans)
        product += f"""mov.b64 %d21, {second}; wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{kind}.{kind}
        {sums}, {first}, %d21, %p2, {signs[0]}, {signs[1]}{tail};\n"""
    store = f"mul.wide.u32 %d1, %tid, {2 * n}; add.u64 %d1, %a, %d1;" + "".join(
        f"st.global.b32 [%d1+{4 * i}], {r};" for i, r in enumerate(names)
    )
    zero = load + "".join(f"mov.b32 {r}, 0f3F000000;" for r in names)
    fields = {
        "bytes": 4 * len(data),
        "step": 16 * threads,
        "fence": FENCE,
        "zero": zero,
        "before": BEFORE,
        "scale": scale,
        "product": product,
        "after": "",
        "wait": WAIT,
        "store": store,
    }
    found = small.kinds(
        COPY.format(**{**fields, **change}),
        out,
        data,
        *fragments,
        threads=threads,
        shared=4 * len(data),
        seeds=(0, 1),
    )
    if not found and check:
        whole = a.double() @ b.double().T * signs[0] * signs[1]
        wanted = torch.cat([fragment_c(whole[16 * w : 16 * w + 16].float()) for w in range(4)]) + (
            0.5 if scale else 0
        )
        torch.testing.assert_close(out, wanted, rtol=2e-6, atol=2e-6)
    return found


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_layouts(kind: str) -> None:
    """Both operands with every swizzle, along k contiguous; of 16-bit types along the other dimension too."""
    for swizzle in (0, 32, 64, 128):
        assert group(kind, swizzle=(swizzle, 128), n=8) == set()
        assert group(kind, swizzle=(128, swizzle), n=32) == set()
        if kind != "tf32":
            assert group(kind, swizzle=(swizzle, 64), across=(True, False), n=16) == set()
            assert group(kind, swizzle=(64, swizzle), across=(False, True), n=64) == set()
            assert group(kind, swizzle=(swizzle, swizzle), across=(True, True), n=64) == set()


def test_products() -> None:
    """Widths to 256, several steps along k, operands in registers, negated operands, and no old sum."""
    for n in (8, 24, 96, 256):
        assert group(n=n) == set()
    assert group(steps=4) == set()
    assert group("tf32", steps=4, n=24) == set()
    for kind in ("bf16", "tf32"):
        assert group(kind, registers=True) == set()
        assert group(kind, signs=(-1, 1)) == set()
        assert group(kind, registers=True, signs=(-1, -1)) == set()
        assert group(kind, scale=0) == set()
    assert group(registers=True, across=(False, True), n=64) == set()


def test_around_products() -> None:
    """Each wait and fence around a product, left out."""
    assert group() == set()
    assert group(fence="") == {"race"}
    assert group(before="") == {"wgmma"}
    assert group(wait="") == {"wgmma"}
    assert group(wait="wgmma.wait_group.sync.aligned 1;") == {"wgmma"}
    assert group(wait="wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1;") == set()
    assert group(zero="") == {"never written"}
    assert group(scale=0, zero="") == set()
    assert group(registers=True, after="mov.b32 %r20, 0;") == {"wgmma"}
    assert group(registers=True, wait=WAIT + "mov.b32 %r20, 0;") == set()
    assert group(before=BEFORE + "add.f32 %r100, %r100, 0f3F000000;") == {"wgmma"}
    assert group(after="add.f32 %r100, %r100, 0f3F000000;") == {"wgmma"}
    assert group(threads=96) == {"divergence"}
    assert group(before=BEFORE + "setp.eq.u32 %p3, %tid, 0; @%p3 bra same; mov.u32 %r1, 1; same:") == set()


def test_operands_in_use() -> None:
    """Shared memory that a product reads is written again after its wait, by other warps behind a barrier."""
    write = "shl.b32 %r5, %tid, 2; st.shared.b32 [%r5], %tid;"
    assert "too early" in group(after=write)
    assert group(wait=WAIT + "bar.sync 0;" + write) == set()
    second = "xor.b32 %r5, %tid, 64; shl.b32 %r5, %r5, 5; st.shared.b32 [%r5], %tid;"
    assert group(wait=WAIT + second) & {"race", "too early"}
    assert group(wait=WAIT + "bar.sync 0;" + second) == set()
    read = "ld.shared.b32 %r6, [%r5];"
    assert "too early" in group(after="shl.b32 %r5, %tid, 2;" + read + write)
    assert group(after="shl.b32 %r5, %tid, 2;" + read) == set()


def test_tile_to_product() -> None:
    """A product of tiles that the copy engine brought needs the wait for their phase and no proxy fence."""
    a, b = numbers("bf16", 64, 64), numbers("bf16", 64, 64)
    out = torch.zeros(128, 32)
    names = [f"%r{100 + i}" for i in range(32)]
    tile = """cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
    [memory+{0}], [%d{1}, {{0, 0}}], [memory+16384];"""
    body = (
        """setp.ne.u32 %p1, %tid, 0; @%p1 bra.uni ready; mbarrier.init.shared.b64 [memory+16384], 1;
            fence.proxy.async.shared::cta;
    mov.b64 %d9, m0; cvta.param.u64 %d9, %d9; mov.b64 %d10, m1; cvta.param.u64 %d10, %d10;
    mbarrier.arrive.expect_tx.shared.b64 _, [memory+16384], 16384;"""
        + tile.format(0, 9)
        + tile.format(8192, 10)
    )
    body += (
        "ready: bar.sync 0; {wait} wgmma.fence.sync.aligned; setp.ne.u32 %p2, 0, 0; setp.ne.u32 %p3, 1, 0;"
    )
    for step in range(4):
        body += f"""mov.b64 %d20, {descriptor(32 * step, 16, 1024, 128)};
            mov.b64 %d21, {descriptor(8192 + 32 * step, 16, 1024, 128)};
        wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 <{", ".join(names)}>,
        %d20, %d21, %p{2 if step == 0 else 3}, 1, 1, 0, 0;"""
    body += """wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; mul.wide.u32 %d1, %tid, 128;
        add.u64 %d1, %a, %d1;"""
    body += "".join(f"st.global.b32 [%d1+{4 * i}], {r};" for i, r in enumerate(names))
    body = body.replace("{0, 0}", "<0, 0>")
    wait = "again: mbarrier.try_wait.parity.shared.b64 %p4, [memory+16384], 0; @!%p4 bra.uni again;"
    maps = [machine.TensorMap(x, (64, 64), 128) for x in (a, b)]

    def found(wait: str) -> set[str]:
        return small.kinds(
            body.format(wait=wait).replace("<", "{").replace(">", "}"), out, *maps, threads=128, shared=16392
        )

    assert found(wait) == set()
    whole = (a.double() @ b.double().T).float()
    torch.testing.assert_close(
        out, torch.cat([fragment_c(whole[16 * w : 16 * w + 16]) for w in range(4)]), rtol=2e-6, atol=2e-6
    )
    assert found("") & {"too early", "race"}
