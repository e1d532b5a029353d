# SPDX-License-Identifier: Apache-2.0
"""Runs what Triton compiles: launches of hosts, compiled ahead of time, executed by the machine."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ewclora.backends.triton import launch
from fused_ewclora.backends.triton.tools import aot

from . import text
from .machine import Machine, Report, TensorMap


@dataclass(frozen=True)
class Compiled:
    """Code of one specialisation, and what its launch needs to know."""

    ptx: str
    kernel: text.Kernel
    threads: int
    shared: int
    maps: list[dict[str, Any]]


_compiled: dict[str, Compiled] = {}


def compile_launch(noted: launch.Launch, arch: str) -> Compiled:
    """Compiled as Triton's JIT would compile it."""
    import triton
    from triton.compiler import ASTSource

    specialisation = aot.specialise(noted, arch)
    if (found := _compiled.get(specialisation.key)) is None:
        function = getattr(importlib.import_module(specialisation.module), specialisation.name)
        source = ASTSource(
            function, specialisation.signature, specialisation.constexprs, specialisation.attributes
        )
        made = triton.compile(source, target=aot.target(arch), options=specialisation.options)
        metadata, ptx = made.metadata, made.asm["ptx"]
        maps = list(getattr(metadata, "tensordesc_meta", None) or [])
        found = Compiled(ptx, text.kernel(ptx), 32 * metadata.num_warps, metadata.shared, maps)
        _compiled[specialisation.key] = found
    return found


def arguments(noted: launch.Launch, arch: str, compiled: Compiled) -> list[Any]:
    """Values of the parameters, as Triton's launcher passes them: constants are gone, tuples and tensor
    descriptors are spread."""
    specialisation = aot.specialise(noted, arch)
    values = dict(zip(noted.kernel.arg_names, noted.arguments, strict=False)) | {
        name: value for name, value in noted.options.items() if name in noted.kernel.arg_names
    }
    flat: list[Any] = []
    maps = iter(compiled.maps)

    def spread(kind: Any, value: Any) -> None:
        if isinstance(kind, (tuple, list)):
            for one_kind, one in zip(kind, value, strict=True):
                spread(one_kind, one)
        elif isinstance(kind, str) and kind.startswith("tensordesc"):
            flat.append(_tensor_map(value, next(maps)))
            flat.extend([*value.shape, *value.strides])
        elif kind != "constexpr":
            flat.append(value)

    for name, kind in specialisation.signature.items():
        spread(kind, values.get(name))
    return flat


def _tensor_map(descriptor: Any, meta: dict[str, Any]) -> TensorMap:
    # Triton names swizzles as CUDA does: 0 none, 1 to 3 for 32, 64 and 128 bytes.
    swizzle = {0: 0, 1: 32, 2: 64, 3: 128}[meta["swizzle"]]
    return TensorMap(descriptor.base, tuple(meta["block_size"]), swizzle)


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from tensors(one)
    elif hasattr(value, "base") and isinstance(value.base, Tensor):
        yield value.base


EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


class _Fresh(TorchDispatchMode):
    """Notes tensors that are made inside: those of `empty` hold NaN and count as never written."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                self.machine.written(value)
        if isinstance(given := (kwargs or {}).get("out"), Tensor):
            self.machine.written(given)
        if isinstance(out, Tensor) and name in EMPTY and out.device.type == "cpu" and out.numel():
            out.untyped_storage().fill_(0xFF)
            self.machine.add(out, initialised=False)
        return out


@dataclass
class Session:
    """Launches of hosts inside `executing`, with a report each."""

    arch: str
    seed: int = 0
    resident: int = 6
    shuffled: bool = True
    change: Callable[[str, str], str] | None = None  # of (kernel's name, PTX)
    machine: Machine = field(default_factory=Machine)
    reports: list[Report] = field(default_factory=list)
    changed: int = 0  # launches whose code `change` edited

    def run(self, noted: launch.Launch) -> None:
        compiled = compile_launch(noted, self.arch)
        if (
            self.change is not None
            and (ptx := self.change(noted.kernel.fn.__name__, compiled.ptx)) != compiled.ptx
        ):
            compiled = replace(compiled, ptx=ptx, kernel=text.kernel(ptx))
            self.changed += 1
        for tensor in tensors([*noted.arguments]):
            self.machine.add(tensor)
        self.reports.append(
            self.machine.run(
                compiled.kernel, noted.grid, arguments(noted, self.arch, compiled), compiled.threads,
                compiled.shared, self.seed, self.resident, self.shuffled,
            )
        )  # fmt: skip

    def findings(self) -> list[str]:
        return [f"{r.kernel.name}: {finding}" for r in self.reports for finding in r.findings]


@contextlib.contextmanager
def executing(session: Session, *inputs: Any) -> Iterator[Session]:
    """Hosts called inside launch on the machine, as for `session.arch`. `inputs` are tensors that launches
    reach by pointers in tables."""
    for tensor in tensors(list(inputs)):
        session.machine.add(tensor)
    with launch.handing(session.arch, session.run), _Fresh(session.machine):
        yield session
