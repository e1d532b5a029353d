# SPDX-License-Identifier: Apache-2.0
"""Describes the machine as JSON: `python -m benchmarks.gpu.describe [--ceilings]`. Settings of the GPU are
read, never changed. Exit status 3 without a GPU."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess

import torch

from .. import energy
from ..extras import versions
from ..machine import ceilings, environment
from .sanitize import sanitizer

NO_GPU = 3
QUERY = (
    "name,driver_version,pstate,temperature.gpu,power.draw,power.limit,clocks.sm,clocks.mem,clocks.max.sm,"
    "clocks.max.mem,memory.used,memory.total,ecc.mode.current,mig.mode.current"
)


def driver() -> dict[str, str]:
    """What nvidia-smi reports now, or why it does not."""
    if shutil.which("nvidia-smi") is None:
        return {"nvidia-smi": "not found"}
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as failure:
        return {"nvidia-smi": str(failure)}
    if result.returncode:
        return {"nvidia-smi": (result.stdout + result.stderr).strip()[:400]}
    values = result.stdout.splitlines()[0].split(", ")
    return dict(zip(QUERY.split(","), values, strict=False))


def tools() -> dict[str, str | None]:
    """Paths of the programs that some steps of the GPU check need; None: not found."""
    paths = {name: shutil.which(name) for name in ("nvcc", "ninja", "c++")}
    return {**paths, "compute-sanitizer": sanitizer()}


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.describe", description=__doc__)
    parser.add_argument("--ceilings", action="store_true", help="measure bandwidth and product rates")
    parser.add_argument("--rehearse", action="store_true", help="of the CPU")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        print("no CUDA device: torch.cuda.is_available() is False")
        return NO_GPU
    device = "cpu" if args.rehearse else "cuda"
    if args.ceilings:
        print(json.dumps({"before": driver(), "ceilings": ceilings(device), "after": driver()}, indent=1))
        return 0
    from fused_ewclora import available_backends

    description = {
        "environment": {**environment(device), **versions()},
        "driver": driver(),
        "tools": tools(),
        "energy": "not measured" if args.rehearse else energy.meter()[1],
        "backends": available_backends(),
    }
    print(json.dumps(description, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
