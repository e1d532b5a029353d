# SPDX-License-Identifier: Apache-2.0
"""A set of files that is replaced as a whole: whenever a writer dies, and whoever else reads or writes,
either the old set or the new one can be read.

The manifest lists every other file with its hash. New contents are written beside the old files, as
`<name>.<first digits of the hash>.new`; then one rename replaces the manifest; then the new contents are
renamed to their final names. A reader takes whichever of these has the hash in the manifest, and starts again
if the manifest was replaced meanwhile. Writers wait for each other (`lock`). Every file is written under a
random name, which must not exist, and then renamed, so that links which somebody has put there are replaced
and not followed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .lock import locked

_log = logging.getLogger(__name__)
MANIFEST = "ewc_config.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
STATE = "ewc_state.safetensors"
NAMES = (ADAPTER, ADAPTER_CONFIG, STATE)
PENDING = ".new"
_TEMPORARY = re.compile(
    rf"({'|'.join(map(re.escape, (*NAMES, MANIFEST)))})"
    r"(\.new|\.[0-9a-f]{16}\.new|(\.[0-9a-f]{16}\.new)?\.[0-9a-f]{16}\.tmp)"  # \.new: of earlier versions
)
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def write_files(folder: Path, files: dict[str, bytes], config: dict[str, Any]) -> None:
    """Replace the checkpoint in `folder` by `files` (names among NAMES) and `config`; other files in the
    folder are not touched. Raises `CheckpointError` when another writer holds the folder for too long."""
    _make_folder(folder)
    config = _listing(files, config)
    manifest = json.dumps({**config, "checksum": _checksum(config)}, indent=1, sort_keys=True).encode()
    with locked(folder):
        _settle(folder)
        pending = [folder / _pending(name, config["files"][name]) for name in files]
        try:
            for path, content in zip(pending, files.values(), strict=True):
                _replace(path, content)
            written = _beside(folder / MANIFEST)
            pending.append(written)
            _write(written, manifest)
            _sync_folder(folder)
        except BaseException:
            for path in pending:
                path.unlink(missing_ok=True)
            raise
        os.replace(written, folder / MANIFEST)  # from here on the new set is the checkpoint
        _sync_folder(folder)
        _settle(folder)
    _log_written(folder, files)


def _make_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder or a new path, got a file")
    folder.mkdir(parents=True, exist_ok=True)


def _pending(name: str, digest: str) -> str:
    return f"{name}.{digest[:16]}{PENDING}"


def identity(files: dict[str, bytes], config: dict[str, Any]) -> str:
    """The checksum that `write_files` stores for these contents; it identifies them."""
    return _checksum(_listing(files, config))


def identity_in(folder: Path) -> str:
    """The checksum of the checkpoint in `folder`, from its manifest; raises `CheckpointError` without one."""
    return _checksum(_read_manifest(folder))


def _listing(files: dict[str, bytes], config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "files": {name: _digest(content) for name, content in files.items()}}


def write_plain(folder: Path, files: dict[str, bytes]) -> None:
    """Write files without a manifest, each replaced by one rename; a reader may find some of them new and
    others old. Raises `CheckpointError` where they would replace files of a checkpoint."""
    _make_folder(folder)
    with locked(folder):
        if (folder / MANIFEST).exists() and not set(files).isdisjoint(NAMES):
            raise CheckpointError(
                f"{folder}: expected a folder without a checkpoint of save_pretrained, which would no longer "
                f"load; write to another folder, or remove {MANIFEST}. Nothing was written"
            )
        for name, content in files.items():
            _replace(folder / name, content)
        _sync_folder(folder)
    _log_written(folder, files)


def _log_written(folder: Path, files: dict[str, bytes]) -> None:
    listing = ", ".join(f"{name} ({len(content)} bytes)" for name, content in files.items())
    _log.info("wrote to %s: %s", folder, listing)


def read_files(folder: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The contents of every file that the manifest lists, and the manifest; raises `CheckpointError` unless
    all hashes match."""
    while True:
        before = _version(folder)
        try:
            config = _read_manifest(folder)
            listed = config["files"].items()
            return {name: _read_verified(folder, name, digest) for name, digest in listed}, config
        except CheckpointError:
            if before is None or _version(folder) == before:
                raise
            # A writer has replaced the checkpoint meanwhile.


