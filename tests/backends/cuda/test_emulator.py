# SPDX-License-Identifier: Apache-2.0
"""The emulator of the CUDA kernels is built where it can be, and sees the defects it is there to see."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import cuda_emulator
import pytest
import torch

missing = cuda_emulator.missing()
pytestmark = pytest.mark.skipif(missing is not None, reason=f"the emulator cannot be built: {missing}")
SOURCE = Path(__file__).parent / "emulator" / "defects.cpp"

# Defect -> what the emulator says, or None: the launch succeeds, and what was read too early is not a number.
DEFECTS = {
    "barrier": None,
    "warp_barrier": None,
    "uninitialised": None,
    "asynchronous": None,
    "younger": None,
    "alignment": r"16-byte access at .*, which is not a multiple of 16 \(thread 5 of block",
    "past_the_end": "a write past the end of shared memory",
    "copy_outside": r"access \d+ bytes into 4096 bytes of shared memory",
    "other_memory": r"access to global memory at \d+ bytes of shared memory",
    "early_end": "some threads of a block wait at a barrier, others have ended",
    "divergence": "some threads of a warp wait for the warp, others for the block, or have ended",
    "different_instructions": "threads of a warp wait at different instructions",
    "turns": "every block that runs waits for a block that has not started",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")
def test_kernels_built():
    """The kernels are built for the emulator."""
    cuda_emulator.load()  # raises with the compiler's words


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from torch.utils.cpp_extension import include_paths

    result = tmp_path_factory.mktemp("emulator") / "defects"
    sources = [
        SOURCE,
        *(cuda_emulator.CSRC / "emulator" / f"{name}.cpp" for name in ("fibers", "instructions")),
    ]
    includes = [f"-I{cuda_emulator.CSRC}", *(f"-isystem{path}" for path in include_paths())]
    compiler = os.environ.get("CXX", "c++").split()
    command = [*compiler, "-std=c++20", "-DFE_EMULATED", "-O1", "-Wall", *includes, *sources, "-o", result]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return result


def told(program: Path, *words: str) -> list[str]:
    done = subprocess.run([program, *words], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", DEFECTS)
def test_correct_kernel_passes(program: Path, name: str):
    """A kernel without the defect runs and gives the right result."""
    assert told(program, name) == ["fine", "0"]


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_seen(program: Path, name: str):
    said, wrong = told(program, name, "broken")
    expected = DEFECTS[name]
    if expected is None:
        assert said == "fine" and int(wrong) > 0
    else:
        assert re.match(expected, said)


def test_random_block_order(program: Path):
    """Blocks do not start in the order of their indices."""
    assert told(program, "order_of_blocks") == ["fine", "1"]


def test_impossible_launch_refused(program: Path):
    """Launches that no GPU accepts are refused."""
    assert told(program, "launch") == ["fine"]
    (said,) = told(program, "launch", "broken")
    assert said.startswith("no such launch: 128 threads, 101392 bytes of shared memory")


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_mma_operand_layout(program: Path, precision: str):
    """Matrix products take their operands from where the manual places them."""
    assert told(program, precision) == ["fine", "0"]


def test_tf32_truncates_operands(program: Path):
    """More than half of the last bit is added to one operand: rounded it would show."""
    assert told(program, "tf32", "broken") == ["fine", "0"]
