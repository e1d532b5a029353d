# SPDX-License-Identifier: Apache-2.0
"""Executes kernels on the CPU as PTX: memory that they may touch, launches, what was wrong, what it cost.

The machine itself is C++ (machine/), compiled once per state of its sources into build/ptx.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import shlex
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from . import text

ROOT = Path(__file__).resolve().parents[3]
SOURCES = Path(__file__).parent / "machine"
FOLDER = ROOT / "build" / "ptx" / str(sysconfig.get_config_var("SOABI"))
LIBRARY = FOLDER / "ptx_machine.so"
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-Wall", "-Wextra", "-fvisibility=hidden"]
LIMIT = 20_000_000  # instructions of warps, after which a launch does not end


def missing() -> str | None:
    """What keeps the machine from being built, as a sentence, or None."""
    import shutil

    if os.environ.get("FUSED_EWCLORA_BUILD") == "none":
        return "FUSED_EWCLORA_BUILD=none"
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler!r} was not found"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no Python headers"
    return None


def _compile(source: Path, include: Sequence[str]) -> Path:
    out = FOLDER / f"{source.stem}.o"
    newest = max(path.stat().st_mtime for path in [source, *SOURCES.glob("*.h")])
    if not out.exists() or out.stat().st_mtime <= newest:
        started = time.time()
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        done = subprocess.run(
            [*compiler, *FLAGS, *include, "-c", source, "-o", out], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        os.utime(out, (started, started))  # what is written from now on may not be what was compiled
    return out


@functools.cache
def module() -> Any:
    """The compiled machine; RuntimeError with the compiler's words where there is none."""
    import pybind11

    include = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "building").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda s: _compile(s, include), sorted(SOURCES.glob("*.cpp"))))
        if not LIBRARY.exists() or LIBRARY.stat().st_mtime <= max(o.stat().st_mtime for o in objects):
            compiler = shlex.split(os.environ.get("CXX", "c++"))
            subprocess.run([*compiler, "-shared", *objects, "-o", LIBRARY], check=True)
    spec = importlib.util.spec_from_file_location("ptx_machine", LIBRARY)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["ptx_machine"] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@dataclass(frozen=True)
class TensorMap:
    """The fields of a CUtensorMap for tiled copies: a tensor, the box of a copy in its dimensions, and the
    swizzle of its rows in shared memory in bytes (0: none)."""

    tensor: Tensor
    box: tuple[int, ...]
    swizzle: int

    def native(self) -> Any:
        size = self.tensor.element_size()
        extents = list(reversed(self.tensor.shape))
        strides = [stride * size for stride in reversed(self.tensor.stride()[:-1])]
        box = list(reversed(self.box))
        return module().TensorMap(self.tensor.data_ptr(), extents, strides, box, size, self.swizzle)


@dataclass(frozen=True)
class Finding:
    """Something wrong: its kind, an example in words, the instruction, and how often it was seen."""

    kind: str
    detail: str
    line: int
    instruction: str
    count: int

    def __str__(self) -> str:
        short = self.instruction if len(self.instruction) < 120 else self.instruction[:117] + "..."
        return f"{self.kind} ({self.count} x) at line {self.line}, {short}: {self.detail}"


@dataclass(frozen=True)
class Cost:
    """Of one instruction, over all warps of the grid. Wavefronts of shared memory are passes of 128 bytes;
    sectors are 32 bytes of global memory asked for, `fresh_sectors` those asked for the first time."""

    executed: int = 0
    lanes: int = 0
    wavefronts: int = 0
    ideal_wavefronts: int = 0
    sectors: int = 0
    fresh_sectors: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self.__dict__.values(), other.__dict__.values(), strict=True)))


@dataclass(frozen=True)
class Loop:
    """Instructions between a label and the last branch back to it, both included."""

    first: int
    last: int
    iterations: int  # of warps: how often the branch was reached
    mix: dict[str, int]  # executed instructions of warps, by the first word of the mnemonic
    cost: Cost


@dataclass
class Report:
    """What one launch did."""

    kernel: text.Kernel
    findings: list[Finding]
    costs: list[Cost]
    steps: int
    seconds: float = field(default=0.0, compare=False)

    def kinds(self) -> set[str]:
        return {finding.kind for finding in self.findings}

    def total(self) -> Cost:
        return sum(self.costs, Cost())

    def loops(self) -> list[Loop]:
        """Loops of the kernel that were executed, in the order of their ends."""
        ends: dict[int, int] = {}
        for at, instruction in enumerate(self.kernel.instructions):
            for target in instruction.targets:
                if target <= at:
                    ends[target] = max(at, ends.get(target, 0))
        found = []
        for first, last in sorted(ends.items(), key=lambda item: item[1]):
            mix: dict[str, int] = {}
            for at in range(first, last + 1):
                word = self.kernel.instructions[at].mnemonic.split(".")[0]
                mix[word] = mix.get(word, 0) + self.costs[at].executed
            iterations = self.costs[last].executed
            if iterations:
                found.append(Loop(first, last, iterations, mix, sum(self.costs[first : last + 1], Cost())))
        return found


