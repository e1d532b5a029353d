# SPDX-License-Identifier: Apache-2.0
"""Commands of this folder in a process of their own: Triton reads TRITON_INTERPRET once."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import machine

HELPERS = Path(__file__).resolve().parents[1]
_REASON = machine.missing() or (
    None if importlib.util.find_spec("triton") is not None else "Triton is not installed"
)
needed = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


def run(module: str, *arguments: str, silent: bool = False) -> str:
    """What `python -m module arguments` prints, if only nothing where that is `silent`."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**inherited, "PYTHONPATH": str(HELPERS), "OMP_NUM_THREADS": "1"},
        cwd=HELPERS.parents[1],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.stdout or (silent and done.returncode == 0), done.stderr
    return done.stdout
