# SPDX-License-Identifier: Apache-2.0
"""The stand-in for the CUDA driver: what it reads from machine code, what it notes, refuses and fails
with."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launcher import cubins, stub
from ptx import separately

from fused_ewclora.backends.triton.tools import aot

pytestmark = [
    separately.needed,
    pytest.mark.skipif(stub.missing() is not None, reason=str(stub.missing())),
]
INVALID_VALUE, NOT_INITIALIZED, INVALID_IMAGE, INVALID_CONTEXT = 1, 3, 200, 201
NO_BINARY, INVALID_HANDLE, NOT_FOUND = 209, 400, 500
OPT_IN = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Config(ctypes.Structure):
    """CUlaunchConfig without attributes."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Machine code for several architectures."""
    made = tmp_path_factory.mktemp("cubins")
    separately.run("launcher.cubins", str(made), silent=True)
    return made


@pytest.fixture
def driver() -> Iterator[Any]:
    """The functions of the stand-in, freshly loaded, with the context of its one device."""
    made = stub.Stub(stub.library())
    made.reset()
    functions = ctypes.CDLL(str(made.path))
    functions.stub = made
    made.set(context=1, noting=1)
    yield functions
    made.reset()


def facts(folder: Path, arch: str) -> dict[str, Any]:
    return dict(json.loads((folder / f"{arch}.json").read_text()))


def load(driver: Any, folder: Path, arch: str = "sm_90", name: str | None = None) -> Any:
    """The kernel, asked for as launchers ask."""
    driver.stub.set(capability=int(arch[3:]))
    module, function, known = ctypes.c_void_p(), ctypes.c_void_p(), facts(folder, arch)
    image = (folder / f"{arch}.cubin").read_bytes()
    assert driver.cuModuleLoadData(ctypes.byref(module), image) == 0
    result = driver.cuModuleGetFunction(ctypes.byref(function), module, (name or known["name"]).encode())
    return function if result == 0 else result


def launch(driver: Any, function: Any, parameters: list[bytes], **changes: Any) -> int:
    """The result of a launch of one block."""
    held = [ctypes.create_string_buffer(data, len(data)) for data in parameters]
    pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(one) for one in held))
    config = Config((1, 1, 1), (256, 1, 1), 0, 7, None, 0)
    for name, value in changes.items():
        setattr(config, name, value)
    return int(driver.cuLaunchKernelEx(ctypes.byref(config), function, pointers, None))


def sizes(folder: Path, arch: str) -> list[int]:
    """Of the parameters, as NVIDIA's tool reads them."""
    tool = aot.cuobjdump()
    assert tool is not None
    printed = subprocess.run(
        [tool, "-elf", folder / f"{arch}.cubin"], capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"Ordinal : 0x(\w+)\s+Offset\s+: 0x\w+\s+Size\s+: 0x(\w+)", printed)
    return [size for _, size in sorted({(int(n, 16), int(size, 16)) for n, size in found})]


@pytest.mark.parametrize("arch", cubins.ARCHITECTURES)
def test_parameters_noted(driver: Any, folder: Path, arch: str) -> None:
    """Every parameter arrives with all of its bytes, in the places that the machine code has for it."""
    function, known = load(driver, folder, arch), facts(folder, arch)
    given = [bytes((31 * n + i) % 256 for i in range(size)) for n, size in enumerate(sizes(folder, arch))]
    assert len(given) > 20
    assert driver.cuFuncSetAttribute(function, OPT_IN, known["shared"]) == 0
    block = (32 * known["warps"], 1, 1)
    assert launch(driver, function, given, block=block, shared=known["shared"], grid=(5, 4, 3)) == 0
    (noted,) = driver.stub.launches()
    assert noted.parameters == tuple(given)
    assert (noted.function, noted.grid, noted.block) == (known["name"], (5, 4, 3), block)
    assert (noted.shared, noted.stream) == (known["shared"], 7)
    assert noted.image == (folder / f"{arch}.cubin").read_bytes()
    assert driver.stub.calls("cuLaunchKernelEx") == 1


def test_what_drivers_refuse(driver: Any, folder: Path) -> None:
    """Launches that a driver refuses: no or other blocks and threads than compiled for, too much shared
    memory, a parameter or context that is not there."""
    function = load(driver, folder)
    given = [bytes(size) for size in sizes(folder, "sm_90")]
    changes: list[dict[str, Any]] = [
        {"grid": (0, 1, 1)}, {"grid": (1, 1 << 16, 1)}, {"block": (128, 1, 1)}, {"block": (1024, 1, 1)},
        {"shared": (48 << 10) + 1},
    ]  # fmt: skip
    for change in changes:
        assert launch(driver, function, given, **change) == INVALID_VALUE, change
    pointers = (ctypes.c_void_p * len(given))()
    config = Config((1, 1, 1), (256, 1, 1), 0, None, None, 0)
    assert driver.cuLaunchKernelEx(ctypes.byref(config), function, pointers, None) == INVALID_VALUE
    driver.stub.set(context=0)
    assert launch(driver, function, given) == INVALID_CONTEXT
    driver.stub.set(devices=2, context=2)
    assert launch(driver, function, given) == INVALID_HANDLE
    assert driver.stub.launches() == []
    driver.stub.set(context=1)
    assert launch(driver, function, given) == 0
    driver.stub.reset()
    driver.stub.set(context=1)
    assert launch(driver, function, given) == INVALID_HANDLE


