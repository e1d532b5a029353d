# SPDX-License-Identifier: Apache-2.0
"""Memory that PyTorch allocates on the CPU, seen from below (memory.cpp): nothing observes the calls that
allocate it, so that they take the way that they take for users."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import stub

SOURCE = Path(__file__).parent / "memory.cpp"


@functools.cache
def _library() -> ctypes.CDLL:
    found = ctypes.CDLL(None)
    for name in ("count", "start", "size"):
        getattr(found, f"fe_memory_{name}").restype = ctypes.c_size_t
    return found


def preload(module: str, arguments: Sequence[str]) -> None:
    """Begin this process, `python -m module arguments`, anew with memory.cpp in it, unless it is."""
    if hasattr(ctypes.CDLL(None), "fe_memory_hold"):
        return
    path = stub.built(stub.FOLDER / "memory.so", [SOURCE], [])
    before = os.environ.get("LD_PRELOAD")
    os.environ["LD_PRELOAD"] = f"{path}:{before}" if before else str(path)
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


@contextlib.contextmanager
def held(poison: bool = False) -> Iterator[None]:
    """Keep what is allocated inside, in all threads; filled with NaN where it is to be `poison`."""
    _library().fe_memory_hold(1, int(poison))
    try:
        yield
    finally:
        _library().fe_memory_hold(0, 0)


def blocks(first: int = 0) -> list[tuple[int, int]]:
    """Address and size of what was allocated, from number `first` on."""
    found, size = _library(), ctypes.c_size_t
    return [
        (found.fe_memory_start(size(n)), found.fe_memory_size(size(n)))
        for n in range(first, found.fe_memory_count())
    ]
