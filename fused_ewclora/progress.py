# SPDX-License-Identifier: Apache-2.0
"""Progress bars of passes over data."""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch.distributed

from .errors import DtypeError

DELAY = 1.0  # seconds that a pass has to take before it shows a bar that nobody asked for
Item = TypeVar("Item")

_wanted: ContextVar[bool | None] = ContextVar("fused_ewclora_progress", default=None)


def checked(progress: bool | None) -> bool | None:
    """Check an argument `progress`; raises `DtypeError`."""
    if progress is not None and not isinstance(progress, bool):
        raise DtypeError(f"progress: expected True, False or None, got {progress!r}")
    return progress


@contextmanager
def showing(progress: bool | None) -> Iterator[None]:
    """Passes inside the block whose own `progress` is None take this one."""
    token = _wanted.set(checked(progress) if progress is not None else _wanted.get())
    try:
        yield
    finally:
        _wanted.reset(token)


def with_bar(loader: Iterable[Item], most: int | None, progress: bool | None, title: str) -> Iterable[Item]:
    """At most `most` items, with a bar on stderr in the first process: always (True), never (False), or when
    stderr is a terminal and the pass takes longer than `DELAY` (None)."""
    items = itertools.islice(loader, most)
    wanted = _wanted.get() if progress is None else progress
    if wanted is False or (wanted is None and not sys.stderr.isatty()) or not _is_first_process():
        return items
    from tqdm import tqdm  # only programs that show bars need it

    length = operator.length_hint(loader, -1)  # -1: unknown, as of a loader of an IterableDataset
    total = most if length < 0 else min(length, most or length)
    delay = DELAY if wanted is None else 0.0
    return tqdm(items, total=total, desc=title, unit="batch", leave=False, delay=delay)


def _is_first_process() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
