# SPDX-License-Identifier: Apache-2.0
"""What records state about the installation and the time of a run."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("fused-ewclora", "torch", "numpy", "scikit-learn")


def installed_version(distribution: str) -> str | None:
    """The installed version, None for a checkout that was never installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str | int]:
    """What the numbers of the demo depend on besides its arguments."""
    packages = {name: installed_version(name) or "not installed as a package" for name in PACKAGES}
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **packages,
        "threads": torch.get_num_threads(),
    }


def timestamp() -> str:
    """The current time, UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
