"""Which implementation serves a call, and why the others do not.

Every op has a list of candidates, fastest first; each says in words why it cannot serve a call, or None.
`auto` takes the first that can; a backend named explicitly either serves the call or raises with those words.
"""

from __future__ import annotations

import functools
import importlib
import os

from ..backends.candidate import Call as Call
from ..backends.candidate import Candidate as Candidate
from ..errors import ArgumentError, BackendError

BACKENDS = ("auto", "triton", "cuda", "cpu", "reference")
ENVIRONMENT_VARIABLE = "FUSED_EWCLORA_BACKEND"


@functools.cache
def candidates(op: str) -> tuple[Candidate, ...]:
    """Implementations of `op`, in order of preference. Backends load on the first call that needs them."""
    native = importlib.import_module("fused_ewclora.backends.native")
    plain = importlib.import_module("fused_ewclora.backends.reference")
    return (*native.candidates(op), *plain.candidates(op))


@functools.cache
def available_backends() -> dict[str, str | None]:
    """Backend name -> None when it can be used, or why it cannot.

    >>> available_backends()["reference"] is None
    True
    """
    native = importlib.import_module("fused_ewclora.backends.native")
    return {
        "triton": "this version has no Triton kernels",
        "cuda": "this version has no CUDA kernels",
        "cpu": native.unavailable(),
        "reference": None,
    }


def _validated(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ArgumentError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    if name != "auto" and (reason := available_backends()[name]) is not None:
        raise BackendError(f"{source}: backend {name!r} is not available: {reason}")
    return name


_current: str | None = None  # None until first asked for: the environment is read once


def current_backend() -> str:
    """The backend that `backend=None` means now."""
    global _current
    if _current is None:
        _current = _validated(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)
    return _current


class use_backend:  # lower case: it is used like a function
    """Choose the backend that `backend=None` means, for the process, or until the end of a `with` block.

    Raises `ArgumentError` for an unknown name and `BackendError` for one that is not available.

        >>> use_backend("reference")
        >>> with use_backend("cpu"): y = model(x)
    """

    def __init__(self, name: str) -> None:
        global _current
        self._previous = current_backend()
        _current = _validated(name, "use_backend")

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        global _current
        _current = self._previous


def resolve(backend: str | None) -> str:
    """The backend a call asks for; names are validated here, before anything runs."""
    return current_backend() if backend is None else _validated(backend, "backend")


@functools.lru_cache(maxsize=1024)
def choose(op: str, backend: str, call: Call) -> Candidate:
    """The candidate that serves `call`; `BackendError` with every reason when a named backend cannot."""
    reasons = []
    for candidate in candidates(op):
        if backend not in ("auto", candidate.backend):
            continue
        reason = candidate.supports(call)
        if reason is None:
            return candidate
        reasons.append(f"{candidate.algorithm}: {reason}")
    detail = "; ".join(reasons) or f"it does not implement {op}"
    raise BackendError(f"backend {backend!r} cannot run {op} on {call.device} {call.dtype}: {detail}")


def explain(op: str, call: Call, backend: str | None = None) -> list[tuple[str, str, str | None]]:
    """(backend, algorithm, reason) per candidate, preferred first; reason None: it can serve the call."""
    asked = resolve(backend)
    rows = []
    for candidate in candidates(op):
        reason = candidate.supports(call)
        if reason is None and asked not in ("auto", candidate.backend):
            reason = f"backend {asked!r} was asked for"
        rows.append((candidate.backend, candidate.algorithm, reason))
    return rows