def test_code_refused(driver: Any, folder: Path) -> None:
    """Machine code that is none, that is for another architecture, and that lacks the kernel."""
    module, image = ctypes.c_void_p(), (folder / "sm_80.cubin").read_bytes()
    assert driver.cuModuleLoadData(ctypes.byref(module), image) == NO_BINARY
    for wrong in (b"\0" * 64, b"\177ELG" + image[4:], image[:18] + b"\x3e\0" + image[20:]):
        assert driver.cuModuleLoadData(ctypes.byref(module), wrong) == INVALID_IMAGE
    assert load(driver, folder, name="no_kernel") == NOT_FOUND


def test_failures(driver: Any, folder: Path) -> None:
    """A function fails from the call on that was asked for, and no other does."""
    version = ctypes.c_int()
    driver.stub.fail("cuDriverGetVersion", 719, after=1)
    assert [driver.cuDriverGetVersion(ctypes.byref(version)) for _ in range(3)] == [0, 719, 719]
    driver.stub.fail("cuDriverGetVersion", 0)
    driver.stub.set(version=11040)
    assert driver.cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value == 11040
    driver.stub.set(initialised=0)
    assert driver.cuDriverGetVersion(ctypes.byref(version)) == NOT_INITIALIZED
    for unknown in (driver.stub.calls, lambda name: driver.stub.fail(name, 1)):
        with pytest.raises(KeyError):
            unknown("cuNothing")
    with pytest.raises(KeyError):
        driver.stub.set(colour=1)


def test_missing_function() -> None:
    """A driver without one of the functions has all others."""
    library = ctypes.CDLL(str(stub.library(without=["cuTensorMapReplaceAddress"])))
    assert not hasattr(library, "cuTensorMapReplaceAddress")
    assert library.cuTensorMapEncodeTiled and library.cuLaunchKernelEx


def encoded(driver: Any, address: int = 4096, **changes: Any) -> bytes | int:
    """A tensor map, or what the driver says instead."""
    given: dict[str, Any] = {
        "type": 9, "sizes": (176, 159, 7), "strides": (352, 352 * 159), "box": (64, 128, 1),
        "steps": (1, 1, 1), "interleave": 0, "swizzle": 3, "promotion": 2, "fill": 0,
    }  # fmt: skip
    given |= changes
    room = ctypes.create_string_buffer(256)
    at = (ctypes.addressof(room) + 63) // 64 * 64
    words, halves = ctypes.c_uint64 * 3, ctypes.c_uint32 * 3
    result = driver.cuTensorMapEncodeTiled(
        ctypes.c_void_p(at), given["type"], len(given["sizes"]), ctypes.c_void_p(address),
        words(*given["sizes"]), words(*given["strides"]), halves(*given["box"]), halves(*given["steps"]),
        given["interleave"], given["swizzle"], given["promotion"], given["fill"],
    )  # fmt: skip
    return ctypes.string_at(at, 128) if result == 0 else int(result)


def test_tensor_maps(driver: Any) -> None:
    """A tensor map tells every argument that it was made from; equal arguments make equal bytes, and any
    other argument others; an address can be replaced."""
    data = encoded(driver)
    assert isinstance(data, bytes) and data == encoded(driver)
    assert stub.decode(data) == stub.TensorMap(
        4096, 9, (176, 159, 7), (352, 352 * 159), (64, 128, 1), (1, 1, 1), 3, 2, 0, True
    )
    others: list[dict[str, Any]] = [
        {"address": 8192}, {"type": 6}, {"sizes": (175, 159, 7)}, {"strides": (352, 368 * 159)},
        {"box": (64, 64, 1)}, {"steps": (1, 2, 1)}, {"swizzle": 0}, {"promotion": 1}, {"fill": 1},
        {"sizes": (176, 159, 1 << 32)}, {"sizes": (176, 159)},
    ]  # fmt: skip
    made = [encoded(driver, **other) for other in others]
    assert all(isinstance(one, bytes) for one in made)
    assert len({data, *made}) == 1 + len(others)
    room = ctypes.create_string_buffer(data, 128)
    assert driver.cuTensorMapReplaceAddress(room, ctypes.c_void_p(8192)) == 0
    assert room.raw == made[0]
    assert driver.cuTensorMapReplaceAddress(room, ctypes.c_void_p(8193)) == INVALID_VALUE


@pytest.mark.parametrize(
    "change",
    [
        {"address": 4104}, {"strides": (360, 352 * 159)}, {"strides": (352, 1 << 40)}, {"sizes": (176, 0, 7)},
        {"box": (64, 512, 1)}, {"box": (128, 128, 1)}, {"box": (4, 128, 1)}, {"steps": (1, 9, 1)},
        {"type": 16}, {"sizes": ()},
    ],
    ids=repr,
)  # fmt: skip
def test_tensor_maps_refused(driver: Any, change: dict[str, Any]) -> None:
    """Maps that cuda.h does not allow: addresses and strides off 16 bytes, sizes, boxes and steps out of
    range, rows of a box that swizzles do not span."""
    assert encoded(driver, **change) == INVALID_VALUE
