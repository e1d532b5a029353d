"""bitsandbytes: linear layers with weights of 4 and 8 bits, which keep the library's own product.

fe.inject(model, fe.LoRAConfig(target_modules=["q_proj"], quantised_merge="residual"))
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layers.matching import register_adapted_class
from ..layers.quantised import QuantisedLinear
from ._bitsandbytes_weights import EightBit, FourBit, unfit_eight, unfit_four

from bitsandbytes.nn import Linear4bit, Linear8bitLt, LinearFP4, LinearNF4  # noqa: E402, I001  (checked above)

__all__ = ["LoRALinear4bit", "LoRALinear8bitLt", "LoRALinearFP4", "LoRALinearNF4"]


class LoRALinear4bit(QuantisedLinear, Linear4bit):  # type: ignore[misc]
    """`bitsandbytes.nn.Linear4bit` (NF4 or FP4) with adapters, which are those of `LoRALinear`, in fp32.

    >>> inject(model.to("cpu"), LoRAConfig(target_modules=["fc1"], quantised_merge="requantise"))
    """

    plain = Linear4bit
    quantisation = FourBit()

    @classmethod
    def unfit(cls, module: nn.Module) -> str | None:
        return unfit_four(module)


class LoRALinearNF4(LoRALinear4bit, LinearNF4):  # type: ignore[misc]
    """`bitsandbytes.nn.LinearNF4` with adapters."""

    plain = LinearNF4


class LoRALinearFP4(LoRALinear4bit, LinearFP4):  # type: ignore[misc]
    """`bitsandbytes.nn.LinearFP4` with adapters."""

    plain = LinearFP4


class LoRALinear8bitLt(QuantisedLinear, Linear8bitLt):  # type: ignore[misc]
    """`bitsandbytes.nn.Linear8bitLt` (LLM.int8()) with adapters, which are those of `LoRALinear`, in fp32.

    In eval mode the library quantises inputs too, as it does without adapters.

        >>> inject(model.to("cpu"), LoRAConfig(target_modules=["fc1"], quantised_merge="residual"))
    """

    plain = Linear8bitLt
    quantisation = EightBit()

    @classmethod
    def unfit(cls, module: nn.Module) -> str | None:
        return unfit_eight(module)


_CLASSES: tuple[Any, ...] = (LoRALinear4bit, LoRALinearNF4, LoRALinearFP4, LoRALinear8bitLt)
for _adapted in _CLASSES:
    register_adapted_class(_adapted)
