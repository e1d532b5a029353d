# SPDX-License-Identifier: Apache-2.0
"""Compiles csrc/cuda for a GPU, without one, and reads what the compiler and the machine code say.

Results are kept in build/nvcc until a source changes.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# Every kernel is one or the other, so that a new one is not forgotten.
MATRIX = {"ewc_penalty_kernel", "fisher_kernel", "fisher_sums_kernel", "expand_kernel", "walk_kernel"}
OTHERS = {
    "fisher_square_elements_kernel", "fisher_square_kernel", "finish_kernel", "pack_kernel", "merge_kernel",
    "soft_threshold_kernel", "fisher_norms_kernel", "fisher_single_sums_kernel", "factored_penalty_kernel",
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc" / "cuda"
FOLDER = ROOT / "build" / "nvcc"
LEAST = "sm_80"  # architecture
# As setup.py and PyTorch's BuildExtension give them.
_LANGUAGE = ["-std=c++17", "--expt-relaxed-constexpr", "-O3"]
FLAGS = [*_LANGUAGE, "-lineinfo", "-Xptxas=-v"]
_ELSE = re.compile(r"^#(ifndef FE_EMULATED|else)", re.MULTILINE)
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for")
_NUMBERS = {
    "stack": re.compile(r"(\d+) bytes stack frame"),
    "spilled": re.compile(r"(\d+) bytes spill stores"),
    "registers": re.compile(r"Used (\d+) registers"),
    "shared": re.compile(r"(\d+) bytes smem"),
}


@dataclass
class Kernel:
    """One instantiation. `name` is that of the template; registers and bytes are per thread, `shared` is per
    block and known at compile time."""

    symbol: str
    name: str
    stack: int = 0
    spilled: int = 0
    registers: int = 0
    shared: int = 0


def toolkit() -> Path | None:
    """The folder of the CUDA toolkit. What is called nvcc may be a script that calls another one."""
    if (nvcc := shutil.which("nvcc")) is None:
        return None
    said = subprocess.run([nvcc, "--dryrun", os.devnull], capture_output=True, text=True).stderr
    here = re.search(r"^#\$ _HERE_=(.+)$", said, re.MULTILINE)
    return Path(here.group(1)).parent if here else None


def cuobjdump() -> str | None:
    """Of the toolkit, or of Triton."""
    spec = importlib.util.find_spec("triton")
    folders = [Path(spec.origin).parent / "backends" / "nvidia" / "bin"] if spec and spec.origin else []
    if (home := toolkit()) is not None:
        folders.insert(0, home / "bin")
    return next((found for folder in folders if (found := shutil.which("cuobjdump", path=folder))), None)


def kept(result: Path, make: Callable[[], None]) -> Path:
    """`result`, made anew if a source was written since; others that want it wait."""
    result.parent.mkdir(parents=True, exist_ok=True)
    with result.with_name(f"{result.name}.making").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = max(path.stat().st_mtime for path in [Path(__file__), *CSRC.rglob("*")] if path.is_file())
        if not result.exists() or result.stat().st_mtime <= newest:
            started = time.time()
            make()
            os.utime(result, (started, started))
    return result


def _run(command: list[str | Path]) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def compiled(source: Path, arch: str) -> tuple[Path, str]:
    """The machine code of a file, and what ptxas says about it."""
    cubin = FOLDER / f"{source.stem}.{arch}.cubin"
    told = cubin.with_suffix(".txt")
    command = ["nvcc", *FLAGS, f"-arch={arch}", "-cubin", source, "-o", cubin]

    def make() -> None:
        told.write_text(_run(command))

    kept(cubin, make)
    return cubin, told.read_text()


def assembled(source: Path, arch: str) -> tuple[Path, str]:
    """The same of the PTX for the least architecture, which the tests that execute PTX compile anyway: it is
    what a later architecture runs, but for what CUDA's headers do there in other instructions."""
    cubin = FOLDER / f"{source.stem}.{LEAST}.{arch}.cubin"
    told = cubin.with_suffix(".txt")
    home = toolkit()
    assert home is not None

    def make() -> None:
        command = [home / "bin" / "ptxas", "-v", "-m64", f"-arch={arch}", ptx(source, LEAST), "-o", cubin]
        told.write_text(_run(command))

    kept(cubin, make)
    return cubin, told.read_text()


