# SPDX-License-Identifier: Apache-2.0
"""Loops of machine code, from small texts in the form of nvdisasm."""

from __future__ import annotations

import pytest

from fused_ewclora.backends.triton.tools import sass
from fused_ewclora.backends.triton.tools.sass import Instruction, Loop


def tree(*lines: str) -> Loop:
    """Of a kernel whose instructions and labels are given, one a line."""
    text = [".text.some_kernel:"]
    for place, line in enumerate(lines):
        text.append(line if line.endswith(":") else f"        /*{16 * place:04x}*/   {line} ;")
    (found,) = sass.functions("\n".join(text)).values()
    return found


def names(loop: Loop) -> list[str]:
    return [step.instruction.name for step in loop.own()]


def test_one_loop():
    """A loop has the instructions from its label to its branch; the rest belongs to the function."""
    found = tree(
        "MOV R1, R2", ".L_x_0:", "FFMA R1, R1, R1, R1", "@P0 BRA `(.L_x_0)", "STG.E [R2], R1", "EXIT"
    )
    (loop,) = found.inner
    assert names(loop) == ["FFMA", "BRA"]
    assert names(found) == ["MOV", "STG", "EXIT"]
    assert loop.count() == {"fma": 1, "control": 1}


def test_nested_counted_once():
    """What is in an inner loop does not count for the outer one."""
    found = tree(
        ".L_x_0:", "MOV R1, R2", ".L_x_1:", "FADD R1, R1, R3", "@!P0 BRA `(.L_x_1)", "FMUL R1, R1, R1",
        "BRA.U UP0, `(.L_x_0)", "EXIT",
    )  # fmt: skip
    (outer,) = found.inner
    (inner,) = outer.inner
    assert (names(outer), names(inner)) == (["MOV", "FMUL", "BRA"], ["FADD", "BRA"])
    assert [len(nest) for nest in found.nest()] == [1, 2, 3]


def test_longer_way_counts():
    """Of two ways the longer one counts, and is uncertain; what both share is certain."""
    found = tree(
        ".L_x_0:", "@P1 BRA `(.L_x_1)", "FADD R1, R1, R1", "FADD R2, R2, R2", "BRA `(.L_x_2)", ".L_x_1:",
        "FMUL R3, R3, R3", ".L_x_2:", "ISETP.GT P0, R1, R2", "@P0 BRA `(.L_x_0)", "EXIT",
    )  # fmt: skip
    (loop,) = found.inner
    assert names(loop) == ["BRA", "FADD", "FADD", "BRA", "ISETP", "BRA"]
    assert [step.certain for step in loop.own()] == [True, False, False, False, True, True]


def test_retry_out_of_line():
    """The retry of a wait that stands behind the function is no loop, and its way is not taken."""
    found = tree(
        ".L_x_0:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR9], R7", "@!P0 BRA `(.L_x_1)", ".L_x_2:",
        "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR24], R24", "@!P1 BRA `(.L_x_0)", "EXIT", ".L_x_1:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR9], R7", "@!P0 BRA `(.L_x_1)", "BRA `(.L_x_2)",
    )  # fmt: skip
    (loop,) = found.inner
    assert names(loop) == ["SYNCS", "BRA", "HGMMA", "BRA"]
    assert all(step.certain for step in loop.own()) or loop.inner == ()


def test_turnstile_waits():
    """A loop that polls memory until it is its turn counts as waiting."""
    found = tree(
        "MOV R1, R2",
        ".L_x_0:",
        "LDG.E.STRONG.GPU R0, [R2]",
        "ISETP.NE P0, R0, R3",
        "@P0 BRA `(.L_x_0)",
        "EXIT",
    )
    assert found.inner == ()
    assert [step.waits for step in found.steps if isinstance(step, Loop)] == [True]


def test_loop_left_by_call():
    """ptxas leaves some loops by a call that never returns (sm_80)."""
    found = tree(
        "BRA `(.L_x_1)", ".L_x_1:", "FADD R1, R1, R1", "@!P6 CALL.REL.NOINC `(.L_x_2)", "BRA `(.L_x_1)",
        ".L_x_2:", "EXIT",
    )  # fmt: skip
    (loop,) = found.inner
    assert names(loop) == ["FADD", "CALL", "BRA"]


