# SPDX-License-Identifier: Apache-2.0
"""torchao: linear layers whose weight `quantize_` has quantised, which keep the library's own product.

quantize_(model, Int8WeightOnlyConfig())
fe.inject(model, fe.LoRAConfig(target_modules=["q_proj"], quantised_merge="requantise"))
"""

from __future__ import annotations

from torch import nn

from ..layers.matching import register_adapted_weight
from ..layers.quantised import QuantisedLinear
from ._torchao_weights import KINDS, TorchAO, unfit

__all__ = ["LoRATorchAOLinear"]


class LoRATorchAOLinear(QuantisedLinear, nn.Linear):
    """`nn.Linear` with a weight of torchao (int8, float8, or integers of fewer bits, without quantised
    inputs) and adapters, which are those of `LoRALinear`, in fp32 (fp64 beside fp64).

    Examples:
        >>> from torchao.quantization import Int8WeightOnlyConfig, quantize_
        >>> quantised = nn.Sequential(nn.Linear(64, 64))
        >>> quantize_(quantised, Int8WeightOnlyConfig())
        >>> _ = fe.inject(quantised, fe.LoRAConfig(target_modules=["0"], quantised_merge="residual"))
        >>> type(quantised[0]).__name__
        'LoRATorchAOLinear'
    """

    plain = nn.Linear
    quantisation = TorchAO()

    @classmethod
    def unfit(cls, module: nn.Module) -> str | None:
        return unfit(module)


for _kind in KINDS:
    register_adapted_weight(_kind, LoRATorchAOLinear)
