# SPDX-License-Identifier: Apache-2.0
"""PTX as text: names, scopes, numbers, labels, parameters; and instructions that are refused."""

from __future__ import annotations

import pytest
from ptx import machine, small, text

pytestmark = small.needed

KERNEL = """//
.version 8.7 // .entry none()
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
/* two
   lines */
.visible .entry first(
  .param .u64 .ptr .global .align 1 first_param_0,
  .param .u32 first_param_1, .param .align 64 .b8 first_param_2[128],
  .param .f32 first_param_3
)
.reqntid 128
{
  .reg .pred %p<3>;
  .reg .b32 	%r<4>, %other;
  .loc 1 5 0
  ld.param.b32 	%r1, [first_param_1];
$L__BB0_1:
  { .reg .b32 %r1; mov.u32 %r1, -5; inner: add.u32 %other, %r1, 0x10; @!%p1 bra inner; }
  mov.u32 %r2, global_smem;
  mov.u32 %r3, 017;
  @%p2 bra.uni $L__BB0_1;
  ret;
}
.visible .entry second() .maxntid 64, 1, 1 { .reg .b64 %rd<2>; mov.u64 %rd1, 0d3FF0000000000000; ret; }
"""


def test_kernels() -> None:
    """Parameters with their places, registers by scope, labels, lines as in the text."""
    first, second = text.kernels(KERNEL)
    assert (first.name, first.threads, second.name, second.threads) == ("first", 128, "second", 64)
    assert [(p.name, p.type, p.offset, p.size) for p in first.parameters] == [
        ("first_param_0", "u64", 0, 8), ("first_param_1", "u32", 8, 4),
        ("first_param_2", "b8", 64, 128), ("first_param_3", "f32", 192, 4),
    ]  # fmt: skip
    assert first.parameter_bytes == 196 and second.parameter_bytes == 0
    load, move, add, back, shared, octal, jump, _ = first.instructions
    assert load.operands[1][2:4] == (-1, 8)
    assert load.operands[0][2] != move.operands[0][2]  # %r1 outside and inside
    assert move.operands[1][3] == (1 << 64) - 5 and add.operands[2][3] == 16
    assert (back.targets, back.unless) == ([2], True) and (jump.targets, jump.unless) == ([1], False)
    assert (shared.operands[1][3], octal.operands[1][3]) == (0, 15)
    assert KERNEL.split("\n")[jump.line - 1].strip() == jump.text + ";"
    assert second.instructions[0].operands[1][3] == 0x3FF0000000000000
    assert text.kernel(KERNEL, "second").name == "second"
    with pytest.raises(text.SyntaxProblem, match="found 2"):
        text.kernel(KERNEL)


@pytest.mark.parametrize(
    "line",
    ["mov.u32 %r1, %nothing;", "mov.f32 %r1, 1.5;", "mov.u32 %r1, %clock;", "bra nowhere;",
     ".local .align 4 .b8 depot[16];", "ld.global.b32 %r1, [%a+%r2];",
     ".shared .align 4 .b8 mine[64]; mov.u32 %r1, memory;"],
)  # fmt: skip
def test_unknown_text(line: str) -> None:
    """What the reader does not know, it names."""
    with pytest.raises(text.SyntaxProblem, match=r"small|mine|memory"):
        small.kernel(line, 1)


