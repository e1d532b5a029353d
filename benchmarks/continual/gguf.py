# SPDX-License-Identifier: Apache-2.0
"""Files in the GGUF format, version 3: their values, and their tensors in the types that are read here."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_ewclora.demo.formats import DataError

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8
BLOCK = 32  # values in a block of a quantised type
STRING, ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class _Place:
    shape: tuple[int, ...]
    kind: int
    offset: int


class _Cursor:
    """Reads values from bytes one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def bytes(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise DataError(f"expected {count} bytes at {start}, found the end of the file")
        return self.data[start : self.position]

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{code}", self.bytes(count * struct.calcsize(f"<{code}")))

    def string(self) -> str:
        return self.bytes(self.numbers("Q", 1)[0]).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            (inner,), (count,) = self.numbers("I", 1), self.numbers("Q", 1)
            if inner in _NUMBERS:
                return list(self.numbers(_NUMBERS[inner], count))
            return [self.value(inner) for _ in range(count)]
        if kind not in _NUMBERS:
            raise DataError(f"expected a known type of value, got number {kind}")
        return self.numbers(_NUMBERS[kind], 1)[0]


class File:
    """The content of a file; `values` by their names. Raises `DataError` for anything else."""

    def __init__(self, data: bytes, name: str) -> None:
        self._data, self._name = data, name
        cursor = _Cursor(data)
        try:
            self.values, self._places = _header(cursor)
        except (DataError, UnicodeDecodeError) as error:
            raise DataError(f"{name}: not readable as GGUF: {error}") from error
        alignment = int(self.values.get("general.alignment", ALIGNMENT))
        self._start = -(-cursor.position // alignment) * alignment

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._places)

    def tensor(self, name: str) -> Tensor:
        """A tensor in fp32, its last dimension that of consecutive values; raises `DataError` for one that is
        not in the file, or in a type that is not read here."""
        if name not in self._places:
            raise DataError(f"{self._name}: expected a tensor {name}, found none")
        place = self._places[name]
        count = math.prod(place.shape)
        sizes = {F32: 4 * count, F16: 2 * count, Q4_1: count // BLOCK * 20, Q8_0: count // BLOCK * 34}
        if place.kind not in sizes or (place.kind in (Q4_1, Q8_0) and place.shape[-1] % BLOCK):
            raise DataError(
                f"{self._name}: {name}: expected F32, F16, Q4_1 or Q8_0 (types "
                f"{F32}, {F16}, {Q4_1}, {Q8_0}), got type {place.kind} of shape {list(place.shape)}"
            )
        start = self._start + place.offset
        data = self._data[start : start + sizes[place.kind]]
        if len(data) < sizes[place.kind]:
            raise DataError(
                f"{self._name}: {name}: expected {sizes[place.kind]} bytes, found {len(data)}: truncated"
            )
        return torch.from_numpy(_values(data, place.kind)).reshape(place.shape)


def read(path: Path) -> File:
    """A file in memory; raises `DataError`."""
    try:
        return File(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, _Place]]:
    if (magic := cursor.bytes(4)) != MAGIC:
        raise DataError(f"expected {MAGIC!r} at the beginning, got {magic!r}")
    if (version := cursor.numbers("I", 1)[0]) != VERSION:
        raise DataError(f"expected version {VERSION}, got {version}")
    tensors, pairs = cursor.numbers("Q", 2)
    values = {}
    for _ in range(pairs):
        key = cursor.string()
        values[key] = cursor.value(cursor.numbers("I", 1)[0])
    places = {}
    for _ in range(tensors):
        name = cursor.string()
        shape = cursor.numbers("Q", cursor.numbers("I", 1)[0])
        (kind,), (offset,) = cursor.numbers("I", 1), cursor.numbers("Q", 1)
        places[name] = _Place(tuple(reversed(shape)), kind, offset)
    return values, places


def _values(data: bytes, kind: int) -> np.ndarray:
    if kind in (F32, F16):
        return np.frombuffer(data, "<f4" if kind == F32 else "<f2").astype(np.float32)
    if kind == Q8_0:
        blocks = np.frombuffer(data, np.dtype([("d", "<f2"), ("q", "i1", BLOCK)]))
        return (blocks["d"].astype(np.float32)[:, None] * blocks["q"]).reshape(-1)
    blocks = np.frombuffer(data, np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", BLOCK // 2)]))
    # The first half of a block are the low four bits.
    digits = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], 1).astype(np.float32)
    scale, least = blocks["d"].astype(np.float32), blocks["m"].astype(np.float32)
    return (scale[:, None] * digits + least[:, None]).reshape(-1)
