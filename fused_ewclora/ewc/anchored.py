# SPDX-License-Identifier: Apache-2.0
"""EWC for adapters that are kept from task to task: the penalty acts on their change since the last task
ended, and nothing is folded into the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch

from ..distributed.transaction import Transaction
from ..errors import ArgumentError, TargetError
from ..fishers import Fisher
from ..functional import Adapter
from ..layers.adapted import AdaptedLinear, Updates
from ..layers.index import Operands, check_present
from .controller import EWC
from .placement import LocalPlacement, check_ready


class _Changing(Protocol):
    """A composer that can tell what its adapters have added since the last task ended."""

    def changes(self, layer: AdaptedLinear) -> list[Adapter]: ...


class AnchoredPlacement(LocalPlacement):
    """`Placement` of adapters that stay as they are at the end of a task."""

    def check_foldable(self, action: str) -> None:
        check_ready(self.layers, action)

    def operands(self, fishers: Mapping[str, Fisher]) -> Operands:
        """Those of the penalty on Delta - Delta_0."""
        check_present(self.refs)
        changes: list[Adapter] = []
        for layer in self.layers.values():
            changes += cast(_Changing, layer.composer).changes(layer)
        return (
            list(fishers.values()),
            [adapter.lora_a for adapter in changes],
            [adapter.lora_b for adapter in changes],
            [adapter.scale for adapter in changes],
        )

    def new_weights(self) -> dict[str, Updates]:
        return {}

    def reset_adapters(self, change: Transaction, generator: torch.Generator | None) -> None:
        pass  # the method starts a new adapter


class AnchoredEWC(EWC):
    """(lambda/2) sum F (Delta - Delta_0)^2, with Delta the sum that the adapters add, and Delta_0 its value
    when the last task ended.

    `changes` of a layer's composer gives Delta - Delta_0 as adapters. `consolidate` updates only F; the
    method itself sets Delta_0. Arguments and errors are those of `EWC`, without merge_mode.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        if "merge_mode" in settings:
            raise ArgumentError("merge_mode: expected none, nothing is merged between tasks")
        super().__init__(*args, **settings)
        self.refresh()

    def refresh(self) -> None:
        """To be called after ranks have changed."""
        self._placement = AnchoredPlacement(self.model, self.layers)

    def shard_(self, mesh: Any = None) -> None:
        """Raises `TargetError`: composed adapters cannot be sharded."""
        raise TargetError("shard_: expected adapters of lora_A and lora_B alone, got stacked directions")
