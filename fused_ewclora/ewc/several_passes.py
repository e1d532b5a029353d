# SPDX-License-Identifier: Apache-2.0
"""A Fisher gathered in several passes over the same data, each for a group of layers, to need less memory."""

from __future__ import annotations

import functools
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..errors import ArgumentError, FisherError
from ..layers.adapted import AdaptedLinear
from .placement import Placement, sums_dtype
from .state import TaskFisher
from .structures import Structure

Layers = dict[str, AdaptedLinear]


def bytes_of_sums(placement: Placement, structure: Structure, layer: AdaptedLinear) -> int:
    """What the sums of a task take for one layer, in the process that holds most of them."""
    shapes = [
        shape
        for piece in layer.adapter_slices
        for shape in structure.sum_shapes(
            placement.largest_extent(piece.row_count, layer.in_features)
        ).values()
    ]
    return sum(map(math.prod, shapes)) * sums_dtype(layer).itemsize


def groups(placement: Placement, structure: Structure, max_bytes: int) -> list[Layers]:
    """Consecutive layers whose sums take at most max_bytes together; raises `ArgumentError` where those of
    one layer take more."""
    if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 1:
        raise ArgumentError(f"max_bytes: expected an integer >= 1 or None, got {max_bytes!r}")
    needed = {name: bytes_of_sums(placement, structure, layer) for name, layer in placement.layers.items()}
    largest = max(needed, key=needed.__getitem__)
    if needed[largest] > max_bytes:
        raise ArgumentError(
            f"max_bytes: expected at least {needed[largest]}, which the sums of {largest} take, got "
            f"{max_bytes}"
        )
    found: list[Layers] = []
    left = 0
    for name, layer in placement.layers.items():
        if not found or needed[name] > left:
            found.append({})
            left = max_bytes
        found[-1][name] = layer
        left -= needed[name]
    return found


def check_repeatable(loader: Any) -> None:
    """Raises `ArgumentError` for what can be passed over once."""
    if isinstance(loader, Iterator):
        raise ArgumentError(
            "loader: expected batches that can be passed over several times, as max_bytes does, got the "
            f"iterator {type(loader).__name__}; give a list or a DataLoader"
        )


class Rewind:
    """Called, it puts the random numbers back to where they were when it was made: a loader that shuffles
    gives the same batches once more, and labels that are sampled are the same."""

    def __init__(self, placement: Placement, loader: Any, generator: torch.Generator | None) -> None:
        holders = (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
        found = [generator, *(getattr(holder, "generator", None) for holder in holders)]
        self._steps = [_put_back(g.get_state, g.set_state) for g in found if isinstance(g, torch.Generator)]
        self._steps += [
            _put_back(torch.get_rng_state, torch.set_rng_state),
            _put_back(random.getstate, random.setstate),
        ]
        if (numpy := sys.modules.get("numpy")) is not None:
            self._steps.append(_put_back(numpy.random.get_state, numpy.random.set_state))
        devices = {layer.weight.device for layer in placement.layers.values()}
        for device in (device for device in devices if device.type == "cuda"):
            get = functools.partial(torch.cuda.get_rng_state, device)
            put = functools.partial(torch.cuda.set_rng_state, device=device)
            self._steps.append(_put_back(get, put))

    def __call__(self) -> None:
        for step in self._steps:
            step()


def _put_back(get: Callable[[], Any], put: Callable[[Any], Any]) -> Callable[[], None]:
    state = get()
    return lambda: put(state)


def joined(passes: Sequence[TaskFisher]) -> TaskFisher:
    """The Fishers of all groups as those of one pass; raises `FisherError` unless all passes have seen as
    many samples."""
    first = passes[0]
    for number, other in enumerate(passes[1:], 2):
        if (other.samples, other.batch_size) != (first.samples, first.batch_size):
            raise FisherError(
                f"loader: pass {number} of {len(passes)} saw {other.samples} samples in batches of up to "
                f"{other.batch_size}, the first {first.samples} in batches of up to {first.batch_size}; with "
                "max_bytes it has to give the same batches every time. What the passes gathered was discarded"
            )
    buffers = {key: tensor for one in passes for key, tensor in one.buffers.items()}
    return TaskFisher(buffers, first.samples, first.batch_size, first.labels, first.packed)
