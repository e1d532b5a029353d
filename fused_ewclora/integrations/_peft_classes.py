# SPDX-License-Identifier: Apache-2.0
"""The class that a layer of PEFT becomes."""

from __future__ import annotations

from typing import Any

from torch import nn

from ._peft_convs import FusedPeftConv1d, FusedPeftConv2d
from ._peft_layers import FusedPeft, FusedPeftLinear


def fused_class(layer: nn.Module) -> type[FusedPeft] | None:
    """The class that a layer of PEFT becomes, or None."""
    if isinstance(layer, FusedPeft):
        return type(layer)
    kind = type(layer)
    fused: tuple[type[FusedPeft], ...] = (FusedPeftLinear, FusedPeftConv2d, FusedPeftConv1d)
    known: dict[type[Any], type[FusedPeft]] = {one.plain: one for one in fused}
    # These load the library of the weights, which a model with such layers has loaded.
    if kind.__module__ == "peft.tuners.lora.bnb":
        from . import _peft_bitsandbytes

        known |= _peft_bitsandbytes.CLASSES
    elif kind.__module__ == "peft.tuners.lora.torchao":
        from . import _peft_torchao

        known |= _peft_torchao.CLASSES
    return known.get(kind)
