# SPDX-License-Identifier: Apache-2.0
"""Measuring the configurations of the Triton kernels on this machine's GPU, as a command."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ....errors import BackendError
from ...candidate import arch_of
from .. import launch, measured, tables
from . import autotune, workloads

RANKS = workloads.RANKS


def missing() -> str | None:
    """Why nothing can be measured here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if not torch.cuda.is_available():
        return "there is no GPU to measure on"
    if launch.interpreted():
        return "TRITON_INTERPRET is set, so that Triton interprets kernels: unset it"
    return None


def run(
    kernels: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    ranks: Sequence[int] = RANKS,
    again: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure every configuration that representative workloads look up, and write the best to the file of
    this GPU's architecture. Those that are there already are kept unless `again`.

    `kernels` and `dtypes` limit it (empty: all). `BackendError` in words where nothing can be measured.
    """
    if (reason := missing()) is not None:
        raise BackendError(reason)
    arch = str(arch_of(torch.device("cuda", torch.cuda.current_device())))
    wanted = [
        key
        for key in autotune.keys(arch, ranks=ranks)
        if (not kernels or tables.named(key.kernel) in kernels) and (not dtypes or key.dtype in dtypes)
    ]
    rows = []
    for key in wanted:
        known = None if again else tables.recorded(key)
        rows.append(_kept(key, known) if known is not None else _measured(key))
        progress(_line(rows[-1]))
    return {"arch": arch, "file": str(measured.path(arch)), "rows": rows}


def _kept(key: tables.Key, entry: tables.Entry) -> dict[str, Any]:
    return {**key._asdict(), "config": entry["config"], "source": entry.get("source"), "error": None}


def _measured(key: tables.Key) -> dict[str, Any]:
    try:
        tuned = autotune.measure(key)
    except Exception as error:  # of one key: out of memory, a broken compiler
        return {**key._asdict(), "config": None, "source": None, "error": f"{type(error).__name__}: {error}"}
    discarded = [
        {"config": trial.config, "reason": trial.reason} for trial in tuned.trials if trial.reason is not None
    ]
    return {**_kept(key, tuned.entry), "trials": len(tuned.trials), "discarded": discarded}


def _line(row: dict[str, Any]) -> str:
    result = row["error"] or f"{row['config']} {row['source']}"
    return f"{row['kernel']}, {row['dtype']}, rank {row['rank']}: {result}"


def render(data: dict[str, Any]) -> str:
    """The text form of `run()`."""
    return "\n".join(
        [
            *(_line(row) for row in data["rows"]),
            "",
            f"Written to {data['file']}; used when {tables.AUTOTUNE}=1.",
            f"To ship them, put these entries first in configs/{launch.family(data['arch'])}.json.",
        ]
    )
