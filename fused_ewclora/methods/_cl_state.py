# SPDX-License-Identifier: Apache-2.0
"""The saved tensors of `CLLoRA`, and the check of saved ones before any of them is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..layers.adapted import AdaptedLinear
from ..layers.index import adapter_refs
from ..layers.plain import own_tensors
from . import _task_adapters as parts

Layers = Mapping[str, AdaptedLinear]
PAST = (parts.PAST_A, parts.PAST_B, parts.PAST_SCALE)


def _names(shared: Layers, specific: Layers) -> list[tuple[str, AdaptedLinear, str, bool]]:
    """(name in the state, layer, name of its parameter, whether it is trained) of every tensor."""
    found = []
    for layers, more in ((shared, (parts.TEACHER,)), (specific, ("lora_scale", *PAST))):
        for ref in adapter_refs(layers):
            for name in ("lora_A", "lora_B", *more):
                trained = name in ("lora_B", "lora_scale") or (name == "lora_A" and layers is specific)
                found.append((f"{ref.key}.{name}", ref.layer, name + parts.suffix(ref.piece), trained))
    return found


def dump_tensors(shared: Layers, specific: Layers) -> dict[str, Tensor]:
    """All adapters, by the names of their Fishers."""
    tensors: dict[str, Tensor] = {}
    for key, layer, name, _ in _names(shared, specific):
        tensor = own_tensors(layer)[name]
        assert tensor is not None
        tensors[key] = tensor.detach()
    return tensors


def parse_tensors(
    tensors: Mapping[str, Any],
    config: Mapping[str, Any],
    shared: Layers,
    specific: Layers,
) -> Callable[[], None]:
    """What loads them; raises `CheckpointError` naming what does not fit."""
    new = []
    for key, layer, name, trained in _names(shared, specific):
        like, value = own_tensors(layer)[name], tensors.get(key)
        assert like is not None
        past = any(name.startswith(prefix) for prefix in PAST)
        shape = (config["tasks"], *like.shape[1:]) if past else tuple(like.shape)
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(f"state: {key}: expected a tensor of shape {list(shape)}, got {got}")
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"state: {key}: expected finite values, got NaN or Inf")
        new.append((layer, name, value.detach().to(like.device, like.dtype, copy=True), trained))

    def load() -> None:
        for layer, name, value, trained in new:
            parts.put(layer, name, value, trained)

    return load
