# SPDX-License-Identifier: Apache-2.0
"""The adapters that a method starts with: which it refuses, and that a refused model stays as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from ..errors import EWCLoRAError, TargetError
from ..layers.adapted import AdaptedLinear
from ..layers.inject import adapters, eject


@contextmanager
def ejected_on_error(model: nn.Module) -> Iterator[None]:
    """Around the constructor of a method: an error in it leaves a model that had no adapters without any."""
    plain = not adapters(model)
    try:
        yield
    except EWCLoRAError:
        if plain and adapters(model):
            eject(model, merge=False)
        raise


def check_uncomposed(layers: Mapping[str, AdaptedLinear]) -> None:
    """Raises `TargetError` for layers that compute with what a method makes of their adapters."""
    for name, layer in layers.items():
        if layer.composer is not None:
            raise TargetError(
                f"{name}: expected plain adapters, got those of another method; eject the model first"
            )


def check_plain_adapters(layers: Mapping[str, AdaptedLinear]) -> None:
    """Raises `TargetError` also for layers that do not own their adapters or have learned scales."""
    check_uncomposed(layers)
    for name, layer in layers.items():
        for piece in layer.adapter_slices:
            (table, _), _ = layer.parameter_locations(piece)
            if table is not layer._parameters:
                raise TargetError(f"{name}: expected adapters of fe.inject, got those of another library")
            if piece.scale_name in table:
                raise TargetError(f"{name}: expected adapters without learned scales, got {piece.scale_name}")
