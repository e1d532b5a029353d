"""A set of files that is replaced as a whole: whenever the writer dies, either the old set or the new one can
be read.

The manifest lists every other file with its hash. New contents are written beside the old files, as
`<name>.new`; then one rename replaces the manifest; then the new contents are renamed to their final names. A
reader takes whichever of `<name>.new` and `<name>` has the hash in the manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

MANIFEST = "ewc_config.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
STATE = "ewc_state.safetensors"
NAMES = (ADAPTER, ADAPTER_CONFIG, STATE)
PENDING = ".new"


def write_files(folder: Path, files: dict[str, bytes], config: dict[str, Any]) -> None:
    """Replace the checkpoint in `folder` by `files` (names among NAMES) and `config`; other files in the
    folder are not touched."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder or a new path, got a file")
    folder.mkdir(parents=True, exist_ok=True)
    _settle(folder)
    config = _listing(files, config)
    manifest = json.dumps({**config, "checksum": _checksum(config)}, indent=1, sort_keys=True).encode()
    try:
        for name, content in files.items():
            _write(folder / (name + PENDING), content)
        _write(folder / (MANIFEST + PENDING), manifest)
        _sync_folder(folder)
    except BaseException:
        for name in (*files, MANIFEST):
            (folder / (name + PENDING)).unlink(missing_ok=True)
        raise
    os.replace(folder / (MANIFEST + PENDING), folder / MANIFEST)  # from here on the new set is the checkpoint
    _sync_folder(folder)
    _settle(folder)


def identity(files: dict[str, bytes], config: dict[str, Any]) -> str:
    """The checksum that `write_files` stores for these contents; it identifies them."""
    return _checksum(_listing(files, config))


def identity_in(folder: Path) -> str:
    """The checksum of the checkpoint in `folder`, from its manifest; raises `CheckpointError` without one."""
    return _checksum(_read_manifest(folder))


def _listing(files: dict[str, bytes], config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "files": {name: _digest(content) for name, content in files.items()}}


def write_plain(folder: Path, files: dict[str, bytes]) -> None:
    """Write files without a manifest, each replaced by one rename."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        _write(folder / (name + PENDING), content)
    for name in files:
        os.replace(folder / (name + PENDING), folder / name)
    _sync_folder(folder)


def read_files(folder: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The contents of every file that the manifest lists, and the manifest; raises `CheckpointError` unless
    all hashes match."""
    config = _read_manifest(folder)
    return {name: _read_verified(folder, name, digest) for name, digest in config["files"].items()}, config


def _settle(folder: Path) -> None:
    """Complete the renames of a writer that died: pending contents of the present checkpoint get their final
    names."""
    try:
        digests = _read_manifest(folder)["files"]
    except CheckpointError:
        return  # there is no checkpoint to preserve
    for name in NAMES:
        final, pending = folder / name, folder / (name + PENDING)
        if name not in digests:
            final.unlink(missing_ok=True)
        elif pending.exists() and _digest(pending.read_bytes()) == digests[name]:
            os.replace(pending, final)
    _sync_folder(folder)


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
    for path in (folder / (name + PENDING), folder / name):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}. Nothing was loaded") from error
        if _digest(content) == digest:
            return content
        exists = True
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


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
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