REFUSED = """add.sat.s32 %r1, %r1, %r1
add.sat.f32 %r1, %r1, %r1
add.rz.f32 %r1, %r1, %r1
mul.rm.f32 %r1, %r1, %r1
mul.rn.f32x2 %d1, %d1, %d1
fma.rp.f64 %d1, %d1, %d1, %d1
fma.rn.relu.bf16 %h1, %h1, %h1, %h1
add.cc.u32 %r1, %r1, %r1
addc.u32 %r1, %r1, %r1
mul24.lo.u32 %r1, %r1, %r1
min.xorsign.abs.f32 %r1, %r1, %r1
max.f32 %r1, %r1, %r1, %r1
setp.lt.and.f32 %p1, %r1, %r1, %p2
setp.eq.or.s32 %p1, %r1, %r1, !%p2
set.eq.u32.f32 %r1, %r1, %r1
lop3.or.b32 %r1|%p1, %r1, %r1, %r1, 0x80, %p2
prmt.b32.f4e %r1, %r1, %r1, %r1
cvt.sat.f32.f32 %r1, %r1
cvt.rn.relu.bf16.f32 %h1, %r1
cvt.rz.bf16.f32 %h1, %r1
cvt.rz.f32.s32 %r1, %r1
cvt.rn.satfinite.e4m3x2.f32 %h1, %r1, %r1
tanh.approx.f32 %r1, %r1
ld.const.b32 %r1, [%d1]
ld.local.b32 %r1, [%d1]
ld.shared::cluster.b32 %r1, [%r1]
ld.acquire.cluster.b32 %r1, [%d1]
ld.global.mmio.relaxed.sys.b32 %r1, [%d1]
st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r1], %r1, [%r2]
st.global.b8 [%d1], %h1
st.local.b32 [%d1], %r1
atom.global.add.noftz.f16x2 %r1, [%d1], %r1
atom.global.add.bf16 %h1, [%d1], %h1
atom.global.min.f32 %r1, [%d1], %r1
atom.global.dec.u32 %r1, [%d1], %r1
atom.global.xor.b32 %r1, [%d1], %r1
atom.global.v2.f32.add {%r1, %r2}, [%d1], {%r1, %r2}
atom.cluster.global.add.u32 %r1, [%d1], %r1
red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%r1], %r1, [%r1]
redux.sync.add.s32 %r1, %r1, -1
match.any.sync.b32 %r1, %r1, -1
activemask.b32 %r1
shfl.idx.b32 %r1, %r1, 0, 31
vote.ballot.b32 %r1, %p1
bar.red.popc.u32 %r1, 0, %p1
barrier.cta.red.and.pred %p1, 0, %p2
barrier.cluster.arrive
barrier.cluster.wait
fence.acq_rel.cluster
fence.acquire.sync_restrict::shared::cluster.cluster
fence.proxy.tensormap::generic.acquire.gpu [%d1], 128
fence.proxy.alias
cp.async.cg.shared.global.L2::cache_hint [%r1], [%d1], 16, %d2
cp.async.mbarrier.arrive.noinc.shared.b64 [%r1]
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d1], %r2, [%r3]
cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r1], [%d1, {%r1, %r2}], [%r3], %h1
cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d1, {%r1, %r2}], [%r3]
cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%r1], [%d1, {%r1, %r2, %r1, %r2}], [%r3], {%h1, %h2}
cp.async.bulk.commit_group
cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%d1], [%r1], %r2
mbarrier.arrive.noComplete.shared.b64 %d1, [%r1], 1
mbarrier.arrive_drop.shared.b64 %d1, [%r1]
mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r1]
mbarrier.expect_tx.relaxed.cta.shared.b64 [%r1], 16
mbarrier.test_wait.shared.b64 %p1, [%r1], %d1
mbarrier.try_wait.parity.relaxed.cta.shared.b64 %p1, [%r1], 0
mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1, %r2}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r1, %r2}
mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1, %r2, %r3, %r4}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r1, %r2, %r3, %r4}
mma.sp.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%r1, %r2, %r3, %r4}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r1, %r2, %r3, %r4}, %r7, 0
wgmma.mma_async.sync.aligned.m64n8k16.f16.f16.f16 {%r1, %r2}, %d1, %d2, %p1, 1, 1, 0, 0
wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.bf16.bf16 {%r1, %r2, %r3, %r4}, %d1, %d2, %r5, 0, %p1, 1, 1, 0, 0
wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%r1, %r2, %r3, %r4}, %d1, %d2, %p1, 1, 1
@%p2 wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1, %r2, %r3, %r4}, %d1, %d2, %p1, 1, 1, 0, 0
ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r1, %r2}, [%r3]
stmatrix.sync.aligned.m16n8.x1.trans.shared.b8 [%r3], {%r1}
tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 512
mapa.shared::cluster.u32 %r1, %r2, 0
isspacep.shared %p1, %d1
cvta.local.u64 %d1, %d1
trap"""  # noqa: E501


def test_refusals() -> None:
    """An instruction with a word that the machine does not know is refused by name."""
    for line in REFUSED.split("\n"):
        with pytest.raises(NotImplementedError) as refused:
            machine._program(small.kernel(line + ";"))
        assert line in str(refused.value), line


def test_refused_launches() -> None:
    """Blocks of other than whole warps, and of more threads than there are."""
    for threads in (16, 48, 2048):
        with pytest.raises(NotImplementedError, match="threads"):
            small.run("", threads=threads)
    with pytest.raises(NotImplementedError, match="part of a warp"):
        small.run("setp.lt.u32 %p1, %lane, 4; @!%p1 bra over; bar.warp.sync 0xf; over:")
