# SPDX-License-Identifier: Apache-2.0
"""python -m launcher.mutations: plans that are broken on purpose, as JSON: whether the comparison finds
each right."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from fused_ewclora.backends import native

from . import calls, check, memory

ARCH, VERSION = "sm_90", 13010
TILES = "lora_linear fc1, r 10, bfloat16 by full"  # tensor maps, pointers with offsets, floats, integers
NUMBERS = "fisher_accumulate_ sample, bfloat16"  # a number of the call
FIELDS = ("kernel", "grid", "threads", "values", "order", "pointers", "numbers", "maps", "about")
Launch = dict[str, Any]


def grid(launch: Launch) -> None:
    launch["grid"] = (*launch["grid"][1:], launch["grid"][0])


def threads(launch: Launch) -> None:
    launch["threads"] = 32


def value(launch: Launch) -> None:
    pointers = {place for place, _ in launch["pointers"]}
    last = max(n for n, bits in enumerate(launch["values"]) if bits and n not in pointers)
    launch["values"][last] += 1


def order(launch: Launch) -> None:
    launch["order"][1], launch["order"][-3] = launch["order"][-3], launch["order"][1]


def offset(launch: Launch) -> None:
    number, (buffer, start) = launch["pointers"][-1]
    launch["pointers"][-1] = (number, (buffer, start + 2))


def buffer(launch: Launch) -> None:
    (number, _), (_, other) = launch["pointers"][-1], launch["pointers"][-2]
    launch["pointers"][-1] = (number, other)


def missing_pointer(launch: Launch) -> None:
    launch["pointers"].pop()


def number(launch: Launch) -> None:
    launch["numbers"].clear()


def in_map(place: int, change: Callable[[Any], Any]) -> Callable[[Launch], None]:
    """Changes a field of the last tensor map."""

    def changed(launch: Launch) -> None:
        if launch["maps"]:
            fields = list(launch["maps"][-1])
            fields[place] = change(fields[place])
            launch["maps"][-1] = tuple(fields)

    return changed


def half(sizes: list[int]) -> list[int]:
    return [sizes[0] // 2, *sizes[1:]]


MUTATIONS: dict[str, tuple[str, Callable[[Launch], None]]] = {
    "nothing": (TILES, lambda launch: None),
    "grid": (TILES, grid),
    "threads": (TILES, threads),
    "a value": (TILES, value),
    "order": (TILES, order),
    "an offset": (TILES, offset),
    "a buffer": (TILES, buffer),
    "a missing pointer": (TILES, missing_pointer),
    "a number": (NUMBERS, number),
    "map, type": (TILES, in_map(0, lambda kind: 6)),
    "map, swizzle": (TILES, in_map(1, lambda swizzle: 0)),
    "map, fill": (TILES, in_map(2, lambda fill: 1 - fill)),
    "map, element size": (TILES, in_map(3, lambda size: 256 * size)),  # no longer a small tensor
    "map, sizes": (TILES, in_map(4, half)),
    "map, strides": (TILES, in_map(5, lambda strides: [2 * strides[0], *strides[1:]])),
    "map, box": (TILES, in_map(6, half)),
    "map, place": (TILES, in_map(7, lambda place: (place[0], place[1] + 16))),
}


def main() -> None:
    extension: Any = native.extension()
    plain = extension.Plan
    listed = {call.name: call for call in calls.host_calls(ARCH, [torch.bfloat16], [10])}
    found = {}
    for name, (case, change) in MUTATIONS.items():

        class Broken(plain):  # type: ignore[misc,valid-type]
            def launch(self, *fields: Any, change: Callable[[Launch], None] = change) -> None:
                launch = dict(zip(FIELDS, fields, strict=True))
                change(launch)
                super().launch(*launch.values())

        extension.Plan = Broken
        try:
            found[name] = check.compared(listed[case], ARCH, VERSION)["right"]
        except Exception as error:  # the driver refuses it
            found[name] = type(error).__name__ != "BackendError" and repr(error)
    extension.Plan = plain
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    memory.preload("launcher.mutations", sys.argv[1:])
    main()