def test_function_called():
    """A function that is called is not part of the kernel's loops, and the code goes on behind the call."""
    found = tree(
        "CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64)", "STG.E [R2], R1", "EXIT",
        "$__internal_0_$__cuda_sm20_div_s64:", ".L_x_9:", "@P0 BRA `(.L_x_9)", "RET.REL.NODEC R4",
    )  # fmt: skip
    assert names(found) == ["CALL", "STG", "EXIT"] and found.inner == ()


def test_early_exit():
    """Threads that leave early do not end the function, unless nothing else does."""
    found = tree("@P0 EXIT", "FADD R1, R1, R1", ".L_x_0:", "FMUL R1, R1, R1", "@P1 EXIT", "BRA `(.L_x_0)")
    (loop,) = found.inner
    assert names(loop) == ["FMUL", "EXIT", "BRA"]
    assert names(found) == ["EXIT", "FADD"]


def test_reconvergence():
    """BSYNC goes on where its BSSY says."""
    found = tree(
        "BSSY B0, `(.L_x_1)", "@P0 BRA `(.L_x_0)", "FADD R1, R1, R1", ".L_x_0:", "BSYNC B0", ".L_x_1:", "EXIT"
    )
    assert names(found) == ["BSSY", "BRA", "FADD", "BSYNC", "EXIT"]


# Bytes of 32 lanes / 128; 8 x 8 matrices of 16 bytes a row; operands of a warp group / 128 / 4.
@pytest.mark.parametrize(
    ("opcode", "operands", "wavefronts"),
    [
        ("LDS", "R1, [R2]", 1),
        ("LDS.64", "R1, [R2]", 2),
        ("STS.128", "[R2], R4", 4),
        ("LDSM.16.M88.4", "R4, [R2]", 4),
        ("LDSM.16.MT88.2", "R4, [R2]", 2),
        ("LDGSTS.E.BYPASS.128", "[R1], [R2]", 4),
        ("HGMMA.64x256x16.F32.BF16", "R24, gdesc[UR24].tnspB, R24", 20),
        ("HGMMA.64x16x16.F32.BF16", "R24, R4, gdesc[UR8], R24", 1),
        ("LDG.E.128", "R4, [R2]", 0),
        ("FFMA", "R1, R1, R1, R1", 0),
    ],
)
def test_shared_wavefronts(opcode: str, operands: str, wavefronts: float):
    """Transactions with shared memory follow from the widths of accesses."""
    assert Instruction(opcode, operands).shared_wavefronts == wavefronts


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("HMMA.1688.F32.TF32", (2 * 16 * 8 * 8, "tf32", False)),
        ("HMMA.16816.F32.BF16", (2 * 16 * 8 * 16, "half", False)),
        ("HGMMA.64x128x8.F32.TF32", (2 * 64 * 128 * 8 // 4, "tf32", True)),
        ("UTCHMMA", None),
        ("FFMA", None),
    ],
)
def test_products(opcode: str, expected: tuple[int, str, bool] | None):
    """FLOPs of a warp's matrix instruction follow from its shape; tcgen05 does not say its own."""
    assert Instruction(opcode, "R1, R2").product == expected


def test_loaded_bytes():
    """Bytes that 32 lanes load from memory."""
    opcodes = ("LDG.E", "LDG.E.64", "LDG.E.128.STRONG.GPU", "LDG.E.U16", "LDGSTS.E.BYPASS.128", "STG.E")
    assert [Instruction(opcode).global_bytes for opcode in opcodes] == [128, 256, 512, 64, 512, 0]


def test_several_kernels():
    """A file of many kernels can be read one at a time."""
    text = ".text.one:\n /*0000*/ EXIT ;\n.text.two:\n /*0000*/ MOV R1, R2 ;\n /*0010*/ EXIT ;\n"
    assert set(sass.functions(text)) == {"one", "two"}
    assert names(sass.functions(text, "two")["two"]) == ["MOV", "EXIT"]
