# SPDX-License-Identifier: Apache-2.0
"""What a backend offers for an op, and what its answer may depend on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

_Cached = TypeVar("_Cached", bound=Callable[..., Any])
_choices: list[Any] = []


def remembers_choices(cached: _Cached) -> _Cached:
    """Marks a function with a cache whose content depends on which backends there are."""
    _choices.append(cached)
    return cached


def forget_choices() -> None:
    """Clears those caches: what a backend offers has changed."""
    for cached in _choices:
        cached.cache_clear()


class LinearShape(NamedTuple):
    """Sizes of a LoRA linear; `rows` is rounded up to a power of two, so that few calls differ."""

    rows: int
    d_in: int
    d_out: int
    rank: int
    dropout: bool = False


class Call(NamedTuple):
    """What the choice of an implementation depends on."""

    device: str
    dtype: torch.dtype
    arch: str | None = None  # of a GPU: "sm_90", "gfx942"
    shape: LinearShape | None = None  # of the LoRA linear, when sizes are known
    rank: int | None = None  # the largest of the call's adapters
    precision: str | None = None  # torch.get_float32_matmul_precision(), where it decides
    work: int | None = None  # elements (of the Fisher: multiplications), about, as a power of two
    captured: bool = False  # for a CUDA graph, whose replays take no time of the host


def _not_outperformed(call: Call) -> str | None:
    return None


def _no_remark() -> str | None:
    return None


class Candidate(NamedTuple):
    """One implementation of one op.

    `supports` says in words why it cannot serve a call, or None. `outperformed` says why another algorithm of
    the same backend is expected to be faster, or None; it does not count when one of `keys` is asked for by
    name ("triton:prologue"). `linear`, where there is one, takes the
    candidate for the backward and returns the address of what computes both in C++ (a `LinearBackend`), or
    None; `planned` is what it needs to know of a Triton host, its name and its function. `remark` says what
    `explain` adds to the algorithm where it serves a call.
    """

    backend: str
    algorithm: str
    supports: Callable[[Call], str | None]
    run: Callable[..., Any]
    keys: tuple[str, ...] = ()
    outperformed: Callable[[Call], str | None] = _not_outperformed
    linear: Callable[[Any], int | None] | None = None
    planned: tuple[str, Callable[..., Any]] | None = None
    remark: Callable[[], str | None] = _no_remark


def bucket(rows: int) -> int:
    """The next power of two."""
    return 1 << max(rows - 1, 0).bit_length()


def arch_of(device: torch.device) -> str | None:
    """Architecture of a GPU, "sm_90" or "gfx942"; None for other devices, or what the CPU stands in for."""
    return _gpu_arch(device.index) if device.type == "cuda" else _pretended


_pretended: str | None = None


def pretend(arch: str | None) -> None:
    """Let the CPU stand in for a GPU of this architecture, for `backends.triton.pretend`; None ends it."""
    global _pretended
    _pretended = arch
    forget_choices()


def pretended() -> str | None:
    """The architecture that the CPU stands in for, or None."""
    return _pretended


@functools.cache
def _gpu_arch(index: int | None) -> str:
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"
