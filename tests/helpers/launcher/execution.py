# SPDX-License-Identifier: Apache-2.0
"""Executes what the driver was handed: the PTX machine runs each launch that arrives at the stand-in."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from ptx import text
from ptx.launches import EMPTY, tensors
from ptx.machine import Machine, Report, TensorMap, module
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ewclora.backends.triton import kept

from . import memory, stub

_SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}  # of CUtensorMapSwizzle: bytes
_ptx: dict[bytes, str] = {}  # by the digest of the machine code


@functools.cache
def watch_compiler() -> None:
    """Remember the PTX of every kernel that Triton compiles from now on, or takes from its cache."""
    from triton.compiler import CompiledKernel

    make = CompiledKernel.__init__

    @functools.wraps(make)
    def noting(self: Any, *arguments: Any) -> None:
        make(self, *arguments)
        _ptx[hashlib.sha256(self.asm["cubin"]).digest()] = self.asm["ptx"]

    CompiledKernel.__init__ = noting


@functools.cache
def _kernel(digest: bytes, name: str) -> text.Kernel:
    return text.kernel(_ptx[digest], name)


class _Decoded(TensorMap):
    """A tensor map as the driver was asked for it."""

    def __init__(self, given: stub.TensorMap) -> None:
        super().__init__(torch.empty(0), given.box, _SWIZZLES[given.swizzle])
        object.__setattr__(self, "given", given)

    def native(self) -> Any:
        given: stub.TensorMap = self.given  # type: ignore[attr-defined]
        return module().TensorMap(
            given.address, list(given.sizes), list(given.strides), list(given.box), given.element_size,
            self.swizzle,
        )  # fmt: skip


class _Memory(TorchDispatchMode):
    """Lets launches touch what is made inside; what `empty` makes holds NaN and counts as never written."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        fresh = func.overloadpacket.__name__ in EMPTY
        for tensor in torch.utils._pytree.tree_leaves(out):
            if not isinstance(tensor, Tensor) or not tensor.numel():
                continue
            if fresh:
                tensor.untyped_storage().fill_(0xFF)
            self.machine.add(tensor, initialised=not fresh)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors(value):
                    self.machine.written(tensor)
        if isinstance(given := (kwargs or {}).get("out"), Tensor):
            self.machine.written(given)
        return out


@dataclass
class Session:
    """Launches on the stand-in inside `executing`, each with a report."""

    arch: str
    seed: int = 0
    resident: int = 6
    machine: Machine = field(default_factory=Machine)
    reports: list[Report] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    blocks: int | None = None  # how many blocks of `memory` the machine knows; None: it learns of none

    def take(self, launch: stub.Launch) -> int:
        """The result for the driver: an error where the machine cannot execute the launch."""
        try:
            if self.blocks is not None:
                new = memory.blocks(self.blocks)
                self.blocks += len(new)
                for start, size in new:
                    self.machine.add_memory(start, size, f"{size} bytes")
            kernel = _kernel(hashlib.sha256(launch.image).digest(), launch.function)
            maps = (stub.decode(data) for data in launch.parameters)
            arguments = [
                data if found is None else _Decoded(found)
                for data, found in zip(launch.parameters, maps, strict=True)
            ]
            self.reports.append(
                self.machine.run(
                    kernel, launch.grid, arguments, launch.block[0], launch.shared, self.seed, self.resident
                )
            )
        except Exception as error:  # no exception passes through the driver
            self.failures.append(error)
            return LAUNCH_FAILED
        return 0

    def findings(self) -> list[str]:
        found = [f"{r.kernel.name}: {finding}" for r in self.reports for finding in r.findings]
        return [*map(repr, self.failures), *found]

    @contextlib.contextmanager
    def memory(self, *inputs: Any) -> Iterator[None]:
        """Launches may touch `inputs` and what is made inside; tables for other streams, too."""
        for tensor in tensors(list(inputs)):
            self.machine.add(tensor)
        outside = kept.outside
        kept.outside = _inside
        try:
            with _Memory(self.machine):
                yield
        finally:
            kept.outside = outside

    @contextlib.contextmanager
    def unobserved(self, *inputs: Any) -> Iterator[None]:
        """The same without watching operations, so that calls go the way that users' calls go; whether
        something was written before it is read is not known, but it holds NaN until then."""
        for tensor in tensors(list(inputs)):
            self.machine.add(tensor)
        self.blocks = 0
        with memory.held(poison=True):
            yield

    @contextlib.contextmanager
    def executing(self) -> Iterator[None]:
        """Launches on the stand-in run on the machine; elsewhere they do nothing."""
        stub.shared().on_launch(self.take)
        try:
            yield
        finally:
            stub.shared().on_launch(None)


LAUNCH_FAILED = 719


def _inside(make: Callable[[], Any], device: torch.device) -> Any:
    """`kept.outside` without another thread, in which nothing would notice what is made."""
    return make()