def ptx(source: Path, arch: str) -> Path:
    """The PTX of a file."""
    result = FOLDER / f"{source.stem}.{arch}.ptx"
    command = ["nvcc", *_LANGUAGE, f"-arch={arch}", "-ptx", source, "-o", result]

    def make() -> None:
        _run(command)

    return kept(result, make)


def all_compiled(
    archs: tuple[str, ...], one: Callable[[Path, str], tuple[Path, str]] = compiled
) -> dict[str, dict[str, tuple[Path, str]]]:
    """Architecture -> file -> machine code and ptxas output; as many compilers as there are cores."""
    files = sorted(CSRC.glob("*.cu"), key=lambda path: -path.stat().st_size)  # largest first
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = {(arch, f.name): pool.submit(one, f, arch) for f in files for arch in archs}
        return {arch: {f.name: found[arch, f.name].result() for f in files} for arch in archs}


def template(symbol: str) -> str:
    """`walk_kernel` of a mangled name: the identifier that ends in _kernel and follows its length."""
    names = re.findall(r"(\d+)([a-z_]+_kernel)", symbol)
    return next((name for length, name in names if length.endswith(str(len(name)))), symbol)


def kernels(told: str) -> list[Kernel]:
    """What ptxas says (-v) about every kernel."""
    found: list[Kernel] = []
    for line in told.splitlines():
        if (entry := _ENTRY.search(line)) is not None:
            found.append(Kernel(entry.group(1), template(entry.group(1))))
        for field, pattern in _NUMBERS.items():
            if found and (number := pattern.search(line)) is not None:
                setattr(found[-1], field, int(number.group(1)))
    return found


def instructions(cubin: Path, *words: str) -> dict[str, dict[str, int]]:
    """Symbol -> instruction -> how often the machine code has it."""
    counts: dict[str, dict[str, int]] = {}
    symbol = ""
    for line in _run([cuobjdump() or "", "-sass", cubin]).splitlines():
        if (function := re.search(r"Function : (\S+)", line)) is not None:
            symbol = function.group(1)
            counts[symbol] = dict.fromkeys(words, 0)
        for word in words:
            if f" {word}" in line and symbol:
                counts[symbol][word] += 1
    return counts


def check_bindings(every: bool) -> list[Path]:
    """Checks the syntax of the bindings as nvcc's host compiler sees them: with CUDA's headers, and against
    the PyTorch that is installed, whatever its build. Returns the files: all, each on its own, or those with
    text that the emulator never compiles, after one another, so that PyTorch's headers are read once."""
    from torch.utils.cpp_extension import include_paths

    home = toolkit()
    assert home is not None
    system = [*include_paths(), sysconfig.get_path("include"), str(home / "include")]
    compiler = os.environ.get("CXX", "c++").split()
    flags = ["-std=c++20", "-Wall", "-Werror", "-fsyntax-only", f"-I{CSRC}", "-DTORCH_EXTENSION_NAME=_C_cuda"]
    flags += ["-DTORCH_API_INCLUDE_EXTENSION_H", *(f"-isystem{path}" for path in system)]
    files = sorted((CSRC / "bindings").glob("*.cpp"))
    if not every:
        files = [file for file in files if _ELSE.search(file.read_text())]
    stamp = FOLDER / ("bindings.txt" if every else "emulated_bindings.txt")

    def check_all() -> None:
        checked = files
        if not every:
            checked = [FOLDER / "bindings.cpp"]
            checked[0].write_text("".join(f'#include "bindings/{file.name}"\n' for file in files))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda file: _run([*compiler, *flags, file]), checked))
        stamp.write_text(f"checked by Python {sys.version}\n")

    kept(stamp, check_all)
    return files
