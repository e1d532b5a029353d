# SPDX-License-Identifier: Apache-2.0
"""PEFT's LoRA layers on bitsandbytes' linear layers."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.bnb import Linear8bitLt as PeftLinear8bitLt
from torch import nn

from ..layers import bypass
from ..layers.bypass import BypassFix
from ._bitsandbytes_weights import EightBit, FourBit, bnb, unfit_eight, unfit_four
from ._peft_layers import FusedPeft
from ._peft_quantised import FusedPeftQuantised
from .bitsandbytes import steady


class _SteadyBase(FusedPeftQuantised):
    """The base layer is one whose calls change nothing of it, as PEFT's forward may call it."""

    @classmethod
    def accelerate_(cls, module: nn.Module) -> FusedPeft:
        layer = super().accelerate_(module)
        bypass.apply_([BypassFix("", layer.base_layer, "", steady(layer.base_layer) or {})])
        return layer

    def release_(self) -> nn.Module:
        bypass.undo_(self.base_layer)
        return super().release_()

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        base = super().unload_and_optionally_merge_module(*args, **kwargs)
        bypass.undo_(base)
        return base


class FusedPeft4bit(_SteadyBase, PeftLinear4bit):
    """`peft.tuners.lora.bnb.Linear4bit` whose adapter is one autograd node."""

    plain = PeftLinear4bit
    quantisation = FourBit()

    @classmethod
    def base_unfit(cls, base: nn.Module) -> str | None:
        return unfit_four(base) if isinstance(base, bnb.nn.Linear4bit) else _not(base, "Linear4bit")


class FusedPeft8bit(_SteadyBase, PeftLinear8bitLt):
    """`peft.tuners.lora.bnb.Linear8bitLt` whose adapter is one autograd node."""

    plain = PeftLinear8bitLt
    quantisation = EightBit()

    @classmethod
    def base_unfit(cls, base: nn.Module) -> str | None:
        return unfit_eight(base) if isinstance(base, bnb.nn.Linear8bitLt) else _not(base, "Linear8bitLt")


def _not(base: nn.Module, expected: str) -> str:
    return f"its base layer is {type(base).__name__}, not {expected}"


CLASSES: dict[type[Any], type[FusedPeft]] = {PeftLinear4bit: FusedPeft4bit, PeftLinear8bitLt: FusedPeft8bit}
