# SPDX-License-Identifier: Apache-2.0
"""Runs a setup script that compiles MAX_JOBS files at the same time, where ninja is missing:
`python -m benchmarks.gpu.side_by_side setup.py build_ext --inplace`.

PyTorch's BuildExtension changes the compiler's settings from file to file, which threads would share: so
every file is compiled in a process that is forked for it.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any

Compile = Callable[..., list[str]]


def _forked(compile_one: Callable[[], object]) -> int:
    """Calls the function in a forked process; returns its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return child
    status = 1
    try:
        compile_one()
        status = 0
    except BaseException as failure:
        print(failure, file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def all_at_once(compile_files: Compile, jobs: int, error: type[Exception]) -> Compile:
    """`CCompiler.compile` with up to `jobs` files at a time; the first failure raises `error`."""

    def compile_in_parallel(self: Any, sources: Sequence[str], output_dir: str | None = None, *args: Any,
                            **options: Any) -> list[str]:  # fmt: skip
        left, running = list(sources), dict[int, str]()
        failed: list[str] = []
        while running or (left and not failed):
            while left and not failed and len(running) < jobs:
                source = left.pop(0)
                process = _forked(lambda s=source: compile_files(self, [s], output_dir, *args, **options))
                running[process] = source
            child, status = os.wait()
            if status and child in running:
                failed.append(running[child])
            running.pop(child, None)
        if failed:
            raise error(f"{failed[0]} did not compile")
        return list(self.object_filenames(sources, output_dir=output_dir or ""))

    return compile_in_parallel


def main(arguments: Sequence[str]) -> None:
    """Runs the script with its arguments."""
    importlib.import_module("setuptools")  # installs its own distutils
    compiler = importlib.import_module("distutils.ccompiler").CCompiler
    error = importlib.import_module("distutils.errors").CompileError
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    compiler.compile = all_at_once(compiler.compile, jobs, error)
    sys.argv[:] = arguments
    sys.path.insert(0, os.getcwd())
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
