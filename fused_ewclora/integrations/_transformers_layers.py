"""Layers of transformers: linear ones that are no `nn.Linear`, with adapters, and output heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from ..layers.adapted import AdaptedLinear
from ..layers.matching import register_adapted_class, register_heads

CLASSIFIERS = ("classifier", "score")  # as PEFT has them


class LoRAConv1D(AdaptedLinear, Conv1D):
    """transformers' `Conv1D` (GPT-2), a linear layer whose weight is `[in_features, out_features]`, with
    adapters on its output features.

    Shapes, dtypes and names of the adapters are those of `LoRALinear`: lora_A `[r, in_features]`, lora_B
    `[rows, r]`, where rows are columns of the weight. Comes about by `fused_ewclora.inject`.

        >>> inject(gpt2, LoRAConfig(target_modules=["c_attn"], slices=("q", "v")))
    """

    plain = Conv1D
    transposed = True

    @staticmethod
    def features(module: Any) -> tuple[int, int]:
        """(in_features, out_features), which Conv1D calls nx and nf."""
        return module.nx, module.nf

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """Columns of lora_A."""
        return int(self.nx)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """Rows of lora_B, together."""
        return int(self.nf)  # type: ignore[arg-type]

    def base_forward(self, x: Tensor) -> Tensor:
        """What Conv1D computes."""
        return Conv1D.forward(self, x)

    def extra_repr(self) -> str:
        """Conv1D's own text, then the adapters."""
        return f"nf={self.nf}, nx={self.nx}{super().extra_repr()}"

    __repr__ = nn.Module.__repr__  # Conv1D's would leave the adapters out


class LoRAFalconLinear(AdaptedLinear, FalconLinear):
    """Falcon's own `nn.Linear`, which adds its bias after the product has been rounded, with adapters.

    With adapters the bias is added before rounding, as everywhere else; without, Falcon's order is kept.

        >>> inject(falcon, LoRAConfig(target_modules=["query_key_value"], slices=("q", "v")))
    """

    plain = FalconLinear

    def base_forward(self, x: Tensor) -> Tensor:
        """What FalconLinear computes."""
        return FalconLinear.forward(self, x)


@register_heads
def heads(model: nn.Module) -> Iterator[nn.Module]:
    """What a transformers model for a task has beside its base model: classifiers, language model heads. A
    few (CLIP, SigLIP) have no base model, but give classifiers the usual names."""
    if not isinstance(model, PreTrainedModel):
        return
    base = model.base_model
    for name, module in model.named_children():
        if module is not base and (base is not model or name in CLASSIFIERS):
            yield module


register_adapted_class(LoRAConv1D)
register_adapted_class(LoRAFalconLinear)
