"""The adapters of a model one by one, and the rows of a weight that belong to one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapted import AdaptedLinear
from .config import Rows
from .slices import AdapterSlice, fisher_key


@dataclass(frozen=True)
class Slot:
    """One adapter of one layer, as the Fisher key names it."""

    key: str
    layer: AdaptedLinear
    piece: AdapterSlice
    index: int  # of the piece in layer.adapter_parameters()

    def factors(self) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B."""
        return self.layer.adapter_parameters()[self.index][1:]


def take_rows(weight: Tensor, rows: Rows) -> Tensor:
    """The rows of an adapter, in its order: a new `[sum of lengths, d_in]`."""
    return torch.cat([weight.detach()[start:stop] for start, stop in rows])


def put_rows(weight: Tensor, rows: Rows, values: Tensor) -> None:
    """The reverse of `take_rows`, in place."""
    done = 0
    for start, stop in rows:
        weight[start:stop] = values[done : done + stop - start]
        done += stop - start


def slots_of(layers: Mapping[str, AdaptedLinear]) -> list[Slot]:
    """Every adapter of every layer, in order."""
    return [
        Slot(fisher_key(name, piece), layer, piece, index)
        for name, layer in layers.items()
        for index, piece in enumerate(layer.adapter_slices)
    ]
