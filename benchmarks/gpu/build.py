# SPDX-License-Identifier: Apache-2.0
"""Builds the CUDA extension in place for the current GPU: `python -m benchmarks.gpu.build`.

Exit status 0: the backend "cuda" can be used; 1: the compiler failed or the extension does not load, with
its first error in the last lines; 77: a tool for building is missing, which the last line names.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..steps import SKIP, shown

ROOT = Path(__file__).resolve().parents[2]
MISSING = re.compile(r"extension cannot be built, (.+)")  # the message of setup.py
ERROR = re.compile(r"\berror\b|\bfatal\b|undefined reference|Killed|No space left", re.IGNORECASE)
SHOWN = 6  # lines of the first error
LOADS = (
    "from fused_ewclora import available_backends as found; why = found()['cuda']; "
    "raise SystemExit(why and f'the CUDA extension was built but cannot be used: {why}')"
)


def command(ninja: bool) -> list[str]:
    """Builds both extensions in place. Without ninja PyTorch would compile one file after the other."""
    side_by_side = [] if ninja else ["-m", "benchmarks.gpu.side_by_side"]
    return [sys.executable, *side_by_side, "setup.py", "build_ext", "--inplace"]


def settings(capability: tuple[int, int]) -> dict[str, str]:
    """Environment variables of setup.py: only this GPU's architecture, and one compiler per core."""
    return {
        "FUSED_EWCLORA_BUILD": "cuda",
        "TORCH_CUDA_ARCH_LIST": f"{capability[0]}.{capability[1]}",
        "MAX_JOBS": os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0))),
        "PATH": os.pathsep.join(
            [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
        ),  # of its ninja
    }


def first_error(lines: Sequence[str]) -> list[str]:
    """The first line with an error and some lines after it; without an error, the last lines."""
    where = next((i for i, line in enumerate(lines) if ERROR.search(line)), max(len(lines) - SHOWN, 0))
    return list(lines[where : where + SHOWN])


def build(root: Path, capability: tuple[int, int]) -> int:
    """Builds what is out of date, and loads it; returns the exit status."""
    environment = settings(capability)
    ninja = shutil.which("ninja", path=environment["PATH"]) is not None
    code, lines = shown(command(ninja), environment, root)
    if code and (missing := MISSING.search("\n".join(lines))):
        print(missing.group(1))
        return SKIP
    if not code:
        code, lines = shown([sys.executable, "-c", LOADS], {}, root)
    if code:
        print("", "the first error:", *first_error(lines), sep="\n")
    return int(code != 0)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.build", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="builds nothing")
    args = parser.parse_args()
    if args.rehearse or not torch.cuda.is_available():
        print("a rehearsal builds nothing" if args.rehearse else "no CUDA device to build for")
        return SKIP
    return build(ROOT, torch.cuda.get_device_capability())


if __name__ == "__main__":
    raise SystemExit(main())
