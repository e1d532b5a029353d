# SPDX-License-Identifier: Apache-2.0
"""Runs what nvcc compiles: launches of the CUDA kernels' hosts, compiled to PTX, executed by the machine.

The emulator's build of the hosts serves CPU tensors; it hands its launches over instead of running fibers.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cuda_emulator
import nvcc
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ewclora.backends import cuda

from . import machine, text
from .machine import Machine, Report

_ENTRY = re.compile(r"^[ \t]*(?:\.\w+[ \t]+)*\.entry[ \t]+([\w$]+)", re.MULTILINE)
_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


def missing() -> str | None:
    """What keeps the kernels from being executed, as a sentence, or None."""
    if (reason := machine.missing() or cuda_emulator.missing()) is not None:
        return reason
    for tool in ("nvcc", "nm", "c++filt"):
        if shutil.which(tool) is None:
            return f"{tool} was not found"
    return None if cuda.emulating() else "the emulator of the CUDA kernels is not installed"


def _readable(symbols: Sequence[str]) -> list[str]:
    """Names as written, the same for every compiler's mangling of unnamed namespaces."""
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@functools.cache
def _emulated_names() -> dict[int, str]:
    """Place in the emulator's library -> name of the kernel there."""
    told = subprocess.run(["nm", cuda_emulator.LIBRARY], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^([0-9a-f]+) [tTwWuV] (\S*_kernel\S*)$", told, re.MULTILINE)
    names = _readable([symbol for _, symbol in found])
    return {int(place, 16): name for (place, _), name in zip(found, names, strict=True)}


@functools.cache
def _modules(source: Path, arch: str) -> dict[str, str]:
    """Kernel's name -> PTX of a module that has only it."""
    ptx = nvcc.ptx(source, arch).read_text()
    found = list(_ENTRY.finditer(ptx))
    names = _readable([match.group(1) for match in found])
    ends = [*(match.start() for match in found[1:]), len(ptx)]
    head = ptx[: found[0].start()]
    return {
        name: head + ptx[match.start() : end] for name, match, end in zip(names, found, ends, strict=True)
    }


def short(name: str) -> str:
    """`walk_kernel` of its full name."""
    match = re.search(r"(\w+_kernel)\b", name)
    return match.group(1) if match else name


def ptx_of(name: str, arch: str) -> str:
    """PTX of the kernel with this full name."""
    defined = re.compile(rf"\b{short(name)}\(FE_PARAMETER")
    source = next(path for path in sorted(nvcc.CSRC.glob("*.cu")) if defined.search(path.read_text()))
    return _modules(source, arch)[name]


@functools.cache
def _parsed(ptx: str) -> text.Kernel:
    return text.kernel(ptx)


class _Allocations(TorchDispatchMode):
    """Lets the machine touch every tensor that is made inside: those of `empty` hold NaN and count as never
    written."""

    def __init__(self, memory: Machine) -> None:
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten":
            out = func(*args, **(kwargs or {}))
        else:  # what an op of this library allocates is seen as well
            with self:
                out = func.redispatch(_KERNELS, *args, **(kwargs or {}))
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in value if isinstance(value, (list, tuple)) else [value]:
                    self.memory.written(tensor)
        empty = func.overloadpacket.__name__ in _EMPTY
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, Tensor) and tensor.numel():
                if empty:
                    tensor.untyped_storage().fill_(0xFF)
                self.memory.add(tensor, initialised=not empty)
        return out


@dataclass
class Session:
    """Launches inside `executing`, with a report each."""

    arch: str = "sm_80"
    seed: int = 0
    resident: int = 6
    change: Callable[[str, str], str] | None = None  # of (kernel's short name, PTX)
    machine: Machine = field(default_factory=Machine)
    reports: list[Report] = field(default_factory=list)
    changed: int = 0  # launches whose code `change` edited

    def run(self, place: int, grid: Sequence[int], threads: int, shared: int, arguments: list[bytes]) -> None:
        name = _emulated_names()[place]
        ptx = ptx_of(name, self.arch)
        if self.change is not None:
            edited = self.change(short(name), ptx)
            self.changed += edited != ptx
            ptx = edited
        self.reports.append(
            self.machine.run(_parsed(ptx), grid, arguments, threads, shared, self.seed, self.resident)
        )

    def findings(self) -> list[str]:
        """What was found, in words."""
        names = _readable([report.kernel.name for report in self.reports])
        return [
            f"{short(name)}: {finding}"
            for name, report in zip(names, self.reports, strict=True)
            for finding in report.findings
        ]


_streams = itertools.count(1 << 20)


@contextlib.contextmanager
def executing(session: Session) -> Iterator[Session]:
    """Calls of backend "cuda" inside launch on the machine; tensors that they reach are made inside too."""
    emulated: Any = cuda.extension()
    cuda.forget_tables()
    emulated.pretend(next(_streams), False)  # what is kept for a stream is made anew
    emulated.hand_launches(session.run)
    try:
        with _Allocations(session.machine):
            yield session
    finally:
        emulated.hand_launches(None)
        emulated.pretend(0, False)
        cuda.forget_tables()
