# SPDX-License-Identifier: Apache-2.0
"""What csrc/driver declares of the CUDA driver, against the cuda.h that comes with Triton."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from launcher import stub

TRITON = importlib.util.find_spec("triton")
INCLUDE = Path(str(TRITON.origin)).parent / "backends" / "nvidia" / "include" if TRITON else Path()
HEADERS = [stub.SOURCES / name for name in ("api.h", "stub_extra.h")]
pytestmark = [
    pytest.mark.skipif(stub.missing() is not None, reason=str(stub.missing())),
    pytest.mark.skipif(not (INCLUDE / "cuda.h").exists(), reason="Triton with its cuda.h is not installed"),
]


def compiled(checks: list[str], folder: Path) -> str:
    """What the compiler says to static assertions, or ""."""
    source = "\n".join(
        [
            "#include <cuda.h>", "#include <cstddef>", "#include <type_traits>", '#include "stub_extra.h"',
            "template <class A, class B> constexpr bool alike = sizeof(A) == sizeof(B) &&"
            " std::is_pointer<A>::value == std::is_pointer<B>::value;",
            "template <class A, class B> struct Same : std::false_type {};",
            "template <class R, class... A, class S, class... B> struct Same<R (*)(A...), S (*)(B...)>"
            " : std::bool_constant<(alike<R, S> && ... && alike<A, B>)> {};",
            "namespace ours = fe::driver;",
            "namespace fe::driver {",
            "#define POINTER(name, arguments) using pointer_##name = CUresult(*) arguments;",
            "FE_DRIVER_FUNCTIONS(POINTER) FE_DRIVER_EXTRA_FUNCTIONS(POINTER)",
            "}",
            *checks,
        ]
    )  # fmt: skip
    path = folder / "checks.cpp"
    path.write_text(source + "\n")
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    done = subprocess.run(
        [*compiler, "-std=c++17", "-fsyntax-only", f"-I{INCLUDE}", f"-I{stub.SOURCES}", path],
        capture_output=True, text=True,
    )  # fmt: skip
    return done.stderr


def test_declarations(tmp_path: Path) -> None:
    """Constants have the values, structures the layouts, and functions the arguments that cuda.h gives
    them."""
    text = "\n".join(header.read_text() for header in HEADERS)
    constants = re.findall(r"constexpr int (CU_\w+) =", text)
    functions = re.findall(r"_\((cu\w+),", text)
    assert len(constants) > 10 and len(functions) > 20
    checks = [f'static_assert(ours::{name} == ::{name}, "{name}");' for name in constants]
    checks += [
        f'static_assert(Same<ours::pointer_{name}, decltype(&::{name})>::value, "{name}");'
        for name in functions
    ]
    for field in re.findall(
        r"grid\w+|block\w+|sharedMemBytes|hStream|\battrs|numAttrs", struct(text, "CUlaunchConfig")
    ):
        checks.append(same_place("CUlaunchConfig", field))
    checks += [same_place("CUlaunchAttribute", field) for field in ("id", "value")]
    checks += [same_size(name) for name in ("CUlaunchConfig", "CUlaunchAttribute", "CUtensorMap")]
    assert compiled(checks, tmp_path) == ""
    for wrong in (
        "ours::CU_FUNC_CACHE_PREFER_SHARED == ::CU_FUNC_CACHE_PREFER_L1",
        "Same<ours::pointer_cuFuncSetCacheConfig, decltype(&::cuCtxSetLimit)>::value",  # sizes of arguments
        "Same<ours::pointer_cuModuleLoadData, decltype(&::cuModuleGetFunction)>::value",  # their number
    ):
        assert "error: " in compiled([f"static_assert({wrong});"], tmp_path)


def struct(text: str, name: str) -> str:
    return text.split(f"struct {name} {{")[1].split("}")[0]


def same_place(name: str, field: str) -> str:
    return f"static_assert(offsetof(ours::{name}, {field}) == offsetof(::{name}, {field}));"


def same_size(name: str) -> str:
    return f"static_assert(sizeof(ours::{name}) == sizeof(::{name}));"
