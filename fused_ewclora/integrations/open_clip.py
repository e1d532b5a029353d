# SPDX-License-Identifier: Apache-2.0
"""open_clip and OpenAI's CLIP: the attention that pools the features of their ResNets, which bypasses its
layers.

All other attentions of their models are `nn.MultiheadAttention`. Nothing here imports a library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.bypass import CLASS, register_call

__all__ = ["CallingAttentionPool2d"]

# Where the class is defined that `CallingAttentionPool2d` computes the same as.
_POOLS = {("open_clip.modified_resnet", "AttentionPool2d"), ("clip.model", "AttentionPool2d")}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "c_proj")


class CallingAttentionPool2d(nn.Module):
    """`AttentionPool2d` of CLIP's ResNets that calls its four layers, with samples first.

    x `[N, channels, height, width]`, the result `[N, output_dim]`. `fused_ewclora.inject` gives this class to
    the attentions.

    Examples:
        >>> import open_clip
        >>> clip = open_clip.create_model("RN50")
        >>> _ = fe.inject(clip, fe.LoRAConfig(target_modules=["attnpool.q_proj", "attnpool.v_proj"]))
        >>> type(clip.visual.attnpool).__name__
        'CallingAttentionPool2d'
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    c_proj: nn.Module
    positional_embedding: Tensor
    num_heads: int

    def forward(self, x: Tensor) -> Tensor:
        """What the mean of all places attends to, the output of the library's class.

        Args:
            x: `[N, channels, height, width]`.

        Returns:
            The pooled features `[N, output_dim]`.
        """
        places = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([places.mean(1, keepdim=True), places], 1)
        tokens = tokens + self.positional_embedding.to(x.dtype)
        inputs = tokens[:, :1], tokens, tokens
        layers = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (self._heads(layer(one)) for layer, one in zip(layers, inputs, strict=True))
        pooled = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.c_proj(pooled).squeeze(1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


@register_call
def bypass_settings(parent: nn.Module, child: str) -> Mapping[str, Any] | None:
    """The class that makes a pooling attention call its layers; a rule of `register_call`.

    Args:
        parent: a module, such as the `attnpool` of a ResNet.
        child: the name of the layer below it.

    Returns:
        The class, as the setting of the class of the parent; None for anything but the four layers of a
        pooling attention.

    Examples:
        >>> import open_clip
        >>> pool = open_clip.create_model("RN50").visual.attnpool
        >>> settings = fe.integrations.open_clip.bypass_settings(pool, "q_proj")
        >>> list(settings.values()) == [fe.integrations.open_clip.CallingAttentionPool2d]
        True
    """
    kind = type(parent)
    if child not in PROJECTIONS or (kind.__module__, kind.__qualname__) not in _POOLS:
        return None
    return None if "forward" in vars(parent) else {CLASS: CallingAttentionPool2d}
