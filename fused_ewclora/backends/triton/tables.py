# SPDX-License-Identifier: Apache-2.0
"""Which configuration a kernel runs with: tables by architecture family, dtype and padded rank.

A table is JSON, `configs/<family>.json`: a list of entries {kernel, dtypes, rank, config, source}. The first
entry fits whose kernel and dtype match and whose `rank` (the largest it is made for; absent: any) is not
exceeded. A kernel that needs other sizes for some calls has entries "<kernel>:<variant>" for those. The
numbers of rows, tokens or samples never choose a configuration.

With FUSED_EWCLORA_AUTOTUNE=1 a GPU prefers what was measured on it (`measured`), and measures what was not
(`autotune`), at the first lookup of a configuration.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import launch, measured

FOLDER = Path(__file__).parent / "configs"
FAMILIES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942", launch.INTERPRETED)
AUTOTUNE = "FUSED_EWCLORA_AUTOTUNE"

Entry = Mapping[str, Any]


class Key(NamedTuple):
    """What one lookup asked for; `dtype` is its name, `rank` padded."""

    kernel: str
    arch: str
    dtype: str
    rank: int


class _Local(threading.local):
    """Contexts of this thread: entries that win over every table, and lists that lookups are written to."""

    def __init__(self) -> None:
        self.overrides: list[Entry] = []
        self.watchers: list[list[Key]] = []


_local = _Local()


@functools.cache
def table(family: str) -> tuple[dict[str, Any], ...]:
    """The shipped entries of one family, in order."""
    return tuple(json.loads((FOLDER / f"{family}.json").read_text())["entries"])


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def named(entry: str) -> str:
    """The function that an entry configures: "<kernel>:<variant>" is for calls of that kernel alone."""
    return entry.partition(":")[0]


def kernels() -> list[str]:
    """The names of all kernels that the shipped tables configure."""
    entries = (entry for file in sorted(FOLDER.glob("*.json")) for entry in table(file.stem))
    return sorted({named(entry["kernel"]) for entry in entries})


def fitting(entries: Sequence[Entry], kernel: str, dtype: str, rank: int) -> Entry | None:
    """The first entry that serves a lookup."""
    for entry in entries:
        fits = rank <= entry.get("rank", rank) and dtype in entry.get("dtypes", [dtype])
        if entry["kernel"] == kernel and fits:
            return entry
    return None


def shipped(key: Key) -> Entry:
    """The entry of the shipped table that serves `key`; `LookupError` names the file that lacks one."""
    family = launch.family(key.arch)
    entry = fitting(table(family), key.kernel, key.dtype, key.rank)
    if entry is None:
        raise LookupError(
            f"configs/{family}.json has no entry for {key.kernel}, {key.dtype}, rank {key.rank}"
        )
    return entry


def lookup(kernel: str, arch: str, dtype: torch.dtype, rank: int = 0) -> Mapping[str, Any]:
    """Configuration of `kernel`: block sizes, num_warps, num_stages; keyword arguments of its launch."""
    if _local.watchers or _local.overrides:
        return _in_context(Key(kernel, arch, name_of(dtype), rank))
    return _configuration(kernel, arch, dtype, rank)


def has(kernel: str, arch: str, dtype: torch.dtype, rank: int = 0) -> bool:
    """Whether a configuration is shipped."""
    return fitting(table(launch.family(arch)), kernel, name_of(dtype), rank) is not None


@functools.cache
def _configuration(kernel: str, arch: str, dtype: torch.dtype, rank: int) -> Mapping[str, Any]:
    key = Key(kernel, arch, name_of(dtype), rank)
    entry = shipped(key)
    if autotuning() and arch != launch.INTERPRETED:
        # By name: the tuner runs the hosts, which look configurations up here.
        entry = importlib.import_module(f"{__package__}.tools.autotune").preferred(key) or entry
    return dict(entry["config"])


def _in_context(key: Key) -> Mapping[str, Any]:
    for watcher in _local.watchers:
        watcher.append(key)
    entry = fitting(_local.overrides, key.kernel, key.dtype, key.rank)
    return dict((entry or shipped(key))["config"])


def overriding() -> bool:
    """Whether entries of this thread win over the tables now: what was prepared before is not for them."""
    return bool(_local.overrides)


@functools.cache
def autotuning() -> bool:
    """Whether FUSED_EWCLORA_AUTOTUNE asks for measured configurations; read once."""
    return os.environ.get(AUTOTUNE, "0").lower() in ("1", "true", "on", "yes", "y")


@contextlib.contextmanager
def watching() -> Iterator[list[Key]]:
    """What this thread looks up inside, where it sees shipped entries and overrides, and measures nothing."""
    seen: list[Key] = []
    _local.watchers.append(seen)
    try:
        with launch.as_written():
            yield seen
    finally:
        _local.watchers.remove(seen)


@contextlib.contextmanager
def override(*entries: Entry) -> Iterator[None]:
    """Lookups of this thread prefer `entries`, the first that fits, to shipped and measured ones."""
    before = _local.overrides
    _local.overrides = [*entries, *before]
    try:
        with launch.as_written():
            yield
    finally:
        _local.overrides = before


def recorded(key: Key) -> Entry | None:
    """The measured entry for exactly the dtype and rank of `key`, or None."""
    names = set(shipped(key)["config"])
    for entry in measured.read(measured.path(key.arch)):
        same = entry["kernel"] == key.kernel and entry["dtypes"] == [key.dtype] and entry["rank"] == key.rank
        # Kernels change: an entry of another version may lack a block size or name one that is gone.
        if same and set(entry["config"]) == names:
            return entry
    return None
