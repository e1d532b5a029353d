# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel in every shipped configuration compiles, without a GPU, to code that spills nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from budgets import LONG

from fused_ewclora.backends.triton import launch, tables
from fused_ewclora.backends.triton.tools import aot, compile_report
from fused_ewclora.backends.triton.tools.occupancy import occupancy
from fused_ewclora.errors import BackendError

ROOT = Path(__file__).resolve().parents[3]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

# What can be compiled in a minute, all calls in a few. The command without arguments compiles everything.
FEW = () if LONG else ("--few",)
OTHERS = ("sm_80", *(("sm_86",) if LONG else ()), "sm_100", "gfx942")
RANKS = ("10", "64") if LONG else ("64",)
GATES = {
    "sm_90": ("--arch", "sm_90", "--dtype", "bfloat16", "float32", "--rank", *RANKS, *FEW),
    "others in bf16": ("--arch", *OTHERS, "--dtype", "bfloat16", "--rank", "10", *FEW),
}
ROW = {
    "kernel", "arch", "dtype", "config", "constants", "aligned", "registers", "scalar_registers", "spill",
    "shared", "tensor_memory", "serialised", "error", "instructions", "blocks_per_multiprocessor",
    "occupancy", "limited_by", "calls", "main_loop", "predicted",
}  # fmt: skip


def report(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, because Triton reads TRITON_INTERPRET once."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "fused_ewclora", "compile-report", *arguments],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.fixture(scope="module", params=GATES)
def data(request: pytest.FixtureRequest) -> dict[str, Any]:
    result = report("--json", *GATES[request.param])
    assert result.stdout, result.stderr
    return json.loads(result.stdout)


@needs_triton
def test_shipped_configs_compile(data: dict[str, Any]):
    """No spills, shared memory within a block's, wgmma where products are, and no entry without a use."""
    assert data["problems"] == []


@needs_triton
def test_all_kernels_all_archs(data: dict[str, Any]):
    """Every kernel is compiled for every architecture."""
    sources = [path.read_text() for path in (ROOT / "kernels").glob("*.py")]
    kernels = {name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)}
    assert set(compile_report.MATRIX_KERNELS) <= kernels
    for arch in {row["arch"] for row in data["rows"]}:
        assert {row["kernel"] for row in data["rows"] if row["arch"] == arch} == kernels


@needs_triton
def test_row_fields(data: dict[str, Any]):
    """Rows have the documented fields."""
    assert set(data) == {"schema", "triton", "rows", "failures", "unexercised", "problems"}
    assert data["schema"] == compile_report.SCHEMA
    for row in data["rows"]:
        assert set(row) == ROW
        assert set(row["instructions"]) == set(aot.INSTRUCTIONS)
        assert {"num_warps", "num_stages"} <= set(row["config"])
        assert row["registers"] > 0 and row["calls"]


@needs_triton
def test_interpreter_refused():
    """A process that runs the interpreter says that it cannot compile."""
    result = report("--arch", "sm_90", TRITON_INTERPRET="1")
    assert result.returncode == 1
    assert "TRITON_INTERPRET" in result.stderr and "Traceback" not in result.stderr


def test_unknown_kernel():
    """The answer to an unknown kernel is a list of the known ones."""
    with pytest.raises(BackendError, match="abacus_kernel: there are lora_linear_kernel, lowrank"):
        compile_report._chosen([noted("lowrank_rows_kernel"), noted()], ["abacus_kernel"], (), ())


def noted(name: str = "lora_linear_kernel", aligned: bool = True, **config: int) -> compile_report.Noted:
    specialisation = aot.Specialisation("sm_90", "", name, {}, {}, {}, {})
    return compile_report.Noted(specialisation, "bfloat16", config, {}, {10}, [aligned], ["a call"])


def test_few_calls():
    """Few are an aligned and an unaligned call of each kernel and configuration."""
    launches = [noted(), noted("lowrank_rows_kernel"), noted(num_warps=4), noted(aligned=False)]
    assert compile_report._last_of_each_configuration([*launches, *launches]) == launches


