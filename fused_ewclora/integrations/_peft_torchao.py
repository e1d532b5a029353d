# SPDX-License-Identifier: Apache-2.0
"""PEFT's LoRA layers on linear layers with weights of torchao."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import nn

from ._peft_layers import FusedPeft
from ._peft_quantised import FusedPeftQuantised
from ._torchao_weights import KINDS, TorchAO, unfit


class FusedPeftTorchAO(FusedPeftQuantised, TorchaoLoraLinear):
    """`peft.tuners.lora.torchao.TorchaoLoraLinear` whose adapter is one autograd node."""

    plain = TorchaoLoraLinear
    quantisation = TorchAO()

    @classmethod
    def base_unfit(cls, base: nn.Module) -> str | None:
        weight = base._parameters.get("weight")
        if type(base) is not nn.Linear or type(weight) not in KINDS:
            return f"its base layer is {type(base).__name__} with a weight of {type(weight).__name__}"
        return unfit(base)


CLASSES: dict[type[Any], type[FusedPeft]] = {TorchaoLoraLinear: FusedPeftTorchAO}
