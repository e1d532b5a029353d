# SPDX-License-Identifier: Apache-2.0
"""Builds the CUDA kernels for the emulator (csrc/cuda/emulator) and installs them as backend "cuda".

Compiled once per state of the sources, into build/emulator; processes of a parallel test run wait for the
first. What could not be built is remembered until the sources change.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import types
from collections.abc import Iterator
from pathlib import Path

import torch

from fused_ewclora.backends import cuda

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc" / "cuda"
AUTOGRAD = ROOT / "csrc" / "autograd"
NAME = "emulated_C_cuda"
# Of `make sanitize`; where threads are watched there is nothing to see, one thread runs all fibers.
SANITIZE = os.environ.get("FUSED_EWCLORA_SANITIZE") == "address"
SANITIZER = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined", "-g1"]
FOLDER = ROOT / "build" / "emulator" / f"{sysconfig.get_config_var('SOABI')}-torch{torch.__version__}"
FOLDER = FOLDER.with_name(f"{FOLDER.name}-address") if SANITIZE else FOLDER
LIBRARY, FAILURE = FOLDER / f"{NAME}.so", FOLDER / "failure.txt"
FLAGS = ["-std=c++20", "-DFE_EMULATED", f"-DTORCH_EXTENSION_NAME={NAME}", "-DTORCH_API_INCLUDE_EXTENSION_H"]
FLAGS += [
    "-O1",
    "-g0",
    "-fPIC",
    "-Wall",
    "-fvisibility=hidden",
    f"-I{CSRC}",
    *(SANITIZER if SANITIZE else ()),
]
LIBRARIES = [*(SANITIZER if SANITIZE else ()), "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]


def sources() -> list[Path]:
    return [path for folder in ("bindings", "emulator") for path in sorted((CSRC / folder).glob("*.cpp"))]


def missing() -> str | None:
    """What keeps the emulator from being built, as a sentence, or None."""
    if os.environ.get("FUSED_EWCLORA_BUILD") == "none":
        return "FUSED_EWCLORA_BUILD=none"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler!r} was not found"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no Python headers"
    return None if _ninja() else "ninja is not installed"


def _ninja() -> str | None:
    return shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


def _changed() -> float:
    """When the newest source was written."""
    return max(
        path.stat().st_mtime
        for path in [Path(__file__), *CSRC.rglob("*"), *AUTOGRAD.iterdir(), *CSRC.parent.glob("*.h")]
        if path.is_file()
    )


def _is_current(path: Path) -> bool:
    return path.exists() and path.stat().st_mtime > _changed()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process at a time; the lock ends with the process that holds it."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "building").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _rules() -> str:
    """A ninja file: an object per source, which depends on the headers it includes, and the library."""
    from torch.utils.cpp_extension import include_paths, library_paths

    system = [f"-isystem {path}" for path in [*include_paths(), sysconfig.get_path("include")]]
    found = [f"-L{path} -Wl,-rpath,{path}" for path in library_paths()]
    lines = [
        f"compiler = {os.environ.get('CXX', 'c++')}",
        f"flags = {' '.join([*FLAGS, *system])}",
        "rule compile\n  command = $compiler -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d",
        f"rule link\n  command = $compiler -shared $in {' '.join([*found, *LIBRARIES])} -o $out",
    ]
    objects = {path: f"{path.parent.name}-{path.stem}.o" for path in sources()}
    lines += [f"build {name}: compile {path}" for path, name in objects.items()]
    lines.append(f"build {LIBRARY.name}: link {' '.join(objects.values())}")
    return "\n".join(lines) + "\n"


def _build() -> str | None:
    """Builds what has changed; what the compiler says about it, or None."""
    print("building the emulator of the CUDA kernels, once; about two minutes", file=sys.stderr, flush=True)
    (FOLDER / "build.ninja").write_text(_rules())
    started = time.time()  # sources that are written from now on may not be those that are compiled
    done = subprocess.run([_ninja() or "", "-C", FOLDER], capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode == 0:
        os.utime(LIBRARY, (started, started))
        return None
    if "signal terminated program" not in said:  # a build that was killed may succeed the next time
        FAILURE.write_text(said)
        os.utime(FAILURE, (started, started))
    return said


def failure() -> str | None:
    """What the compiler said, where it is known that the current sources do not build."""
    return FAILURE.read_text() if _is_current(FAILURE) else None


def load() -> types.ModuleType:
    """The emulated module; RuntimeError with the compiler's or the loader's words where there is none."""
    with _alone():
        words = None if _is_current(LIBRARY) else failure() or _build()
    if words is not None:
        raise RuntimeError(words)
    spec = importlib.util.spec_from_file_location(NAME, LIBRARY)
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise RuntimeError(str(error)) from error
    return module


def install() -> str | None:
    """Serves CPU tensors by the emulated kernels from now on, or says why not."""
    if torch.cuda.is_available():
        return "the kernels run on the GPU"
    if (reason := missing()) is not None:
        return reason
    try:
        cuda.emulate(load())
    except RuntimeError as error:
        return f"they do not build (see tests/backends/cuda/test_emulator.py): {str(error).splitlines()[0]}"
    return None
