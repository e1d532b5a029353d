# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels of the GPU check beforehand: `python -m benchmarks.gpu.cache FOLDER`.

Needs no GPU. Triton finds machine code by a key made of its own files, the kernel's source and line, types,
constants and divisibility of the arguments, options, the version of ptxas, the architecture, and some
environment variables. So a folder serves machines with the same Triton for the same version of Python (its
compiled part differs between them) and the same sources of this library; FOLDER/made-for.json says for which.
Files name each other by their absolute paths: `--install FOLDER` copies what serves this machine, and
corrects them. `--verify` launches everything through Triton with a driver that runs nothing, and counts what
it finds. Exit status 1 when a kernel does not compile, or is not found by `--verify`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fused_ewclora.backends.triton.tools import aot

from ..steps import SKIP, shown

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "TRITON_CACHE_DIR"
MADE_FOR = "made-for.json"
GROUP = "__grp__"  # begins the name of the file of an entry that lists the others
SOURCE = ".source"  # ends the name of one that nothing needs
SOURCES = (
    "kernels/*.py", "fused_ewclora/backends/*.py", "fused_ewclora/backends/triton/**/*.py",
    "fused_ewclora/backends/triton/configs/*.json", "benchmarks/*.py", "benchmarks/gpu/*.py",
)  # fmt: skip
LAUNCHERS = (3, 7)  # older versions of Triton also compile a launcher for every signature, on a GPU
LARGEST = 40 << 20  # bytes of everything
SHARED = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448}  # bytes that a block can have


def stamp(arch: str) -> str:
    """Equal where Triton makes the same keys for an architecture, as far as sources of the library agree."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import make_backend
    from triton.runtime.cache import triton_key

    variables = sorted(get_cache_invalidating_env_vars().items())
    told = f"{triton_key()} {make_backend(aot.target(arch)).hash()} {variables}"
    return hashlib.sha256(told.encode()).hexdigest()


def sources() -> str:
    """Changes with whatever decides what is launched: kernels, hosts, configurations, calls and shapes."""
    found = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            found.update(path.read_bytes())
    return found.hexdigest()


def tools() -> str:
    """Triton and Python, in words."""
    import triton

    return f"Triton {triton.__version__} of Python {'.'.join(platform.python_version_tuple()[:2])}"


def entries(folder: Path) -> list[Path]:
    """The folders of complete entries."""
    return sorted({path.parent for path in folder.glob(f"*/{GROUP}*")})


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _compiled(specialisation: aot.Specialisation) -> str | None:
    """Compiles one kernel, and on a GPU what launches it; returns why that failed, or None."""
    try:
        made = aot.compiled(specialisation)
        if torch.cuda.is_available():
            from triton.runtime.driver import driver

            driver.active.launcher_cls(made.src, made.metadata)
    except Exception as failure:  # compiler passes raise anything
        told = str(failure).strip().splitlines() or ["no message"]
        return f"{specialisation.name}: {type(failure).__name__}: {told[-1][:200]}"
    return None


def _one_by_one(notes: Sequence[aot.Specialisation], end: float) -> Iterator[str | None]:
    for one in notes:
        if time.monotonic() > end:
            return
        yield _compiled(one)


def _side_by_side(notes: Sequence[aot.Specialisation], processes: int, end: float) -> Iterator[str | None]:
    """In new processes, which on a GPU can use it; those that are not done at the end are ended."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
        waiting = [pool.submit(_compiled, one) for one in notes]
        try:
            for done in concurrent.futures.as_completed(waiting, end - time.monotonic()):
                yield done.result()
        except concurrent.futures.TimeoutError:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()


