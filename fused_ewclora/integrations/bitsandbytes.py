# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes: linear layers with weights of 4 and 8 bits, which keep the library's own product.

fe.inject(model, fe.LoRAConfig(target_modules=["q_proj"], quantised_merge="residual"))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..checkpoints.frozen import register_hidden
from ..layers.bypass import CLASS, register_module_settings
from ..layers.matching import register_adapted_class
from ..layers.quantised import QuantisedLinear
from ._bitsandbytes_weights import CODES, EightBit, FourBit, unfit_eight, unfit_four
from ._library import require

require("bitsandbytes")

from bitsandbytes.nn import Linear4bit, Linear8bitLt, LinearFP4, LinearNF4  # noqa: E402  (after the check)

__all__ = ["LoRALinear4bit", "LoRALinear8bitLt", "LoRALinearFP4", "LoRALinearNF4"]


class LoRALinear4bit(QuantisedLinear, Linear4bit):
    """`bitsandbytes.nn.Linear4bit` (NF4 or FP4) with adapters, which are those of `LoRALinear`, in fp32.

    Examples:
        >>> from bitsandbytes.nn import LinearNF4
        >>> quantised = nn.Sequential(LinearNF4(64, 64)).to("cpu")  # which quantises it
        >>> _ = fe.inject(quantised, fe.LoRAConfig(target_modules=["0"], quantised_merge="requantise"))
        >>> type(quantised[0]).__name__
        'LoRALinearNF4'
    """

    plain = Linear4bit
    quantisation = FourBit()

    @classmethod
    def unfit(cls, module: nn.Module) -> str | None:
        return unfit_four(module)


class LoRALinearNF4(LoRALinear4bit, LinearNF4):
    """`bitsandbytes.nn.LinearNF4` with adapters."""

    plain = LinearNF4


class LoRALinearFP4(LoRALinear4bit, LinearFP4):
    """`bitsandbytes.nn.LinearFP4` with adapters."""

    plain = LinearFP4


class LoRALinear8bitLt(QuantisedLinear, Linear8bitLt):
    """`bitsandbytes.nn.Linear8bitLt` (LLM.int8()) with adapters, which are those of `LoRALinear`, in fp32.

    In eval mode the library quantises inputs too, as it does without adapters.

    Examples:
        >>> from bitsandbytes.nn import Linear8bitLt
        >>> quantised = nn.Sequential(Linear8bitLt(64, 64, has_fp16_weights=False)).to("cpu")
        >>> _ = fe.inject(quantised, fe.LoRAConfig(target_modules=["0"], quantised_merge="residual"))
        >>> type(quantised[0]).__name__
        'LoRALinear8bitLt'
    """

    plain = Linear8bitLt
    quantisation = EightBit()

    @classmethod
    def unfit(cls, module: nn.Module) -> str | None:
        return unfit_eight(module)


class SteadyLinear4bit(Linear4bit):
    """A `Linear4bit` without adapters in a model that has some.

    Its calls change nothing of it. The library's own cast its bias in place, and on some CPUs pack its weight
    in eval mode, which rounds the scales and cuts gradients off from then on.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The output of `Linear4bit`."""
        return _FOUR.product(self, x)


class SteadyLinear8bitLt(Linear8bitLt):
    """A `Linear8bitLt` without adapters in a model that has some; its calls do not cast its bias in place."""

    def forward(self, x: Tensor) -> Tensor:
        """The output of `Linear8bitLt`."""
        return _EIGHT.product(self, x)


_FOUR, _EIGHT = FourBit(), EightBit()
_STEADY: dict[type[nn.Module], tuple[type[nn.Module], Callable[[Any], str | None]]] = {
    Linear4bit: (SteadyLinear4bit, unfit_four),
    LinearNF4: (SteadyLinear4bit, unfit_four),
    LinearFP4: (SteadyLinear4bit, unfit_four),
    Linear8bitLt: (SteadyLinear8bitLt, unfit_eight),
}


@register_module_settings
def steady(module: nn.Module) -> Mapping[str, Any] | None:
    """The class whose calls leave a quantised layer without adapters as it is."""
    if type(module) not in _STEADY or "forward" in vars(module):
        return None
    kind, unfit = _STEADY[type(module)]
    return None if unfit(module) else {CLASS: kind}


@register_hidden
def scales(module: nn.Module) -> Mapping[str, Tensor]:
    """The scales of a quantised weight, which belong to it as its codes do."""
    if isinstance(module, Linear4bit) and unfit_four(module) is None:
        stored = _FOUR.stored(module)
    elif isinstance(module, Linear8bitLt) and unfit_eight(module) is None:
        stored = _EIGHT.stored(module)
    else:
        return {}
    return {f"weight.{name}": tensor for name, tensor in stored.items() if name != CODES}


_CLASSES: tuple[Any, ...] = (LoRALinear4bit, LoRALinearNF4, LoRALinearFP4, LoRALinear8bitLt)
for _adapted in _CLASSES:
    register_adapted_class(_adapted)
# Of a later injection; `eject` restores the classes that the modules had before the first.
register_adapted_class(LoRALinear4bit, SteadyLinear4bit)
register_adapted_class(LoRALinear8bitLt, SteadyLinear8bitLt)
