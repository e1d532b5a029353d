# SPDX-License-Identifier: Apache-2.0
"""What two launchers hand over, made comparable: pointers into memory of a call become places in buffers."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from . import stub


@dataclass
class Buffers:
    """Memory by name: that of the call's own tensors, and what was made, in the order in which launches
    point there first."""

    given: list[tuple[int, int, str]] = field(default_factory=list)
    made: list[tuple[int, int]] = field(default_factory=list)
    seen: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Iterable[Tensor], made: Iterable[tuple[int, int]]) -> Buffers:
        """given: the call's tensors; made: address and size of what was allocated."""
        return cls([(*_extent(tensor), f"argument {n}") for n, tensor in enumerate(given)], sorted(made))

    def place(self, address: int) -> tuple[str, int] | None:
        """A buffer's name and size, and the bytes from its start; None for an address of none."""
        for start, size, name in self.given:
            if start <= address < start + size:
                return name, address - start
        for start, size in self.made:
            if start <= address < start + size:
                name = self.seen.setdefault(start, f"temporary {len(self.seen)} of {size} bytes")
                return name, address - start
        return None


def _extent(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


Parameter = Any  # bytes, a place, or a tensor map whose address is a place


def parameters(launch: stub.Launch, buffers: Buffers) -> list[Parameter]:
    """The parameters, addresses as places where they are known."""
    found: list[Parameter] = []
    for data in launch.parameters:
        if (decoded := stub.decode(data)) is not None:
            place = buffers.place(decoded.address)
            found.append((place, replace(decoded, address=0) if place else decoded, data[8:]))
            continue
        place = buffers.place(struct.unpack("<Q", data)[0]) if len(data) == 8 else None
        found.append(place or data.hex())
    return found


def _told(one: Parameter, other: Parameter) -> Parameter:
    """Without what both have."""
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other) == 3:
        return [a for a, b in zip(one, other, strict=True) if a != b]
    return one


def differences(
    expected: list[stub.Launch], expected_in: Buffers, got: list[stub.Launch], got_in: Buffers
) -> Iterator[str]:
    """In words, what of two sequences of launches is not the same."""
    names = [[launch.function for launch in launches] for launches in (expected, got)]
    if names[0] != names[1]:
        yield f"launches: expected {names[0]}, got {names[1]}"
        return
    for number, (a, b) in enumerate(zip(expected, got, strict=True)):
        where = f"launch {number}, {a.function}"
        for name in ("image", "grid", "block", "shared", "stream", "context", "attributes"):
            if (one := getattr(a, name)) != (other := getattr(b, name)):
                told = "" if name == "image" else f": expected {one}, got {other}"
                yield f"{where}: {name}{told}"
        pairs = zip(parameters(a, expected_in), parameters(b, got_in), strict=True)
        for position, (one, other) in enumerate(pairs):
            if one != other:
                yield f"{where}: parameter {position}: expected {_told(one, other)}, got {_told(other, one)}"