class Machine:
    """Global memory, and launches on it. Tensors stay where they are; nothing else may be touched."""

    def __init__(self) -> None:
        self._machine = module().Machine()
        self._kept: list[Any] = []
        self._known: list[tuple[int, int]] = []

    def add(self, tensor: Tensor, name: str = "", initialised: bool = True) -> Tensor:
        """Let launches touch `tensor`, all bytes from its first element to its last."""
        if tensor.numel() == 0 or tensor.device.type != "cpu":
            return tensor
        last = sum(
            (extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        start, size = tensor.data_ptr(), (last + 1) * tensor.element_size()
        if not any(at <= start and start + size <= at + known for at, known in self._known):
            self._known.append((start, size))
            self._kept.append(tensor)
            shape = "x".join(map(str, tensor.shape))
            self._machine.add(start, size, name or f"tensor [{shape}]", initialised)
        return tensor

    def add_memory(self, start: int, size: int, name: str) -> None:
        """Let launches touch memory that stays there; it counts as written."""
        if not any(at <= start and start + size <= at + known for at, known in self._known):
            self._known.append((start, size))
            self._machine.add(start, size, name, True)

    def written(self, tensor: Tensor) -> None:
        """`tensor` was written between launches."""
        if tensor.numel() and tensor.device.type == "cpu":
            extents = zip(tensor.shape, tensor.stride(), strict=True)
            last = sum((extent - 1) * stride for extent, stride in extents)
            self._machine.initialise(tensor.data_ptr(), (last + 1) * tensor.element_size())

    def run(
        self,
        kernel: text.Kernel,
        grid: Sequence[int],
        arguments: Sequence[Any],
        threads: int | None = None,
        shared: int = 0,
        seed: int = 0,
        resident: int = 6,
        shuffled: bool = True,
        limit: int = LIMIT,
    ) -> Report:
        """Execute a grid of `kernel` with at most `resident` blocks at a time, which start in the order of
        their numbers or `shuffled`. `arguments` belong to the parameters in order: tensors, numbers, None
        (a null pointer), `TensorMap`s, or bytes; parameters without one are zero. `shared` is all shared
        memory."""
        started = time.perf_counter()
        data, maps = _pack(kernel, arguments)
        program = _program(kernel)
        dimensions = [*grid, 1, 1][:3]
        findings, costs, steps = self._machine.run(
            program, dimensions, threads or kernel.threads, max(shared, kernel.shared), data,
            [m.native() for m in maps], seed, resident, shuffled, limit,
        )  # fmt: skip
        report = Report(kernel, [], [Cost(*cost) for cost in costs], steps)
        for kind, detail, at, count in findings:
            instruction = kernel.instructions[min(at, len(kernel.instructions) - 1)]
            report.findings.append(Finding(kind, detail, instruction.line, instruction.text, count))
        report.seconds = time.perf_counter() - started
        return report


def _program(kernel: text.Kernel) -> Any:
    if not hasattr(kernel, "native"):
        listed = [
            (i.mnemonic, i.text, i.line, i.predicate, i.unless, i.operands, i.targets)
            for i in kernel.instructions
        ]
        kernel.native = module().Program(kernel.name, kernel.widths, kernel.shared, listed)  # type: ignore[attr-defined]
    return kernel.native  # type: ignore[attr-defined]


def _pack(kernel: text.Kernel, arguments: Sequence[Any]) -> tuple[bytes, list[TensorMap]]:
    data, maps = bytearray(max(kernel.parameter_bytes, 1)), []
    if len(arguments) > len(kernel.parameters):
        raise ValueError(f"{kernel.name}: {len(arguments)} arguments for {len(kernel.parameters)} parameters")
    for parameter, value in zip(kernel.parameters, arguments, strict=False):
        if isinstance(value, TensorMap):
            if parameter.size != 128:
                raise ValueError(f"{parameter.name}: expected no tensor map")
            packed = struct.pack("<Q", len(maps)) + bytes(120)
            maps.append(value)
        elif isinstance(value, bytes):
            packed = value
        elif isinstance(value, Tensor):
            packed = struct.pack("<Q", value.data_ptr() if value.numel() else 0)
        elif isinstance(value, float):
            packed = struct.pack("<d" if parameter.size == 8 else "<f", value)
        else:
            packed = (int(value or 0) & (1 << 8 * parameter.size) - 1).to_bytes(parameter.size, "little")
        if len(packed) != parameter.size:
            raise ValueError(f"{parameter.name}: expected {parameter.size} bytes, got {len(packed)}")
        data[parameter.offset : parameter.offset + parameter.size] = packed
    return bytes(data), maps
