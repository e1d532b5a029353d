# SPDX-License-Identifier: Apache-2.0
"""PyTorch's fast path of `nn.TransformerEncoderLayer`, which uses the weights of a layer without calling it.

In eval mode the forward of `nn.TransformerEncoderLayer` computes everything in one call, from the weights of
`linear1`, `linear2` and `self_attn.out_proj`, and `nn.TransformerEncoder` packs padded inputs into nested
tensors for it. Nothing but these choices depends on the attributes that are set here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .bypass import register_outer_call


@register_outer_call
def without_fast_path(outer: nn.Module, path: str) -> Mapping[str, Any] | None:
    """The attribute that keeps an encoder, or a layer of it, off the fast path; None if it is off it."""
    if isinstance(outer, nn.TransformerEncoderLayer) and getattr(outer, "activation_relu_or_gelu", False):
        return {"activation_relu_or_gelu": 0}  # the forward applies `activation` itself
    inside = isinstance(outer, nn.TransformerEncoder) and path.startswith("layers.")
    if inside and getattr(outer, "use_nested_tensor", False):
        return {"use_nested_tensor": False}
    return None
