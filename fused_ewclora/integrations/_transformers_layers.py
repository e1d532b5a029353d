# SPDX-License-Identifier: Apache-2.0
"""Linear layers of transformers that are not plain `nn.Linear`s, with adapters, and output heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from ..layers.adapted import AdaptedLinear
from ..layers.matching import register_adapted_class, register_heads

CLASSIFIERS = ("classifier", "score")  # as in PEFT


class LoRAConv1D(AdaptedLinear, Conv1D):
    """transformers' `Conv1D` (GPT-2), a linear layer whose weight is `[in_features, out_features]`, with
    adapters on its output features.

    Shapes, dtypes and names of the adapters are those of `LoRALinear`: lora_A `[r, in_features]`, lora_B
    `[rows, r]`, where the rows are columns of the weight. `fused_ewclora.inject` creates these layers.

    Examples:
        >>> import transformers
        >>> gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2))
        >>> _ = fe.inject(gpt2, fe.LoRAConfig(target_modules=["c_attn"], slices=("q", "v")))
        >>> layer = gpt2.transformer.h[0].attn.c_attn
        >>> type(layer).__name__, layer.lora_A_q.shape
        ('LoRAConv1D', torch.Size([8, 768]))
    """

    plain = Conv1D
    transposed = True

    @staticmethod
    def features(module: Any) -> tuple[int, int]:
        """The sizes of a layer, which Conv1D calls nx and nf.

        Args:
            module: a `Conv1D`, with adapters or without.

        Returns:
            (in_features, out_features).
        """
        return module.nx, module.nf

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """The number of columns of lora_A."""
        return int(self.nx)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """The number of rows of all lora_B together."""
        return int(self.nf)  # type: ignore[arg-type]

    def base_forward(self, x: Tensor) -> Tensor:
        """The output of Conv1D, without adapters.

        Args:
            x: `[..., in_features]`, in the dtype of the weight.

        Returns:
            y `[..., out_features]`.
        """
        return Conv1D.forward(self, x)

    def extra_repr(self) -> str:
        """The text of Conv1D, followed by the adapters."""
        return f"nf={self.nf}, nx={self.nx}{super().extra_repr()}"

    __repr__ = nn.Module.__repr__  # that of Conv1D would leave the adapters out


class LoRAFalconLinear(AdaptedLinear, FalconLinear):
    """Falcon's own `nn.Linear`, which adds its bias after the product has been rounded, with adapters.

    With adapters the bias is added before rounding, as everywhere else; without, Falcon's order is kept.
    `fused_ewclora.inject` creates these layers.

    Examples:
        >>> import transformers
        >>> sizes = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=2)
        >>> falcon = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes))
        >>> settings = fe.LoRAConfig(target_modules=["query_key_value"], slices=("q", "v"))
        >>> _ = fe.inject(falcon, settings)
        >>> type(falcon.transformer.h[0].self_attention.query_key_value).__name__
        'LoRAFalconLinear'
    """

    plain = FalconLinear

    def base_forward(self, x: Tensor) -> Tensor:
        """The output of FalconLinear, without adapters.

        Args:
            x: `[..., in_features]`, in the dtype of the weight.

        Returns:
            y `[..., out_features]`.
        """
        return FalconLinear.forward(self, x)


@register_heads
def heads(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a transformers model that are not part of its base model; a rule of `register_heads`.

    These are classifiers and language model heads. A few models (CLIP, SigLIP) have no base model; their
    classifiers are found by the usual names.

    Args:
        model: a model.

    Yields:
        Its heads; nothing unless it is a `PreTrainedModel`.
    """
    if not isinstance(model, PreTrainedModel):
        return
    base = model.base_model
    for name, module in model.named_children():
        if module is not base and (base is not model or name in CLASSIFIERS):
            yield module


register_adapted_class(LoRAConv1D)
register_adapted_class(LoRAFalconLinear)
