# SPDX-License-Identifier: Apache-2.0
"""nvcc compiles every CUDA kernel, without a GPU, to code that spills nothing and uses the matrix units."""

from __future__ import annotations

import re
from pathlib import Path

import nvcc
import pytest
from budgets import LONG

# The source is the same for all, and sm_86 leaves the least shared memory.
ARCHS = ("sm_86", "sm_90") if LONG else ("sm_86",)
MOST_REGISTERS = 255
MOST_SHARED = (
    99 << 10
)  # bytes a block may have on every architecture from sm_80 on; the least is that of sm_86
STATIC_SHARED = 48 << 10
needs_nvcc = pytest.mark.skipif(nvcc.toolkit() is None, reason="nvcc was not found: kernels are not compiled")
needs_cuobjdump = pytest.mark.skipif(nvcc.cuobjdump() is None, reason="cuobjdump was not found")


@pytest.fixture(scope="module")
def built() -> dict[str, dict[str, tuple[Path, str]]]:
    return nvcc.all_compiled(ARCHS, nvcc.compiled if LONG else nvcc.assembled)


def spills_allowed(kernel: nvcc.Kernel) -> int:
    """Bytes per thread: none, but a register outside the loop where F of rank 64 is read element by element,
    for strides that leave nothing to read at once."""
    return 4 if "PrecisionE0ELi64ELNS0_11FisherLoadsE4ELb1" in kernel.symbol else 0


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_no_spills(built, arch: str):
    """ptxas spills what launch bounds leave no register for, so no spill means both."""
    found = [kernel for _, told in built[arch].values() for kernel in nvcc.kernels(told)]
    assert {kernel.name for kernel in found} == nvcc.MATRIX | nvcc.OTHERS
    wrong = [
        k
        for k in found
        if k.spilled > spills_allowed(k)
        or (k.stack and not k.spilled)
        or not 0 < k.registers <= MOST_REGISTERS
    ]
    assert not wrong, "\n".join(map(str, wrong))
    assert all(kernel.shared <= STATIC_SHARED for kernel in found)


@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize("arch", ARCHS)
def test_matrix_units_used(built, arch: str):
    """Matrix kernels use the matrix units."""
    for cubin, told in built[arch].values():
        counts = nvcc.instructions(cubin, "HMMA", "LDGSTS")
        for kernel in nvcc.kernels(told):
            used = counts[kernel.symbol]
            assert (used["HMMA"] > 0) == (kernel.name in nvcc.MATRIX), kernel
            # The last constant: tokens come 16 bytes at a time, ahead of their use.
            if kernel.name in ("fisher_kernel", "fisher_sums_kernel"):
                assert (used["LDGSTS"] > 0) == ("Lb1EEEv" in kernel.symbol), kernel


@needs_nvcc
def test_bindings_compile():
    """The bindings compile against the CUDA headers."""
    assert nvcc.check_bindings(every=LONG)


def test_launch_bounds_declared():
    """What bypasses it is not seen by the emulator."""
    forbidden = (
        r"__global__|__launch_bounds__|__syncthreads|__shfl|\basm\b|<<<|threadIdx|#include <(ATen|c10|torch)"
    )
    for path in [*nvcc.CSRC.glob("*.cu"), *nvcc.CSRC.glob("*.cuh")]:
        if path.name != "device.cuh":
            assert not (found := re.findall(forbidden, path.read_text())), (path.name, found)


def test_shared_memory_limit():
    """The emulator refuses launches with more shared memory than every GPU has."""
    text = (nvcc.CSRC / "emulator" / "fibers.cpp").read_text()
    (value,) = re.findall(r"MOST_SHARED = ([^;]+);", text)
    assert eval(value) == MOST_SHARED


def test_ptxas_output_parsed():
    """Stack, spills, registers and shared memory are read from the output of ptxas."""
    told = """
ptxas info    : Compiling entry function '_ZN2fe4cuda11walk_kernelILi16EEEvNS0_10WalkParamsE' for 'sm_90'
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 64 bytes smem
ptxas info    : Compiling entry function '_ZN2fe47_GLOBAL__N__69_14_a_cu_1718ewc_penalty_kernelEv' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers
"""
    first, second = nvcc.kernels(told)
    assert (first.name, first.stack, first.spilled, first.registers, first.shared) == (
        "walk_kernel", 8, 4, 168, 64,
    )  # fmt: skip
    assert (second.name, second.spilled, second.registers) == ("ewc_penalty_kernel", 0, 40)
