# SPDX-License-Identifier: Apache-2.0
"""The factors of all tasks of one adapter, those of earlier tasks frozen: their parameters, and how a layer
runs them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from ..functional import Adapter
from ..layers.adapted import AdaptedLinear
from ..layers.plain import own_tensors
from ..layers.slices import AdapterSlice
from ._directions import fresh_a, suffix_of

TRAINED = ("lora_A", "lora_B")


@dataclass(frozen=True)
class Factors:
    """The parameters of one adapter after T tasks of rank r. Slices have names with their suffix,
    lora_past_A_k."""

    lora_A: Tensor  # [r, d_in], of the current task, trained
    lora_B: Tensor  # [rows, r], likewise
    lora_past_A: Tensor  # [T r, d_in], task after task
    lora_past_B: Tensor  # [rows, T r]

    @staticmethod
    def of(layer: AdaptedLinear, piece: AdapterSlice) -> Factors:
        """The factors of an adapter, looked up on every call: some `.to()` and load calls replace
        Parameters."""
        table, suffix = own_tensors(layer), suffix_of(piece)
        return Factors(*(table[name + suffix] for name in NAMES))  # type: ignore[arg-type]

    @staticmethod
    def first(lora_a: Tensor, lora_b: Tensor) -> Factors:
        """Those of the first task."""
        return Factors(lora_a, lora_b, lora_a.new_empty(0, lora_a.shape[1]), lora_b[:, :0].clone())

    def put(self, layer: AdaptedLinear, piece: AdapterSlice) -> None:
        """Make these the parameters of an adapter."""
        for name in NAMES:
            value = getattr(self, name).detach()
            parameter = nn.Parameter(value, requires_grad=name in TRAINED)
            layer.register_parameter(name + suffix_of(piece), parameter)

    @torch.no_grad()
    def frozen(self, layer: AdaptedLinear, generator: torch.Generator | None) -> Factors:
        """With the current factors behind those of earlier tasks, and new ones: A random, B zero."""
        return replace(
            self,
            lora_A=fresh_a(layer, self.lora_A, self.lora_A.shape[0], generator),
            lora_B=torch.zeros_like(self.lora_B),
            lora_past_A=torch.cat([self.lora_past_A, self.lora_A]),
            lora_past_B=torch.cat([self.lora_past_B, self.lora_B], dim=1),
        )

    def tasks(self) -> list[tuple[Tensor, Tensor]]:
        """(A, B) of every task that has ended."""
        r = self.lora_A.shape[0]
        if self.lora_past_A.shape[0] == 0:
            return []
        return list(zip(self.lora_past_A.split(r), self.lora_past_B.split(r, dim=1), strict=True))


NAMES = tuple(field.name for field in fields(Factors))


class Sum:
    """A `Composer`: the sum of B A over all tasks, stacked in one call."""

    def __init__(self, method: str) -> None:
        self.saved_by = f"state_dict() of {method}"  # see checkpoint.py

    def adapters(self, layer: AdaptedLinear) -> list[Adapter]:
        """What the layer adds to its base."""
        return [_stacked(Factors.of(layer, piece), piece) for piece in layer.adapter_slices]


def _stacked(now: Factors, piece: AdapterSlice) -> Adapter:
    if now.lora_past_A.shape[0] == 0:
        return Adapter(now.lora_A, now.lora_B, piece.scaling, piece.rows)
    lora_a = torch.cat([now.lora_past_A, now.lora_A])
    lora_b = torch.cat([now.lora_past_B, now.lora_B], dim=1)
    return Adapter(lora_a, lora_b, piece.scaling, piece.rows)
