# SPDX-License-Identifier: Apache-2.0
"""Configurations measured on this machine: a file per architecture, in the format of the shipped tables."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CACHE = "FUSED_EWCLORA_CACHE"


def folder() -> Path:
    """$FUSED_EWCLORA_CACHE, $XDG_CACHE_HOME/fused_ewclora or ~/.cache/fused_ewclora."""
    if own := os.environ.get(CACHE):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fused_ewclora"


def path(arch: str) -> Path:
    return folder() / f"{arch}.json"


def read(file: Path) -> list[dict[str, Any]]:
    """The entries of `file`, [] without one; what is not a table is ignored with a warning that names it."""
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        return _ignored(file, str(error))
    entries = content.get("entries") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        return _ignored(file, 'there is no list "entries"')
    for entry in entries:
        if (reason := _malformed(entry)) is not None:
            return _ignored(file, f"{reason} in {json.dumps(entry)[:200]}")
    return entries


def _malformed(entry: Any) -> str | None:
    """Why `entry` is not one of ours, or None."""
    expected = {"kernel": str, "dtypes": list, "rank": int, "config": dict}
    if not isinstance(entry, dict):
        return "not an object"
    for name, kind in expected.items():
        if not isinstance(entry.get(name), kind):
            return f"{name!r} is missing or not a {kind.__name__}"
    config = entry["config"]
    if not all(isinstance(value, int | str) for value in config.values()):
        return "a value of 'config' is neither a number nor a word"
    warps = config.get("num_warps", 1)
    return None if isinstance(warps, int) and warps >= 1 else "'num_warps' is not a positive number"


def _ignored(file: Path, reason: str) -> list[dict[str, Any]]:
    warnings.warn(f"{file}: ignored, not a table of configurations: {reason}", RuntimeWarning, stacklevel=3)
    return []


def add(file: Path, entry: Mapping[str, Any]) -> None:
    """Write `entry` into `file` in place of the one for the same kernel, dtype and rank.

    The file appears as a whole or not at all. Entries are sorted by kernel, dtype and rank, so that as a
    shipped table it gives each rank the entry made for it.
    """

    def place(entry: Mapping[str, Any]) -> tuple[str, list[str], int]:
        return entry["kernel"], entry["dtypes"], entry["rank"]

    kept = [old for old in read(file) if place(old) != place(entry)]
    lines = ",\n  ".join(json.dumps(entry) for entry in sorted([*kept, entry], key=place))
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(f'{{"entries": [\n  {lines}\n]}}\n')
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
