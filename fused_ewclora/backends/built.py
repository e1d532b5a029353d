# SPDX-License-Identifier: Apache-2.0
"""How the installed package was built, as setup.py recorded it."""

from __future__ import annotations

import json
from pathlib import Path

RECORD = Path(__file__).with_name("built.json")  # none in a checkout or an editable install
COMMAND = "pip install --no-build-isolation --force-reinstall --no-deps <the same source>"


def unwanted() -> str | None:
    """Why there is no CPU extension although none was asked to be left out, with the way to get one."""
    if not RECORD.exists():
        return None
    missing = json.loads(RECORD.read_text(encoding="utf-8"))["missing"]
    if missing is None:
        return None
    return f"this installation was built without kernels for the CPU: {missing}. To build them: {COMMAND}"
