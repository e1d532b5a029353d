# SPDX-License-Identifier: Apache-2.0
"""What decides the machine code of a launch; and compiling it, as Triton's JIT would, without a GPU."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

from .launch import Launch, settle


@dataclass(frozen=True)
class Specialisation:
    """A kernel with everything that decides its machine code, for one architecture."""

    arch: str
    module: str
    name: str
    signature: dict[str, Any]
    constexprs: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Equal for launches that run the same machine code."""
        return repr((self.arch, self.module, self.name, self.signature, self.constexprs, self.attributes,
                     sorted(self.options.items(), key=lambda item: item[0])))  # fmt: skip


def target(arch: str) -> Any:
    """Triton's name of an architecture: "sm_90" or "gfx942"."""
    from triton.backends.compiler import GPUTarget

    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64)


@functools.cache
def _backend(arch: str) -> Any:
    from triton.compiler import make_backend

    return make_backend(target(arch))


@functools.cache
def _binder(kernel: Any, arch: str) -> Any:
    from triton.runtime.jit import create_function_from_signature

    return create_function_from_signature(kernel.signature, kernel.params, _backend(arch))


def specialise(launch: Launch, arch: str) -> Specialisation:
    """How Triton would specialise `launch` on `arch`: types, divisibility, constants and options."""
    kernel, backend = launch.kernel, _backend(arch)
    bound, kinds, options = _binder(kernel, arch)(*launch.arguments, **launch.options)
    options, signature, constexprs, attributes = kernel._pack_args(
        backend, launch.options, bound, kinds, options
    )
    return Specialisation(
        arch, kernel.fn.__module__, kernel.fn.__name__, signature, constexprs, attributes, options.__dict__
    )


def compiled(specialisation: Specialisation) -> Any:
    """What Triton compiles, or takes from its cache; raises what the compiler does."""
    import triton
    from triton.compiler import ASTSource

    module = importlib.import_module(specialisation.module)
    settle(module)
    kernel = getattr(module, specialisation.name)
    source = ASTSource(kernel, specialisation.signature, specialisation.constexprs, specialisation.attributes)
    return triton.compile(source, target=target(specialisation.arch), options=specialisation.options)