def fill(
    notes: Sequence[aot.Specialisation], folder: Path, processes: int, budget: float
) -> tuple[int, list[str]]:
    """Compiles what the folder lacks within `budget` seconds; returns how many were reached, and errors."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {FOLDER: str(folder.resolve()), "TRITON_STORE_BINARY_ONLY": "1"}  # of the processes too
    end = time.monotonic() + budget
    one_by_one = processes == 1
    results = list(_one_by_one(notes, end) if one_by_one else _side_by_side(notes, processes, end))
    return len(results), [error for error in results if error is not None]


def finish(folder: Path, archs: Sequence[str], whole: bool) -> dict[str, Any]:
    """Leaves out what nothing needs, and writes what the folder is for; `whole`: it has everything that
    these sources launch."""
    for path in folder.glob(f"*/*{SOURCE}"):
        path.unlink()
    made = {
        "tools": tools(),
        "stamps": {arch: stamp(arch) for arch in archs},
        "sources": sources() if whole else "",
        "entries": len(entries(folder)),
        "bytes": size(folder),
    }
    (folder / MADE_FOR).write_text(json.dumps(made, indent=1) + "\n")
    return made


def install(folder: Path, target: Path, arch: str) -> str:
    """Copies the entries to `target`, unless they are for another Triton; returns what was done, in words."""
    try:
        made = json.loads((folder / MADE_FOR).read_text())
    except (OSError, ValueError):
        return f"no kernels were compiled beforehand ({folder} is missing, see make gpu-cache)"
    if made["stamps"].get(arch) != stamp(arch):
        archs = ", ".join(made["stamps"])
        return f"{folder} is of no use: made by {made['tools']} for {archs}, here are {tools()} and {arch}"
    for source in entries(folder):
        place = target.resolve() / source.name
        if not any(place.glob(f"{GROUP}*")):
            _copied(source, place)
    return f"{made['entries']} kernels were compiled beforehand"


def _copied(source: Path, place: Path) -> None:
    """Copies an entry; the list of its files, which makes it complete, comes last."""
    place.mkdir(parents=True, exist_ok=True)
    files = [path for path in source.iterdir() if path.is_file()]
    for path in sorted(files, key=lambda path: path.name.startswith(GROUP)):
        if not path.name.startswith(GROUP):
            shutil.copyfile(path, place / path.name)
            continue
        listed = json.loads(path.read_text())
        listed["child_paths"] = {
            name: str(place / name) for name in listed["child_paths"] if (source / name).exists()
        }
        (place / path.name).write_text(json.dumps(listed))


class NoDevice:
    """A driver for Triton that has the properties of an architecture and runs nothing."""

    def __init__(self, arch: str) -> None:
        self.arch, self.utils, self.launches = arch, self, 0

    def get_current_target(self) -> Any:
        return aot.target(self.arch)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[self.arch]}

    def load_binary(self, *_: Any) -> tuple[Any, ...]:
        return object(), object(), 0, 0, 1024

    def launcher_cls(self, *_: Any) -> Any:
        def launched(*_: Any) -> None:
            self.launches += 1

        return launched


def verify(folder: Path, arch: str, parts: Sequence[str]) -> int:
    """Launches everything as a GPU would, from a copy of the folder; returns the exit status."""
    from triton import knobs
    from triton.runtime.driver import driver
    from triton.runtime.errors import OutOfResources

    from . import launches

    found: list[bool] = []
    too_large = 0
    with tempfile.TemporaryDirectory() as copy:
        said = install(folder, Path(copy), arch)
        os.environ[FOLDER] = copy
        noted = list(launches.noted(arch, parts).launches.values())
        for one in noted:
            one.kernel.device_caches.clear()  # of what an earlier driver launched
        knobs.compilation.listener = lambda *, cache_hit, **_: found.append(cache_hit)
        stub = NoDevice(arch)
        driver.set_active(stub)
        for one in noted:
            try:
                one.kernel[one.grid](*one.arguments, **one.options)
            except OutOfResources:  # of candidates of the tuning, which refuses them
                too_large += 1
            if not found[-1]:
                print(f"not found: {one.kernel.__name__}, {one.options}")
    print(
        f"{arch}: {said}; {found.count(True)} of {len(found)} launches find theirs, "
        f"{too_large} need more shared memory than there is"
    )
    return int(not all(found) or stub.launches + too_large != len(noted))


def of_device() -> str | None:
    """The architecture of this machine's GPU, asked for in another process: those that are started here must
    find the GPU untouched."""
    code = "import torch; from fused_ewclora.backends.candidate import arch_of; "
    code += "print(arch_of(torch.device('cuda', 0)) if torch.cuda.is_available() else '')"
    status, lines = shown([sys.executable, "-c", code], {}, ROOT, 60.0)
    return lines[-1] if status == 0 and lines and lines[-1] else None


def complete(folder: Path, arch: str) -> bool:
    """Whether a folder has all that the check launches here, so that nothing is left to compile."""
    import triton

    try:
        made = json.loads((folder / MADE_FOR).read_text())
    except (OSError, ValueError):
        return False
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return version >= LAUNCHERS and made["sources"] == sources() and made["stamps"].get(arch) == stamp(arch)


def on_device(folder: Path, parts: Sequence[str], processes: int, budget: float) -> int:
    """Before a check: takes over what was compiled beforehand and compiles the rest, on all cores."""
    from . import launches

    begin = time.monotonic()
    if (arch := of_device()) is None:
        print("no CUDA device")
        return SKIP
    target = Path(os.environ.get(FOLDER) or ROOT / "build" / "gpu-kernels")
    said = install(folder, target, arch)
    if complete(folder, arch):
        print(f"{said}, all that is launched")
        return 0
    before = len(entries(target))
    notes = launches.noted(arch, parts)
    left = budget - (time.monotonic() - begin)
    reached, errors = fill(list(notes.specialisations.values()), target, processes, max(left, 1.0))
    print(*notes.complaints, *errors, sep="\n")
    unreached = len(notes.specialisations) - reached
    print(
        f"{said}, {len(entries(target)) - before} now" + (f", {unreached} not reached" if unreached else "")
    )
    return 0


def make(folder: Path, archs: Sequence[str], parts: Sequence[str], processes: int) -> int:
    """Fills the folder for the architectures and verifies it; returns the exit status."""
    from . import launches

    status = 0
    for arch in archs:
        begin, notes = time.monotonic(), launches.noted(arch, parts)
        reached, errors = fill(list(notes.specialisations.values()), folder, processes, 1e6)
        print(*notes.complaints, *errors, sep="\n")
        print(f"{arch}: {reached} kernels, {len(errors)} do not compile, {time.monotonic() - begin:.0f} s")
        status |= bool(notes.complaints)
    made = finish(folder, archs, not parts and not status)
    for arch in archs:
        command = [sys.executable, "-m", "benchmarks.gpu.cache", str(folder), "--arch", arch, "--verify"]
        status |= shown([*command, *(["--parts", *parts] if parts else [])], {}, ROOT)[0]
    megabytes = made["bytes"] / 2**20
    print(f"{folder}: {made['entries']} entries, {megabytes:.1f} MB, for {made['tools']}: {', '.join(archs)}")
    if made["bytes"] > LARGEST:
        print(f"larger than {LARGEST >> 20} MB: leave out parts or architectures")
        return 1
    return int(status != 0)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.cache", description=__doc__)
    parser.add_argument("folder", type=Path, help="of what is compiled beforehand")
    parser.add_argument("--arch", nargs="+", default=["sm_90"], choices=tuple(SHARED), help="of GPUs")
    parser.add_argument("--parts", nargs="*", default=[], help="of the check; all of them without")
    parser.add_argument("--processes", type=int, default=cores, help="of the compiler, at a time")
    parser.add_argument("--verify", action="store_true", help="only count what is found")
    parser.add_argument(
        "--install", action="store_true", help=f"for this GPU, into ${FOLDER}; compile the rest"
    )
    parser.add_argument("--budget", type=float, default=600.0, help="seconds of --install")
    parser.add_argument("--rehearse", action="store_true", help="compile nothing")
    args = parser.parse_args(argv)
    args.folder = args.folder.resolve()
    return args


def main() -> int:
    """Entry point."""
    args = arguments()
    if args.rehearse:
        print("a rehearsal interprets kernels")
        return SKIP
    if args.verify:
        return max(verify(args.folder, arch, args.parts) for arch in args.arch)
    if args.install:
        return on_device(args.folder, args.parts, args.processes, args.budget)
    return make(args.folder, args.arch, args.parts, args.processes)


if __name__ == "__main__":
    raise SystemExit(main())