def _version(folder: Path) -> tuple[int, int] | None:
    """What distinguishes the present manifest file from those that replace it; None without one."""
    try:
        found = os.stat(folder / MANIFEST)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _settle(folder: Path) -> None:
    """Complete the renames of a writer that died, and remove its other files: pending contents of the present
    checkpoint get their final names."""
    try:
        digests = _read_manifest(folder)["files"]
    except CheckpointError:
        return  # there is no checkpoint to preserve
    for name in NAMES:
        if name not in digests:
            (folder / name).unlink(missing_ok=True)
            continue
        for pending in _pending_paths(folder, name, digests[name]):
            content = _read_regular(pending)
            if content is not None and _digest(content) == digests[name]:
                os.replace(pending, folder / name)
                break
    for path in _leftovers(folder):
        path.unlink(missing_ok=True)
    _sync_folder(folder)


def _pending_paths(folder: Path, name: str, digest: str) -> list[Path]:
    return [folder / _pending(name, digest), folder / (name + PENDING)]  # the latter of earlier versions


def _read_regular(path: Path) -> bytes | None:
    """The contents of a file that is no link, or None."""
    try:
        with open(os.open(path, os.O_RDONLY | _NO_FOLLOW), "rb") as file:
            return file.read()
    except OSError:
        return None


def _leftovers(folder: Path) -> list[Path]:
    """Temporary files, which no writer but the holder of the lock has any use for."""
    return [
        path
        for path in folder.iterdir()
        if _TEMPORARY.fullmatch(path.name) and (path.is_symlink() or not path.is_dir())
    ]


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: expected the folder of a checkpoint, found none; nothing was loaded"
        )
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing; expected a checkpoint of save_pretrained (plain PEFT folders load with "
            "import_peft). Nothing was loaded"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected JSON, got {type(error).__name__}: {error}. {_REMEDY}"
        ) from error
    files = config.pop("files", None) if isinstance(config, dict) else None
    if not isinstance(files, dict) or not all(k in NAMES and isinstance(v, str) for k, v in files.items()):
        raise CheckpointError(
            f"{path}: expected the manifest of a checkpoint with a list of files. {_REMEDY}"
        )
    checksum = config.pop("checksum", None)
    config["files"] = files
    try:
        right = checksum == _checksum(config)
    except RecursionError:  # the JSON reader allows slightly deeper nesting than the writer
        right = False
    if not right:
        raise CheckpointError(f"{path}: its checksum does not match its contents. {_REMEDY}")
    return config


def _read_verified(folder: Path, name: str, digest: str) -> bytes:
    exists = False
    for pending in _pending_paths(folder, name, digest):
        content = _read_regular(pending)
        if content is not None and _digest(content) == digest:
            return content
        exists = exists or content is not None
    try:
        content = (folder / name).read_bytes()
    except FileNotFoundError:
        content = None
    except OSError as error:
        raise CheckpointError(f"{folder / name}: cannot be read: {error}. Nothing was loaded") from error
    if content is not None and _digest(content) == digest:
        return content
    exists = exists or content is not None
    problem = (
        "its hash is not the one in ewc_config.json: it is truncated, corrupted or from another checkpoint"
        if exists
        else "missing"
    )
    raise CheckpointError(f"{folder / name}: {problem}. {_REMEDY}")


_REMEDY = "Nothing was loaded; copy the folder again from its source, or use an earlier checkpoint"


def _checksum(config: dict[str, Any]) -> str:
    return _digest(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _replace(path: Path, content: bytes) -> None:
    """Replace one file, or a link in its place, by a new file."""
    temporary = _beside(path)
    try:
        _write(temporary, content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")


def _write(path: Path, content: bytes) -> None:
    """Write a file that must not exist yet."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o666)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make renames durable; on systems that cannot open folders the rename alone must suffice."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
