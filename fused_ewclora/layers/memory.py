# SPDX-License-Identifier: Apache-2.0
"""The memory of weights: which other tensors share it, and whether it holds any numbers at all."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..distributed.processes import is_dtensor
from ..errors import TargetError
from .adapted import LIVING, AdaptedLinear
from .matching import shorten

Weights = Mapping[str, tuple[str, Tensor]]  # name of a layer -> name of its weight, and the weight
OTHER_MODEL = "the weight of an adapted layer of another model"


@dataclass(frozen=True)
class _Place:
    """The elements of a tensor inside of a storage: a range, and the columns in it where rows are cut."""

    storage: int
    start: int
    stop: int
    row: int = 0  # length of a row of the storage, 0 if the rows are whole or unknown
    columns: tuple[int, int] = (0, 0)

    def meets(self, other: _Place) -> bool:
        """Whether the two have elements in common; other strided views count by their range."""
        if self.storage != other.storage or self.stop <= other.start or other.stop <= self.start:
            return False
        if not self.row or self.row != other.row:
            return True
        return self.columns[0] < other.columns[1] and other.columns[0] < self.columns[1]


def _place(tensor: Tensor) -> _Place:
    """Where a tensor is; the place of one without memory (on meta, sharded elsewhere) is its own."""
    own = _Place(-id(tensor), 0, 1)  # not of the local part, which lives no longer than this call
    tensor = tensor.detach().to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    try:
        pointer = tensor.untyped_storage().data_ptr() if tensor.numel() else 0
    except (RuntimeError, NotImplementedError):  # subclasses without a storage of their own
        pointer = 0
    if not pointer:
        return own
    size, first = tensor.element_size(), int(tensor.storage_offset())
    sides = list(zip(tensor.shape, tensor.stride(), strict=True))
    start, stop = first * size, (first + 1 + sum((n - 1) * stride for n, stride in sides)) * size
    if len(sides) == 2:
        (_, along), (width, inner) = sorted(sides, key=lambda side: -side[1])
        column = first % along if along else 0
        if inner == 1 and column + width <= along:
            return _Place(pointer, start, stop, along * size, (column * size, (column + width) * size))
    return _Place(pointer, start, stop)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by all of their names."""
    for name, module in model.named_modules():
        for leaf, tensor in itertools.chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None:
                yield f"{name}.{leaf}".lstrip("."), tensor


def weights_of(layers: Mapping[str, AdaptedLinear]) -> Weights:
    """The weights of adapted layers, as `shared_weights` takes them."""
    return {name: (layer.weight_name(name), layer.weight) for name, layer in layers.items()}


def shared_weights(model: nn.Module, weights: Weights) -> dict[str, str]:
    """The layers whose weight is also another parameter or buffer, or has elements in common with one: name
    -> a sentence. `model` is searched, and the adapted layers of other models."""
    own = {name: (path, weight, _place(weight)) for name, (path, weight) in weights.items()}
    storages = {place.storage for _, _, place in own.values()}
    others = [(name, tensor, _place(tensor)) for name, tensor in _tensors(model)]
    others = [entry for entry in others if entry[2].storage in storages]
    others += [(OTHER_MODEL, tensor, place) for tensor, place in _elsewhere(model, storages)]
    shared = {}
    for name, (path, weight, place) in own.items():
        users = [(user, tensor) for user, tensor, there in others if user != path and place.meets(there)]
        if same := [user for user, tensor in users if tensor is weight]:
            shared[name] = f"the weight of {name!r} is also {shorten(dict.fromkeys(same))}"
        elif users:
            rest = shorten(dict.fromkeys(user for user, _ in users))
            shared[name] = f"the weight of {name!r} shares its memory with {rest}"
    return shared


def _elsewhere(model: nn.Module, storages: Iterable[int]) -> list[tuple[Tensor, _Place]]:
    """The weights of adapted layers outside of the model, in these storages."""
    inside = set(model.modules())

    def found() -> list[tuple[Tensor, _Place]]:
        layers = [layer for layer in LIVING if isinstance(layer, AdaptedLinear) and layer not in inside]
        weights = [(layer.weight, _place(layer.weight)) for layer in layers]
        return [entry for entry in weights if entry[1].storage in storages]

    if found():
        gc.collect()  # a model that nothing uses any more shares nothing
    return found()


def check_loaded(model: nn.Module, weights: Weights) -> None:
    """Raises `TargetError` for a layer whose weight is on the meta device although the model runs: its
    numbers are elsewhere, and come only for the time of a call. A model that is on meta as a whole is not
    loaded yet, and may get adapters before."""
    on_meta = [name for name, (_, weight) in weights.items() if weight.is_meta]
    if not on_meta:
        return
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    if hooked or not all(parameter.is_meta for parameter in model.parameters()):
        raise TargetError(
            f"{on_meta[0]}: its weight is on the meta device while the rest of the model is not: it is "
            f"offloaded (accelerate, device_map), or was not loaded ({len(on_meta)} such layers); load the "
            "whole model onto devices before inject, or leave the layer out with exclude_modules. Nothing "
            "was changed"
        )
