# SPDX-License-Identifier: Apache-2.0
"""Readers for the file formats of image data sets: idx (MNIST), CIFAR pickles, folders of images."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import ArgumentError

IDX_UBYTE = 0x08  # type code of unsigned bytes, the only one that image data sets use
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
CIFAR_SIDE = 32


class DataError(ArgumentError):
    """A data set is missing, truncated or not what its name says."""


def _latin1(text: str, encoding: str) -> bytes:
    """Python 3 writes bytes for Python 2 as `_codecs.encode(text, "latin1")`, the only use allowed here."""
    if encoding not in ("latin1", b"latin1"):
        raise DataError(f"pickle: expected bytes written as latin1, got encoding {encoding!r}")
    return text.encode("latin1")


# The only names that a pickle of arrays may refer to; all others, and so every way to run code, are refused.
# NumPy's two constructors of arrays are private and moved between versions: taken from a reduced array.
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = np.empty(0).__reduce__()[0]
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = np.empty(0).__reduce_ex__(5)[0]


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise DataError(
                f"pickle: expected only containers and NumPy arrays, refused {module}.{name}"
            ) from None


def restricted_unpickle(stream: BinaryIO, name: str = "pickle") -> Any:
    """Containers, numbers, strings and NumPy arrays from a pickle; anything that could run code is refused.

    Strings of Python 2 come back as bytes. Raises `DataError`, before any foreign object exists.
    """
    try:
        return _ArrayUnpickler(stream, encoding="bytes").load()
    except DataError:
        raise
    except Exception as error:  # a damaged pickle can raise almost any exception
        raise DataError(f"{name}: not a readable pickle: {type(error).__name__}: {error}") from error


def read_bytes(path: Path) -> bytes:
    """The contents of a file, decompressed if it is gzip."""
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def read_idx(path: Path) -> np.ndarray:
    """The array of an idx or idx.gz file of unsigned bytes, the format of MNIST and its relatives.

    Header: two zero bytes, a type code, the number of dimensions, then big-endian 32-bit sizes.
    """
    data = read_bytes(path)
    if len(data) < 4 or data[0] or data[1]:
        raise DataError(
            f"{path}: expected an idx file starting with two zero bytes, got {data[:4].hex() or 'nothing'}"
        )
    if data[2] != IDX_UBYTE:
        raise DataError(f"{path}: expected idx type 0x08 (unsigned bytes), got 0x{data[2]:02x}")
    header = 4 + 4 * data[3]
    if data[3] == 0 or len(data) < header:
        raise DataError(f"{path}: expected an idx header of {max(header, 8)} bytes, got {len(data)}")
    shape = struct.unpack(f">{data[3]}I", data[4:header])
    expected = header + int(np.prod(shape, dtype=object))
    if len(data) != expected:
        raise DataError(
            f"{path}: expected {expected} bytes for shape {list(shape)}, got {len(data)}: damaged"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def find_idx(root: Path, stem: str) -> Path:
    """`root/stem` or `root/stem.gz`."""
    for path in (root / stem, root / f"{stem}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{root}: expected a file {stem} or {stem}.gz, found neither")


def read_idx_pair(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images `[N, 1, H, W]` and labels `[N]`, both uint8; split is "train" or "t10k"."""
    images = read_idx(find_idx(root, f"{split}-images-idx3-ubyte"))
    labels = read_idx(find_idx(root, f"{split}-labels-idx1-ubyte"))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise DataError(
            f"{root}: {split}: expected images [N, H, W] and labels [N], "
            f"got {list(images.shape)} and {list(labels.shape)}"
        )
    return images[:, None], labels


def read_cifar100(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images `[N, 3, 32, 32]` uint8 and fine labels `[N]` of a file (`train`, `test`) of CIFAR-100."""
    content = restricted_unpickle(io.BytesIO(read_bytes(path)), str(path))
    if not isinstance(content, dict) or not {b"data", b"fine_labels"} <= content.keys():
        raise DataError(f"{path}: expected a CIFAR-100 file with entries data and fine_labels")
    data = content[b"data"]
    labels = np.asarray(content[b"fine_labels"])
    row = 3 * CIFAR_SIDE**2
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != row:
        raise DataError(
            f"{path}: data: expected uint8 [N, {row}], got {getattr(data, 'shape', type(data).__name__)}"
        )
    if labels.shape != (len(data),) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path}: fine_labels: expected {len(data)} integers, got {labels.dtype} {list(labels.shape)}"
        )
    return data.reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE), labels


def class_folders(root: Path) -> list[str]:
    """The sorted names of the folders in `root`, one per class."""
    if not root.is_dir():
        raise DataError(f"{root}: expected a folder with one folder of images per class, found none")
    names = sorted(
        entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    if not names:
        raise DataError(f"{root}: expected one folder of images per class, found no folder in it")
    return names


def read_image_folder(root: Path, classes: list[str], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images `[N, 3, size, size]` uint8 of `root/<class>/*`, scaled and cropped; labels index `classes`."""
    from PIL import Image, ImageOps

    images: list[np.ndarray] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        folder = root / name
        files = sorted(p for p in folder.glob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise DataError(
                f"{folder}: expected images ({', '.join(IMAGE_SUFFIXES)}) of class {name}, found none"
            )
        for file in files:
            try:
                with Image.open(file) as image:
                    pixels = np.asarray(ImageOps.fit(image.convert("RGB"), (size, size)))
            except (OSError, ValueError, SyntaxError) as error:
                raise DataError(f"{file}: not a readable image: {error}") from error
            images.append(pixels.transpose(2, 0, 1))
            labels.append(label)
    return np.stack(images), np.asarray(labels)
