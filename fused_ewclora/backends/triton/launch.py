# SPDX-License-Identifier: Apache-2.0
"""Every Triton launch goes through `launch`: it runs the kernel or, for a report, records what would run."""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..candidate import arch_of, pretended

INTERPRETED = "interpret"  # the architecture whose configurations Triton's interpreter uses

# Streaming multiprocessors of the part that each table is made for, where no device can be asked.
_MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148, "gfx942": 304, INTERPRETED: 2}


@dataclass(frozen=True)
class Launch:
    """A launch that was noted, not run."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class _Noting(threading.local):
    """Who takes this thread's launches, and for which architecture; other threads launch meanwhile."""

    take: Callable[[Launch], None] | None = None
    arch: str | None = None


_noting = _Noting()


@contextlib.contextmanager
def noting(arch: str) -> Iterator[list[Launch]]:
    """Note launches as made for `arch`, and run none; tensors may be on the meta device."""
    launches: list[Launch] = []
    with handing(arch, launches.append):
        yield launches


@contextlib.contextmanager
def handing(arch: str | None, take: Callable[[Launch], None]) -> Iterator[None]:
    """Hand launches, made for `arch` (None: the device's), to `take` instead of to Triton."""
    before, before_arch = _noting.take, _noting.arch
    _noting.take, _noting.arch = take, arch
    try:
        with as_written():
            yield
    finally:
        _noting.take, _noting.arch = before, before_arch


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Inside, hosts of this thread do all that they do: no plan takes their place (see `plans`)."""
    if (extension := native.extension()) is None:
        yield
        return
    extension.bypass_plans(True)
    try:
        yield
    finally:
        extension.bypass_plans(False)


def recorded() -> bool:
    """Whether a plan is made of what the host does now (see `plans`)."""
    return _noting.take is not None and _noting.arch is None


def settle(kernels: ModuleType) -> None:
    """Make the keys by which Triton finds machine code on disk, callees first.

    Triton's key of a function depends on whether the keys of the functions that it calls were made before
    (3.6 and 3.7), so that the order of launches in a process would decide what is found.
    """
    for module in (importlib.import_module("fused_ewclora.kernels.tiles"), kernels):
        for function in vars(module).values():  # in order of definition
            getattr(function, "cache_key", None)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """`kernel[grid](*arguments, **options)`; an empty grid launches nothing."""
    if 0 in grid:
        return
    if _noting.take is not None:
        _noting.take(Launch(kernel, grid, arguments, options))
        return
    if pretended():
        return
    kernel[grid](*arguments, **options)


@functools.cache
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1 when Triton was imported)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def arch(tensor: Tensor) -> str:
    """The architecture that a launch on `tensor` is configured for."""
    if _noting.arch is not None:
        return _noting.arch
    return INTERPRETED if interpreted() else str(arch_of(tensor.device))


def arch_now() -> str:
    """The architecture that a launch on the current device is compiled for."""
    return _noting.arch or pretended() or str(arch_of(torch.device("cuda", torch.cuda.current_device())))


_driver = ("", "")


def drive(library: str = "", prefix: str = "") -> None:
    """Let plans launch through another library than libcuda, whose functions begin with `prefix`."""
    global _driver
    _driver = (library, prefix)


def driver() -> tuple[str, str]:
    """The library that plans launch through and the beginning of its functions' names; ("", ""): libcuda.
    Where the CPU stands in for a GPU, the extension stands in for libcuda."""
    if pretended() and not _driver[0]:
        return str(getattr(native.extension(), "__file__", "")), "fe_stub_"
    return _driver


@functools.cache
def _multiprocessors(index: int | None) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def multiprocessors(tensor: Tensor) -> int:
    """How many thread blocks run side by side at least: grids are cut to fill them."""
    if _noting.arch is not None or interpreted() or pretended():
        return _MULTIPROCESSORS[family(arch(tensor))]
    return _multiprocessors(tensor.device.index)


def family(architecture: str) -> str:
    """The table that serves an architecture; unknown ones get the table of sm_86, whose parts have the
    least shared memory (99 KiB a block)."""
    known = {"sm_80": "sm_80", "sm_87": "sm_80", "sm_90": "sm_90", "sm_100": "sm_100", "sm_103": "sm_100"}
    own = {INTERPRETED: INTERPRETED, "gfx942": "gfx942", "gfx950": "gfx942"}
    return {**known, **own}.get(architecture, "sm_86")


def exact() -> str:
    """How fp32 operands go through the matrix units as exactly as fp32 is: those of AMD take them as they are
    ("ieee"), others as three products of tf32 numbers (relative error near 1e-7)."""
    return "ieee" if torch.version.hip is not None or (_noting.arch or "").startswith("gfx") else "tf32x3"


def precision() -> str:
    """How fp32 operands go through the matrix units, by `torch.get_float32_matmul_precision()`.

    "highest" splits each operand in three tf32 parts (relative error near 1e-7), "high" rounds to tf32,
    "medium" also allows bf16, which the penalty uses. Matrix units of AMD take fp32 as it is ("ieee").
    """
    if (highest := exact()) == "ieee":
        return highest
    return {"highest": highest, "high": "tf32", "medium": "bf16"}[torch.get_float32_matmul_precision()]


def addressable(tensor: Tensor) -> Tensor:
    """`tensor`, or a contiguous copy when offsets inside one tile could pass 2^31."""
    return tensor if all(stride < 1 << 22 for stride in tensor.stride()) else tensor.contiguous()


def tileable(tensor: Tensor, shape: Sequence[int]) -> bool:
    """Whether a tensor descriptor can address `tensor` in blocks of `shape`: contiguous last dimension, other
    strides and the start at multiples of 16 bytes, and blocks of at least 16 bytes."""
    size = tensor.element_size()
    return (
        tensor.stride(-1) == 1
        and all(stride * size % 16 == 0 and stride > 0 for stride in tensor.stride()[:-1])
        and tensor.data_ptr() % 16 == 0
        and shape[-1] * size >= 16
        and all(extent > 0 for extent in tensor.shape)
    )


def wide(*tensors: Tensor) -> bool:
    """Whether pointers into all of them load 16 bytes at a time, as Triton sees it: of strides it knows if
    16 divides them. Loads of single elements need more registers for addresses, hence smaller blocks."""
    return all(
        t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in t.stride()[:-1])
        for t in tensors
    )


def tiles(tensor: Tensor, shape: Sequence[int]) -> Any:
    """A host-side tensor descriptor of `tensor` in blocks of `shape`; elements outside read as zero."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(shape))


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
