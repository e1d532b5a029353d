# SPDX-License-Identifier: Apache-2.0
"""A lock on a folder, which writers of files in it hold; it works between threads, processes and machines."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".fused_ewclora.lock"
HELD = LOCK + ".held"  # instead, without `flock`
LOCK_SECONDS = 300.0  # to wait for another writer; less than the limits of collectives, at which others wait
_POLL_SECONDS = 0.02
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of the folder during the block; waits for another holder up to LOCK_SECONDS, then raises
    `CheckpointError`.

    The lock is `flock` on a file, which the system releases when its holder dies. Where a system or a file
    system has no `flock`, the existence of a second file is the lock; if a holder dies, that one remains and
    somebody has to remove it.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    path = folder / LOCK
    descriptor = _flocked(path, deadline) if fcntl is not None else None
    if descriptor is None:
        path = folder / HELD
        os.close(_created(path, deadline))
    try:
        yield
    finally:
        try:
            path.unlink(missing_ok=True)  # before it is released: whoever gets it next sees that it is gone
        finally:
            if descriptor is not None:
                os.close(descriptor)


def _flocked(path: Path, deadline: float) -> int | None:
    """A descriptor of the lock file that holds its lock; None where `flock` does not work."""
    while True:
        descriptor = _opened(path, os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(path, descriptor):
                return descriptor
            os.close(descriptor)  # its last holder has removed it
            continue
        except BlockingIOError:
            os.close(descriptor)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _UNSUPPORTED:
                raise
            path.unlink(missing_ok=True)
            return None
        _wait(path, deadline, "another process is writing into the folder")


def _created(path: Path, deadline: float) -> int:
    while True:
        try:
            return _opened(path, os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            _wait(path, deadline, "another process is writing into the folder; if none is, remove this file")


def _opened(path: Path, flags: int) -> int:
    try:
        return os.open(path, os.O_RDWR | flags | _NO_FOLLOW, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise CheckpointError(
                f"{path}: expected a lock file of this library, got a symbolic link; remove it. Nothing was "
                "written"
            ) from error
        raise


def _is(path: Path, descriptor: int) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _wait(path: Path, deadline: float, reason: str) -> None:
    if time.monotonic() >= deadline:
        raise CheckpointError(
            f"{path}: waited {LOCK_SECONDS:.0f} seconds for this lock: {reason}. Nothing was written"
        )
    time.sleep(_POLL_SECONDS)
