# SPDX-License-Identifier: Apache-2.0
"""Compiling a noted launch ahead of time, without a GPU, exactly as Triton's JIT would for its arguments.

A launch becomes a `Specialisation`, plain data that crosses process boundaries, and that becomes `Resources`.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..specialisation import Specialisation as Specialisation
from ..specialisation import compiled as compiled
from ..specialisation import specialise as specialise
from ..specialisation import target as target
from . import sass

INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async",
    "mma_sync": r"\bmma\.sync",
    "tcgen05": r"\btcgen05\.mma",
    "mfma": r"\bv_s?mfmac?_",
    "cp_async": r"\bcp\.async\.c[ag]\.",
    "tma": r"\bcp\.async\.bulk\.tensor",
    "tf32": r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S*tf32",
    "rounding": r"\bcvt\.rna\.tf32\.f32",
}


@dataclass(frozen=True)
class Resources:
    """What the compiler says about one specialisation. `registers` are per lane, memory in bytes;
    `spill` is local memory of a lane (registers that did not fit), `error` why there is no code, and `code`
    the machine code of an NVIDIA GPU."""

    registers: int = 0
    scalar_registers: int | None = None  # AMD only
    spill: int = 0
    shared: int = 0
    tensor_memory: int = 0
    serialised: str = ""  # why `ptxas` lets each wgmma wait for the one before, if it does
    instructions: dict[str, int] = field(default_factory=dict)
    error: str | None = None
    code: sass.Loop | None = None


def cuobjdump() -> Path | None:
    """NVIDIA's tool that prints the resources of machine code; it comes with Triton."""
    return _tool("cuobjdump")


def nvdisasm() -> Path | None:
    """NVIDIA's disassembler; it comes with Triton."""
    return _tool("nvdisasm")


def _tool(name: str) -> Path | None:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return path if path.exists() else None


def build(specialisation: Specialisation) -> Resources:
    """Compile (or take from Triton's cache) and read off resources. Errors of the compiler are reported."""
    try:
        made = compiled(specialisation)
    except Exception as error:  # compiler passes raise anything
        return Resources(error=_told(error))
    if specialisation.arch.startswith("sm_"):
        return _nvidia(made, specialisation.name)
    return _amd(made)


def _told(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"


def count(assembly: str) -> dict[str, int]:
    """How often each of `INSTRUCTIONS` is written in PTX or AMD assembly."""
    return {name: len(re.findall(pattern, assembly)) for name, pattern in INSTRUCTIONS.items()}


def _nvidia(compiled: Any, name: str) -> Resources:
    tool, disassembler = cuobjdump(), nvdisasm()
    assert tool is not None, "asked before anything is compiled"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        printed = subprocess.run(
            [tool, "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
        text = "" if disassembler is None else sass.disassemble(path, disassembler)
    found = parse_usage(printed)
    return Resources(
        registers=found["REG"],
        spill=found["STACK"] + found["LOCAL"],
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
        serialised=serialised(compiled.asm["ptx"]),
        instructions=count(compiled.asm["ptx"]),
        code=sass.functions(text).get(name),
    )


def serialised(ptx: str) -> str:
    """Why `ptxas` serialises the wgmma instructions of `ptx`, in its words; "" where it does not.

    It says so while it assembles, which Triton leaves out for kernels in its cache: so it is asked again.
    """
    if not re.search(INSTRUCTIONS["wgmma"], ptx):
        return ""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        printed = subprocess.run(
            [get_ptxas(90).path, f"--gpu-name={sm_arch_from_capability(90)}", "-v", path, "-o", os.devnull],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    return parse_advice(printed.stdout + printed.stderr)


def parse_advice(printed: str) -> str:
    """The first reason for serialised wgmma instructions in what `ptxas` printed, or ""."""
    found = re.search(r"wgmma\S* instructions are serialized(.*?)(?: in (?:the )?function|$)", printed, re.M)
    return "" if found is None else f"wgmma serialised{found[1]}"


def parse_usage(printed: str) -> dict[str, int]:
    """The numbers of `cuobjdump -res-usage`, the largest over its functions."""
    numbers = {"REG": 0, "STACK": 0, "LOCAL": 0}
    for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", printed):
        numbers[name] = max(numbers[name], int(value))
    return numbers


def _amd(compiled: Any) -> Resources:
    assembly = compiled.asm["amdgcn"]
    found = parse_amdgcn(assembly)
    return Resources(
        registers=found["vgpr_count"],
        scalar_registers=found["sgpr_count"],
        spill=4 * found["vgpr_spill_count"]
        + found["private_segment_fixed_size"] * (not found["vgpr_spill_count"]),
        shared=compiled.metadata.shared,
        instructions=count(assembly),
    )


def parse_amdgcn(assembly: str) -> dict[str, int]:
    """Register counts of AMD assembly, from its metadata; spills are counted in registers."""
    names = ("vgpr_count", "sgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    numbers = dict.fromkeys(names, 0)
    for name, value in re.findall(rf"^\s+\.({'|'.join(names)}):\s+(\d+)\s*$", assembly, re.MULTILINE):
        numbers[name] = max(numbers[name], int(value))
    return numbers
