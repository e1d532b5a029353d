# SPDX-License-Identifier: Apache-2.0
"""Fresh interpreters, free of this project's settings."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ("PYTHONPATH", "FUSED_EWCLORA_BUILD", "FUSED_EWCLORA_BACKEND", "CUDA_HOME", "CUDA_PATH")
SETTINGS += ("TORCH_CUDA_ARCH_LIST", "MAX_JOBS")
HAS_COMPILER = (
    shutil.which(os.environ.get("CXX", "c++").split()[0]) is not None
    and Path(sysconfig.get_path("include"), "Python.h").exists()
)


def python(
    *arguments: str | Path, cwd: Path, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter without this project's settings; `cwd` comes before what is installed."""
    env = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**env, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def in_subprocess(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Without Triton's interpreter, unless `environment` asks for it."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "2", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
