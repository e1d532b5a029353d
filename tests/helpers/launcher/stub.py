# SPDX-License-Identifier: Apache-2.0
"""Builds and controls the stand-in for the CUDA driver: csrc/driver/stub.h."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import shlex
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ROOT / "csrc" / "driver"
FOLDER = ROOT / "build" / "driver"
NAME = "libcuda.so.1"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-fvisibility=hidden"]


def missing() -> str | None:
    """What keeps the stand-in from being built, as a sentence, or None."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    return None if shutil.which(compiler) else f"no C++ compiler: {compiler!r} was not found"


def built(path: Path, sources: Sequence[Path], options: Sequence[str]) -> Path:
    """A shared library, compiled where its sources are newer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = max(file.stat().st_mtime for source in sources for file in source.parent.glob("*.[ch]*"))
        if not path.exists() or path.stat().st_mtime <= newest:
            compiler = shlex.split(os.environ.get("CXX", "c++"))
            made = path.with_suffix(".new")
            done = subprocess.run(
                [*compiler, *FLAGS, *options, "-shared", *sources, "-o", made], capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(done.stderr)
            made.replace(path)
    return path


def library(without: Sequence[str] = ()) -> Path:
    """The stand-in as a libcuda.so.1, `without` some functions."""
    absent = [f"-D{name}=fe_stub_absent_{name}" for name in without]
    path = FOLDER / "-".join(["alone", *sorted(without)]) / NAME
    options = ["-DFE_STUB_ALONE", f"-Wl,-soname,{NAME}", *absent]
    return built(path, [SOURCES / "stub.cpp", SOURCES / "image.cpp"], options)


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int32), ("value", ctypes.c_uint32 * 4))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_char_p),
        ("image", ctypes.c_void_p),
        ("image_bytes", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("attribute_count", ctypes.c_uint32),
        ("parameter_count", ctypes.c_uint32),
        ("parameter_bytes", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("parameters", ctypes.c_void_p),
        ("places", ctypes.POINTER(ctypes.c_uint32)),
    )


@dataclass(frozen=True)
class Launch:
    """What one launch handed to the driver; `parameters` are the bytes of each, in order."""

    function: str
    image: bytes
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    context: int
    attributes: tuple[tuple[int, tuple[int, ...]], ...]
    parameters: tuple[bytes, ...]


def _noted(at: _Launch) -> Launch:
    buffer = ctypes.string_at(at.parameters, at.parameter_bytes) if at.parameter_bytes else b""
    places = [(at.places[2 * i], at.places[2 * i + 1]) for i in range(at.parameter_count)]
    return Launch(
        at.function.decode(), ctypes.string_at(at.image, at.image_bytes), tuple(at.grid), tuple(at.block),
        at.shared, at.stream or 0, at.context or 0,
        tuple((a.id, tuple(a.value)) for a in at.attributes[: at.attribute_count]),
        tuple(buffer[offset : offset + size] for offset, size in places),
    )  # fmt: skip


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch), ctypes.c_void_p)


class Stub:
    """The stand-in in a library that holds it: by default the one of its own, also for whoever loads
    libcuda.so.1 later in this process."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or library()
        self._library = ctypes.CDLL(
            str(self.path), ctypes.RTLD_GLOBAL if path is None else ctypes.DEFAULT_MODE
        )
        self._library.fe_stub_launch.restype = ctypes.POINTER(_Launch)
        self._library.fe_stub_calls.restype = ctypes.c_longlong
        self._callback: object = None

    def reset(self) -> None:
        """As if freshly loaded; handles from before are invalid."""
        self._library.fe_stub_reset()
        self._callback = None

    def set(self, **settings: int) -> None:
        """Settings by name; see stub.h."""
        for name, value in settings.items():
            if self._library.fe_stub_set(name.encode(), ctypes.c_longlong(value)):
                raise KeyError(name)

    def fail(self, function: str, result: int, after: int = 0) -> None:
        """Let `function` return an error from its call number `after` on; 0 ends that."""
        if self._library.fe_stub_fail(function.encode(), result, ctypes.c_long(after)):
            raise KeyError(function)

    def calls(self, function: str) -> int:
        if (count := self._library.fe_stub_calls(function.encode())) < 0:
            raise KeyError(function)
        return int(count)

    def launches(self, first: int = 0) -> list[Launch]:
        """Those noted so far, from number `first` on."""
        found = []
        while at := self._library.fe_stub_launch(ctypes.c_longlong(first + len(found))):
            found.append(_noted(at.contents))
        return found

    def on_launch(self, take: Callable[[Launch], int] | None) -> None:
        """Let `take` have every launch; it returns the driver's result."""
        self._callback = None if take is None else _Callback(lambda at, _: take(_noted(at.contents)))
        self._library.fe_stub_on_launch(self._callback, None)


@dataclass(frozen=True)
class TensorMap:
    """The arguments of cuTensorMapEncodeTiled, innermost dimension first; sizes in elements, strides in
    bytes. `doubtful` is the bit that drivers up to 13.1 set wrongly for small tensors."""

    address: int
    type: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...]
    swizzle: int
    promotion: int
    fill: int
    doubtful: bool

    @property
    def element_size(self) -> int:
        return (1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4)[self.type]


_MARK = 0xFE57
_ENCODED = struct.Struct("<QQ5I4x4Q5H5B")


def decode(data: bytes) -> TensorMap | None:
    """The tensor map that the stand-in encoded, or None for other bytes."""
    if len(data) < _ENCODED.size:
        return None
    address, fields, *rest = _ENCODED.unpack_from(data)
    if fields >> 32 != _MARK:
        return None
    rank = fields >> 4 & 15
    last, strides, box, steps = rest[:5], rest[5:9], rest[9:14], rest[14:]
    return TensorMap(
        address, fields & 15, tuple(n + 1 for n in last[:rank]), tuple(strides[: rank - 1]),
        tuple(box[:rank]), tuple(steps[:rank]), fields >> 8 & 15, fields >> 12 & 15, fields >> 16 & 15,
        bool(fields >> 21 & 1),
    )  # fmt: skip


@functools.cache
def shared() -> Stub:
    """The one stand-in of this process, which Triton's launcher finds as libcuda.so.1."""
    return Stub()