def test_missing_cuobjdump(monkeypatch: pytest.MonkeyPatch):
    """Without `cuobjdump` the report says what is missing."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(aot, "cuobjdump", lambda: None)
    with pytest.raises(BackendError, match="cuobjdump"):
        compile_report.collect(("sm_90",))


def test_missing_triton(monkeypatch: pytest.MonkeyPatch):
    """Without Triton the report says what is missing."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="pip install triton"):
        compile_report.collect(("sm_90",))


def row(**changed: Any) -> dict[str, Any]:
    good = {
        "kernel": "lora_linear_kernel", "arch": "sm_90", "dtype": "bfloat16", "config": {}, "constants": {},
        "aligned": True, "registers": 128, "spill": 0, "shared": 1024, "serialised": "",
        "error": None, "limited_by": "registers", "instructions": {"wgmma": 4},
        "blocks_per_multiprocessor": 1, "calls": ["a call"],
    }  # fmt: skip
    return {**good, **changed}


def problems(*rows: dict[str, Any]) -> list[str]:
    return compile_report.problems({"rows": rows, "failures": [], "unexercised": []})


def test_good_row_accepted():
    """A good row is not reported as a problem."""
    assert problems(row()) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"spill": 4}, "4 bytes of registers spilled"),
        ({"shared": 227 * 1024 + 1}, "bytes of shared memory"),
        ({"arch": "sm_86", "shared": 99 * 1024 + 1}, "bytes of shared memory"),
        ({"instructions": {"wgmma": 0}}, "no wgmma"),
        ({"serialised": "wgmma serialised due to a move"}, "wgmma serialised due to a move"),
        ({"instructions": {"wgmma": 4, "tf32": 4}}, "cut off to tf32"),
        ({"blocks_per_multiprocessor": 0}, "no block fits"),
        ({"error": "CompilationError: no"}, "CompilationError"),
    ],
)
def test_bad_row_reported(changed: dict[str, Any], words: str):
    """What must not ship is reported as a problem."""
    (found,) = problems(row(**changed))
    assert words in found and "lora_linear_kernel" in found


def test_spill_wgmma_scope():
    """On AMD spills count in the penalty only, and wgmma is required only of 16-bit products on sm_90."""
    assert problems(row(arch="gfx942", spill=8, instructions={"wgmma": 0})) == []
    (found,) = problems(row(kernel="ewc_penalty_kernel", arch="gfx942", spill=8, instructions={"mfma": 4}))
    assert "8 bytes of registers spilled" in found
    assert problems(row(arch="sm_80", instructions={"wgmma": 0})) == []
    assert problems(row(dtype="float32", instructions={"wgmma": 0})) == []
    assert problems(row(kernel="lowrank_sum_kernel", instructions={"wgmma": 0})) == []


def test_unused_entry_named():
    """A table entry that nothing launches is named."""
    entries = tables.table("sm_90")
    found = compile_report.unexercised("sm_90", set())
    assert len(found) >= len(entries)
    first = {(0, dtype) for dtype in entries[0].get("dtypes", ["bfloat16"])}
    assert not any(": entry 0 " in text for text in compile_report.unexercised("sm_90", first))


