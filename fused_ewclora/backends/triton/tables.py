"""Which configuration a kernel runs with: tables by architecture family, dtype and padded rank.

A table is JSON, `configs/<family>.json`: a list of entries {kernel, dtypes, rank, config, source}. The first
entry fits whose kernel and dtype match and whose `rank` (the largest it is made for; absent: any) is not
exceeded. Numbers of rows, tokens or samples never choose a configuration.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import launch

FOLDER = Path(__file__).parent / "configs"
FAMILIES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942", launch.INTERPRETED)


@functools.cache
def table(family: str) -> tuple[dict[str, Any], ...]:
    """The shipped entries of one family, in order."""
    return tuple(json.loads((FOLDER / f"{family}.json").read_text())["entries"])


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def lookup(kernel: str, arch: str, dtype: torch.dtype, rank: int = 0) -> Mapping[str, Any]:
    """Configuration of `kernel`: block sizes, num_warps, num_stages; keyword arguments of its launch."""
    family, name = launch.family(arch), name_of(dtype)
    for entry in table(family):
        fits = rank <= entry.get("rank", rank) and name in entry.get("dtypes", [name])
        if entry["kernel"] == kernel and fits:
            return dict(entry["config"])
    raise LookupError(f"configs/{family}.json has no entry for {kernel}, {name}, rank {rank}")


def has(kernel: str, arch: str, dtype: torch.dtype, rank: int = 0) -> bool:
    """Whether a configuration is shipped."""
    try:
        lookup(kernel, arch, dtype, rank)
    except LookupError:
        return False
    return True
