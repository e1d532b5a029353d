"""What a backend offers for an op, and what its answer may depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Call(NamedTuple):
    """What the choice of an implementation depends on."""

    device: str
    dtype: torch.dtype


class Candidate(NamedTuple):
    """One implementation of one op; `supports` says in words why it cannot serve a call, or None."""

    backend: str
    algorithm: str
    supports: Callable[[Call], str | None]
    run: Callable[..., Any]
