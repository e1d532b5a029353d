# SPDX-License-Identifier: Apache-2.0
"""Which implementation serves a call, and why the others do not.

Every op has a list of candidates, fastest first; each says in words why it cannot serve a call, or None.
`auto` takes the first that can; a backend named explicitly either serves the call or raises with those words.
A name may carry an algorithm of the backend, "triton:prologue".
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..backends.candidate import Call as Call
from ..backends.candidate import Candidate as Candidate
from ..backends.candidate import LinearShape as LinearShape
from ..backends.candidate import arch_of as arch_of
from ..backends.candidate import bucket as bucket
from ..backends.candidate import remembers_choices
from ..errors import ArgumentError, BackendError
from ..literals import Backend

_log = logging.getLogger(__name__)
BACKENDS = ("auto", "triton", "cuda", "cpu", "reference")
ENVIRONMENT_VARIABLE = "FUSED_EWCLORA_BACKEND"
DEFAULT_ROWS = 8192  # of the input of a LoRA linear, when it is asked about without one


@remembers_choices
@functools.cache
def candidates(op: str) -> tuple[Candidate, ...]:
    """Implementations of `op`, in order of preference. Backends load on the first call that needs them."""
    triton = importlib.import_module("fused_ewclora.backends.triton")
    cuda = importlib.import_module("fused_ewclora.backends.cuda")
    native = importlib.import_module("fused_ewclora.backends.native")
    plain = importlib.import_module("fused_ewclora.backends.reference")
    fastest_first = [triton, cuda, native, plain]
    # On the CPU they serve calls that ask for them; nothing is slower.
    for backend, simulated in ((cuda, cuda.emulating()), (triton, triton.simulated())):
        if simulated:
            fastest_first.remove(backend)
            fastest_first.append(backend)
    return tuple(c for backend in fastest_first for c in backend.candidates(op))


@remembers_choices
@functools.cache
def available_backends() -> dict[str, str | None]:
    """The backends that can be used, and why others cannot.

    Returns:
        Backend name -> None when it can be used, or the reason why it cannot.

    Examples:
        >>> fe.available_backends()["reference"] is None
        True
    """
    triton = importlib.import_module("fused_ewclora.backends.triton")
    cuda = importlib.import_module("fused_ewclora.backends.cuda")
    native = importlib.import_module("fused_ewclora.backends.native")
    found = {
        "triton": triton.unavailable(),
        "cuda": cuda.unavailable(),
        "cpu": native.unavailable(),
        "reference": None,
    }
    for name, reason in found.items():
        _log.debug("backend %s: %s", name, reason or "available")
    return found


def forget_tables() -> None:
    """Free the device memory that backends keep between calls: tables of pointers to tensors, those that
    captured CUDA graphs read included.

    Waits for the GPUs. CUDA graphs that were captured before must not be replayed afterwards. Later calls
    make new tables.

    Raises:
        BackendError: during the capture of a CUDA graph.

    Examples:
        >>> fe.forget_tables()
    """
    if torch.cuda.is_initialized():
        if torch.cuda.is_current_stream_capturing():
            raise BackendError("forget_tables: expected a call outside of the capture of a CUDA graph")
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)
    for backend in ("triton", "cuda"):
        importlib.import_module(f"fused_ewclora.backends.{backend}").forget_tables()


@remembers_choices
@functools.cache
def _preferences() -> tuple[Callable[..., str | None], ...]:
    """`outperformed` of the tables that choose between backends, as far as they have entries; what was
    measured comes before what is predicted."""
    found = (
        importlib.import_module("fused_ewclora.backends.measured_choice"),
        importlib.import_module("fused_ewclora.backends.predicted_choice"),
    )
    return tuple(table.outperformed for table in found if table.entries())


def extension() -> Any:
    """The compiled CPU extension, or None."""
    return importlib.import_module("fused_ewclora.backends.native").extension()


@functools.cache
def recorded_penalty() -> Callable[..., Tensor] | None:
    """What puts a penalty and its gradients, whichever backend computed them, on autograd's tape in C++:
    (op, fishers, adapters, lambda, needs, penalty, flat gradients) -> penalty. None without the extension."""
    return getattr(extension(), "ewc_penalty_recorded", None)


@functools.cache
def penalty_terms() -> Callable[..., Any] | None:
    """What checks the arguments of a penalty in C++: (op, fishers, lora_as, lora_bs, scales) -> their terms,
    None where they have not the common form. None without the C++ extension."""
    terms = getattr(extension(), "PenaltyTerms", None)
    return None if terms is None else terms.of


@functools.cache
def plain_merge() -> Callable[..., bool] | None:
    """What tells in C++ whether (weights, lora_as, lora_bs, scales) of a merge have the common form. None
    without the C++ extension."""
    return getattr(extension(), "is_merge", None)


@functools.cache
def are_plain() -> Callable[[list[Tensor | None]], bool]:
    """What tells whether tensors are what kernels read past the dispatcher: of no subclass, no shapes alone,
    not sparse, and without a sign that is still to be applied to their memory."""
    return getattr(extension(), "are_plain", _are_plain)


_PLAIN = {Tensor, Parameter, NoneType}


def _are_plain(tensors: list[Tensor | None]) -> bool:
    if not {type(t) for t in tensors} <= _PLAIN:
        return False
    there = [t for t in tensors if t is not None]
    return not any(t.is_meta or t.is_neg() or t.layout != torch.strided for t in there)


@remembers_choices
@functools.cache
def algorithms(backend: str) -> tuple[str, ...]:
    """Names by which algorithms of `backend` can be asked for."""
    ops = ("lora_linear", "lora_linear_backward")
    keys = [key for op in ops for c in candidates(op) if c.backend == backend for key in c.keys]
    return tuple(dict.fromkeys(keys))


def _validated(name: str, source: str) -> str:
    backend, _, algorithm = name.partition(":")
    if backend not in BACKENDS:
        raise ArgumentError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    if torch.compiler.is_compiling():
        return name  # loading a backend is nothing to trace; `choose` validates when the op runs
    if backend != "auto" and (reason := available_backends()[backend]) is not None:
        raise BackendError(f"{source}: backend {backend!r} is not available: {reason}")
    if ":" in name and algorithm not in algorithms(backend):
        known = ", ".join(algorithms(backend)) or "none can be named"
        raise ArgumentError(f"{source}: expected an algorithm of {backend!r} ({known}), got {algorithm!r}")
    return name


@functools.cache
def _of_environment() -> str:
    """The environment is read once, when it is first asked for."""
    return _validated(_named_in_environment(), ENVIRONMENT_VARIABLE)


def _named_in_environment() -> str:
    return os.environ.get(ENVIRONMENT_VARIABLE) or "auto"


_chosen: str | None = None  # by `use_backend`; None leaves it to the environment


def current_backend() -> str:
    """The backend that `backend=None` means now."""
    if _chosen is not None:
        return _chosen
    # Tracing must not change state that its graph guards on, or each first graph would be compiled twice.
    return _named_in_environment() if torch.compiler.is_compiling() else _of_environment()


class use_backend:  # lower case: it is used like a function
    """Choose the backend that `backend=None` means, for the process, or until the end of a `with` block.

    Args:
        name: "auto", or one of `available_backends`.

    Raises:
        ArgumentError: for an unknown name.
        BackendError: for a backend that is not available.

    Examples:
        >>> with fe.use_backend("reference"):
        ...     y = model(x)
    """

    def __init__(self, name: Backend) -> None:
        global _chosen
        current_backend()  # a wrong name in the environment is an error here, too
        self._previous, _chosen = _chosen, _validated(name, "use_backend")

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        global _chosen
        _chosen = self._previous


def resolve(backend: str | None) -> str:
    """The backend a call asks for; names are validated here, before anything runs."""
    return current_backend() if backend is None else _validated(backend, "backend")


def _reason(op: str, candidate: Candidate, asked: str, call: Call) -> str | None:
    """Why `candidate` does not serve `call` when `asked` is the choice, or None."""
    backend, _, algorithm = asked.partition(":")
    if (reason := candidate.supports(call)) is not None:
        return reason
    if backend not in ("auto", candidate.backend):
        return f"backend {backend!r} was asked for"
    # Ops without algorithms by that name run as they always do.
    if algorithm and any(algorithm in c.keys for c in candidates(op)):
        return None if algorithm in candidate.keys else f"algorithm {algorithm!r} was asked for"
    for outperformed in _preferences() if backend == "auto" else ():
        if (reason := outperformed(op, candidate, call, candidates(op))) is not None:
            return reason
    return candidate.outperformed(call)


class _EagerChoices:
    """The choices that the C++ extension remembers for eager calls."""

    def cache_clear(self) -> None:
        if (found := extension()) is not None:
            found.forget_choices()

    def __call__(self) -> None:
        self.cache_clear()


_eager_choices = remembers_choices(_EagerChoices())

Annotate = Callable[[str, Candidate], Candidate]
_annotate: Annotate | None = None


def annotate(how: Annotate | None) -> Annotate | None:
    """What `choose` makes of the candidates that it returns from now on; returns what it made of them before.
    None leaves them as they are, so that nothing but the choice is on the path of a call."""
    global _annotate
    before, _annotate = _annotate, how
    choose.cache_clear()
    _eager_choices.cache_clear()
    return before


@remembers_choices
@functools.lru_cache(maxsize=1024)
def choose(op: str, backend: str, call: Call) -> Candidate:
    """The candidate that serves `call`; `BackendError` with every reason when a named backend cannot."""
    reasons: list[str] = []
    _validated(backend, "backend")  # compiled calls come unvalidated
    for candidate in candidates(op):
        reason = _reason(op, candidate, backend, call)
        if reason is None:
            _log_choice(op, backend, call, candidate, reasons)
            return candidate if _annotate is None else _annotate(op, candidate)
        if backend.partition(":")[0] in ("auto", candidate.backend):
            reasons.append(f"{candidate.algorithm}: {reason}")
    detail = "; ".join(reasons) or f"it does not implement {op}"
    raise BackendError(f"backend {backend!r} cannot run {op} on {call.device} {call.dtype}: {detail}")


def _log_choice(op: str, asked: str, call: Call, chosen: Candidate, reasons: list[str]) -> None:
    """Told once for every kind of call, because choices are remembered."""
    if _log.isEnabledFor(logging.DEBUG):
        why = f"; not {'; '.join(reasons)}" if reasons else ""
        served = f"{chosen.backend} ({chosen.algorithm})"
        _log.debug("%s %s on %s %s: %s%s", asked, op, call.device, call.dtype, served, why)
    if asked == "auto" and chosen.backend == "reference":
        _log_fallback(op, call.device, call.dtype)


@functools.cache
def _log_fallback(op: str, device: str, dtype: torch.dtype) -> None:
    text = "%s on %s %s runs in plain PyTorch: no other backend serves it (fe.explain and DEBUG tell why)"
    _log.info(text, op, device, dtype)


def explain(op: str, call: Call, backend: str | None = None) -> list[tuple[str, str, str | None]]:
    """(backend, algorithm, reason) per candidate, preferred first; reason None: it can serve the call."""
    asked = resolve(backend)
    return [_explained(c, _reason(op, c, asked, call)) for c in candidates(op)]


def _explained(candidate: Candidate, reason: str | None) -> tuple[str, str, str | None]:
    remark = candidate.remark() if reason is None else None
    algorithm = candidate.algorithm if remark is None else f"{candidate.algorithm}; {remark}"
    return candidate.backend, algorithm, reason
