# SPDX-License-Identifier: Apache-2.0
"""Runs small calls of every op of a GPU backend under a tool: `python -m benchmarks.gpu.sanitize`.

The tools are those of compute-sanitizer: memcheck watches accesses to memory, racecheck those of the threads
of a block to shared memory, which it cannot where matrix units and the copy engine make them (Triton's
products). Both watch only our kernels, and results are compared with the reference. Exit status 0: no
complaint; 1: the last lines say which; 77: compute-sanitizer or both backends are missing. `--calls` runs the
calls in this process, without a tool; `--rehearse` does so on the CPU, on the reference.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fused_ewclora import available_backends

from ..steps import SKIP, shown
from .small_calls import run_calls

ROOT = Path(__file__).resolve().parents[2]
TOOLS = {
    "memcheck": ["--padding", "256"],  # bytes between allocations, which nothing may touch
    "racecheck": [],
}
BACKENDS = ("cuda", "triton")
FOLLOWED = {  # Triton kernels whose accesses to shared memory racecheck sees: no wgmma, no bulk copies
    "ewc_penalty_kernel", "factored_penalty_kernel", "fisher_square_kernel", "fisher_sums_add_kernel",
    "fisher_token_kernel", "lowrank_pack_kernel", "lowrank_sum_kernel", "merge_kernel",
    "soft_threshold_kernel",
}  # fmt: skip
FOUND = 86  # exit status of a tool that reports errors
RESERVE = 5.0  # seconds of the budget for the work after the tools
SHOWN = 3  # lines of a tool's first complaint
CONTENT = " SUMMARY: 0 "  # errors or hazards
COMPLAINT = re.compile(r"========= (?!    |COMPUTE-SANITIZER)\S")  # its first line; details are indented


def sanitizer() -> str | None:
    """Path of compute-sanitizer: on PATH, or in the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
    folders = [Path(home, "bin") for home in homes if home]
    return shutil.which("compute-sanitizer") or next(
        (path for folder in folders if (path := shutil.which("compute-sanitizer", path=folder))), None
    )


def kernels(backend: str, root: Path = ROOT) -> list[str]:
    """Names of all kernels of a backend."""
    where, pattern = {
        "cuda": ("csrc/cuda/*.cu", r"\b(\w+_kernel)\(FE_PARAMETER"),
        "triton": ("kernels/*.py", r"@triton\.jit[^\n]*\ndef (\w+_kernel)\("),
    }[backend]
    sources = (path.read_text() for path in sorted(root.glob(where)))
    return sorted({name for text in sources for name in re.findall(pattern, text)})


def watched(tool: str, backend: str) -> list[str]:
    """Names of the kernels that a tool can watch."""
    names = kernels(backend)
    return [name for name in names if (tool, backend) != ("racecheck", "triton") or name in FOLLOWED]


def command(tool: str, binary: str, backend: str) -> list[str]:
    """The calls under a tool. Errors of CUDA's API are not counted: PyTorch asks for what may be missing."""
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--report-api-errors", "no"]
    for name in watched(tool, backend):
        options += ["--kernel-name", f"kernel_substring={name}"]
    calls = [sys.executable, "-m", "benchmarks.gpu.sanitize", "--calls", "--backends", backend]
    return [binary, *options, *TOOLS[tool], *calls]


def digest(lines: Sequence[str]) -> list[str]:
    """The most informative lines: wrong results, a tool's first complaint, and its summary; without any of
    them, the last lines."""
    selected = [line for line in lines if line.startswith("wrong:")][:2]
    summary = [line for line in lines if " SUMMARY: " in line][-1:]
    first = next((i for i, line in enumerate(lines) if COMPLAINT.match(line) and line not in summary), None)
    selected += lines[first : first + SHOWN] if first is not None else []
    return [*selected, *summary] if selected or summary else list(lines[-SHOWN:])


def under(tool: str, binary: str, backend: str, limit: float) -> list[str]:
    """The complaints of a tool within `limit` seconds; empty without any."""
    # The caching allocator hands out parts of one large allocation, within which no error would be detected.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    begin = time.monotonic()
    code, lines = shown(command(tool, binary, backend), environment, ROOT, limit)
    seconds = time.monotonic() - begin
    if code == 0 and any(CONTENT in line for line in lines):  # warnings leave the exit status at 0
        return []
    why = "errors" if code == FOUND else f"no result in {limit:.0f} s" if code < 0 else f"exit status {code}"
    return [f"{tool} of {backend}: {why} after {seconds:.0f} s", *digest(lines)]


def under_all(tools: Sequence[str], budget: float, backends: Sequence[str] = BACKENDS) -> int:
    """Runs the tools one after the other, each on every backend; returns the exit status."""
    reasons = available_backends()
    there = [name for name in backends if reasons[name] is None]
    told = [f"the {name} backend is not available: {reasons[name]}" for name in backends if name not in there]
    print(*told, sep="\n")
    if not there:
        return SKIP
    if (binary := sanitizer()) is None:
        print("compute-sanitizer was not found: it is in the CUDA toolkit")
        return SKIP
    end, complaints = time.monotonic() + budget - RESERVE, []
    left = [(tool, backend) for tool in tools for backend in there]
    done = ", ".join(f"{tool} of {backend}" for tool, backend in left)
    while left:
        tool, backend = left.pop(0)
        share = (end - time.monotonic()) / (1.0 + 0.5 * len(left))
        complaints += under(tool, binary, backend, max(share, 1.0))
    print("", *(complaints or [f"{done}: no complaints"]), sep="\n")
    return int(bool(complaints))


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.sanitize", description=__doc__)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for all tools")
    parser.add_argument("--calls", action="store_true", help="the calls alone, in this process")
    parser.add_argument("--rehearse", action="store_true", help="the calls alone, on the CPU")
    args = parser.parse_args()
    if args.rehearse:
        return run_calls("reference", "cpu")
    if args.calls:
        return max(run_calls(name, "cuda") for name in args.backends)
    return under_all(args.tools, args.budget, args.backends)


if __name__ == "__main__":
    raise SystemExit(main())
