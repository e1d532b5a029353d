# SPDX-License-Identifier: Apache-2.0
"""PEFT's LoRA layers on quantised weights: the library's product, and what the adapters add in one node."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as FE
from ..errors import TargetError
from ..layers.quantised import RESIDUAL, QuantisedLinear
from ._peft_layers import FusedPeft


class FusedPeftQuantised(FusedPeft, QuantisedLinear):
    """Base class of PEFT's LoRA layers whose base layer has a quantised weight.

    Merging and unmerging are PEFT's, which quantises again; `quantised_merge` decides what consolidation
    does. Where that is "residual", the layer applies the residual in all of its calls.
    """

    @classmethod
    def accelerate_(cls, module: nn.Module) -> FusedPeft:
        vars(module).setdefault("quantised_merge", None)
        vars(module).setdefault("rounding", None)
        return super().accelerate_(module)

    def release_(self) -> nn.Module:
        for name in ("quantised_merge", "rounding"):
            self.__dict__.pop(name, None)
        return super().release_()

    def _dtype_unfit(self, name: str, dtype: torch.dtype, other: torch.dtype) -> str | None:
        if dtype == other and dtype in (torch.float32, torch.float64):
            return None
        return f"adapter {name!r} is {dtype}; beside a quantised weight it is expected to be fp32"

    def _plain_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged or (self._disable_adapters and not args and not kwargs):
            return self.base_forward(x)  # the library's own forward may change the weight that it has
        y = super()._plain_forward(x, *args, **kwargs)
        return y if self.residual is None else FE.add_low_rank(y, x, [], self.residual)

    def _fused_forward(self, x: Tensor, adapter: FE.Adapter, dropout_p: float, training: bool) -> Tensor:
        return FE.add_low_rank(
            self.quantisation.product(self.storage, x),
            x,
            [adapter],
            self.residual,
            dropout_p=dropout_p,
            training=training,
            capture=self.fisher_capture,
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's own merge, of a layer without a residual."""
        self._fold_residual("merge")
        super().merge(safe_merge, adapter_names)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, as PEFT's `unload` and `merge_and_unload` take it."""
        self._fold_residual("unload")
        if merge:
            self.merge(safe_merge, adapter_names)
        base: nn.Module = self.base_layer
        return base

    @torch.no_grad()
    def _fold_residual(self, action: str) -> None:
        """The residual becomes part of the quantised weight; raises `TargetError` unless that was chosen."""
        if self.residual is None:
            return
        if self.quantised_merge != "requantise":
            raise TargetError(f"{action}: {_CANNOT}. Nothing was changed")
        self._copy(self.weight_updates(self.base_weight))
        del self._buffers[RESIDUAL]


_CANNOT = (
    "the base layer cannot hold the residual of earlier tasks, which would be lost; set "
    'layer.quantised_merge = "requantise" for all of fe.adapters(peft_model).values() and call '
    "merge_and_unload(), which rounds it into the weights"
)


def check_without_residuals(action: str, layers: Iterable[nn.Module]) -> None:
    """Raises `TargetError` when a layer has a residual, which only layers of this library apply."""
    if any(isinstance(layer, FusedPeftQuantised) and layer.residual is not None for layer in layers):
        raise TargetError(f"{action}: {_CANNOT}. Nothing was changed")