# Expected values by hand: a partition of a multiprocessor has 512 registers for each of 32 lanes.
@pytest.mark.parametrize(
    ("arguments", "blocks", "limited_by"),
    [
        (("sm_90", 128, 0, 8), 2, "registers"),  # 512 / 128 = 4 warps a partition, 16 in all
        (("sm_90", 129, 0, 8), 1, "registers"),  # allocated as 136: 3 warps a partition, 12 in all
        (("sm_90", 255, 0, 8), 1, "registers"),  # 256: 2 warps a partition, 8 in all
        (("sm_90", 255, 0, 16), 0, "registers"),  # 16 warps do not fit
        (("sm_90", 168, 0, 4), 3, "registers"),  # 3 warps a partition, 12 in all
        (("sm_90", 32, 75 * 1024, 4), 3, "shared memory"),  # 76 KiB with the reserved one, 3 x 76 = 228
        (("sm_90", 32, 75 * 1024 + 1, 4), 2, "shared memory"),
        (("sm_90", 32, 227 * 1024, 4), 1, "shared memory"),
        (("sm_90", 32, 227 * 1024 + 1, 4), 0, "shared memory"),
        (("sm_80", 32, 0, 4), 16, "registers"),  # 16 warps a partition, as many as 64 warps in all
        (("sm_86", 32, 0, 4), 12, "warps"),  # 48 warps
        (("sm_80", 16, 0, 1), 32, "blocks"),
        (("sm_86", 16, 0, 1), 16, "blocks"),
        (("sm_86", 32, 49 * 1024, 4), 2, "shared memory"),  # 2 x 50 = 100 KiB
        (("sm_100", 64, 0, 4, 256), 2, "tensor memory"),  # 512 columns
        (("gfx942", 128, 0, 4), 4, "registers"),  # 4 waves a SIMD
        (("gfx942", 64, 0, 4), 8, "registers"),  # 8 waves a SIMD, the most there are
        (("gfx942", 64, 32 * 1024, 4), 2, "shared memory"),
    ],
)
def test_occupancy_by_hand(arguments: tuple[Any, ...], blocks: int, limited_by: str):
    """Occupancy equals values worked out by hand."""
    found = occupancy(*arguments)
    assert (found.blocks, found.limited_by) == (blocks, limited_by)
    assert found.warps == blocks * arguments[3]


def test_occupancy_warp_share():
    """Occupancy is the share of resident warps."""
    assert occupancy("sm_90", 128, 0, 8).share == 16 / 64
    assert occupancy("sm_86", 128, 0, 8).share == 16 / 48


def test_nvidia_resources():
    """The resources of NVIDIA code are the largest of its functions."""
    text = """
    Resource usage:
     Common:
      GLOBAL:0
     Function a:
      REG:168 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0
     Function b:
      REG:32 STACK:48 SHARED:0 LOCAL:16 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0
    """
    assert aot.parse_usage(text) == {"REG": 168, "STACK": 48, "LOCAL": 16}


def test_amd_resources():
    """The resources of AMD code come from its metadata."""
    text = """
    .private_segment_fixed_size: 24
    .sgpr_count:     30
    .sgpr_spill_count: 0
    .vgpr_count:     129
    .vgpr_spill_count: 6
"""
    found = aot.parse_amdgcn(text)
    assert (found["vgpr_count"], found["sgpr_count"], found["vgpr_spill_count"]) == (129, 30, 6)
    assert found["private_segment_fixed_size"] == 24


PLANTED = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry planted(.param .u64 out)
{
    .reg .f32 %f<4>;
    .reg .b64 %d<2>;
    .reg .pred %p0;
    ld.param.u64 %d0, [out];
    ld.param.u64 %d1, [out];
    setp.ne.u64 %p0, %d0, 7;
    START
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %d1, %d1, %p0, 1, 1, 0, 0;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %d1, %d1, %p0, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    st.global.f32 [%d0], %f0;
    st.global.f32 [%d0], %f3;
    ret;
}
"""


@needs_triton
def test_serialised_wgmma():
    """Products whose accumulator nothing defines before them are reported, properly started ones are not."""
    planted = aot.serialised(PLANTED.replace("START", ""))
    assert "non wgmma instructions defining accumulator registers" in planted
    (found,) = problems(row(serialised=planted))
    assert planted in found
    zeros = " ".join(f"mov.f32 %f{i}, 0f00000000;" for i in range(4))
    assert aot.serialised(PLANTED.replace("START", zeros)) == aot.serialised("mma.sync") == ""


def test_instruction_counts():
    """Instructions are counted by kind."""
    text = """
    wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
    tcgen05.mma.cta_group::1.kind::tf32
    cvt.rna.tf32.f32 %r1, %r2
    cp.async.cg.shared.global [ %r1 ], [ %rd1 ], 0x10
    cp.async.bulk.tensor.2d.shared::cluster.global
    v_mfma_f32_32x32x8_bf16_1k a[0:15]
    wgmma.wait_group.sync.aligned 0
    cp.async.commit_group
    """
    assert aot.count(text) == dict.fromkeys(aot.INSTRUCTIONS, 1)
