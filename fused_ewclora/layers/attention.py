# SPDX-License-Identifier: Apache-2.0
"""`nn.MultiheadAttention` with adapted projections.

PyTorch's own forward uses the weights of the input projections, which are no layers, and that of `out_proj`
without calling the layer. Injection therefore gives the attention another class, whose forward computes the
same and calls `out_proj` and the adapted parts.
"""

from __future__ import annotations

import dis
import inspect
import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..errors import ArgumentError
from .adapted import AdaptedLinear
from .bypass import CLASS, is_made_to_call, register_call, register_refusal
from .in_projection import PACKED, SEPARATE, LoRAInProjection, input_projections
from .matching import register_adapted_class
from .parts import Part, register_parts

_FUNCTION = F.multi_head_attention_forward.__name__


class LoRAOutProjection(AdaptedLinear, NonDynamicallyQuantizableLinear):
    """The linear layer that `nn.MultiheadAttention` projects its output with, with adapters.

    Shapes, dtypes and names of the adapters are those of `LoRALinear`. `fused_ewclora.inject` creates these
    layers and makes the attention call them.

        >>> inject(vit_b_16(), LoRAConfig(target_modules=["out_proj"]))
    """

    plain = NonDynamicallyQuantizableLinear


class CallingMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` that calls `out_proj` and the parts on its input projections, with samples
    first whatever `batch_first` is.

    Arguments, shapes, results and parameters are those of `nn.MultiheadAttention`, to rounding. PyTorch's
    fast path for inference is not taken; nested tensors, which it serves alone, are served in every mode.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(output, weights or None), as `nn.MultiheadAttention` returns them."""
        if query.is_nested and query is key and key is value:
            return self._of_nested(query, key_padding_mask, need_weights, attn_mask, average_attn_weights)
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        batched = query.dim() == 3
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        # Only SDPA uses the hint, and it takes no mask beside it.
        causal = is_causal and key_padding_mask is None and not need_weights
        q, k, v = self.project(*self._samples_first(query, key, value))
        mask = None if causal else self._mask(attn_mask, key_padding_mask, q, k)
        q, k, v = map(self._heads, (q, self._extended(k, self.bias_k), self._extended(v, self.bias_v)))
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout_p) if dropout_p > 0.0 else weights
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal)
        output = self.out_proj(y.transpose(1, 2).flatten(2))  # [N, L, embed_dim], in every layout
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        # Contiguous, as from nn.MultiheadAttention: callers may take views of it.
        return output if self.batch_first else output.transpose(0, 1).contiguous(), weights

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q `[N, L, embed_dim]`, k and v `[N, S, embed_dim]`: the products with the input projections, in as
        few as the inputs allow."""
        if not self._qkv_same_embed_dim:
            return self._separate(0, query), self._separate(1, key), self._separate(2, value)
        if query is key and key is value:
            q, k, v = self._packed(query).chunk(3, -1)
        elif key is value:
            q, (k, v) = self._packed(query, 0, 1), self._packed(key, 1, 3).chunk(2, -1)
        elif query is key:  # positions are added to queries and keys alone
            (q, k), v = self._packed(query, 0, 2).chunk(2, -1), self._packed(value, 2, 3)
        else:
            q, k, v = self._packed(query, 0, 1), self._packed(key, 1, 2), self._packed(value, 2, 3)
        return q, k, v

    def _packed(self, x: Tensor, first: int = 0, last: int = 3) -> Tensor:
        """The projections of x from number `first` to before number `last` of q, k and v, side by side."""
        whole, biases, part = self.in_proj_weight, self.in_proj_bias, self._modules.get(PACKED)
        if last - first == 3:
            return F.linear(x, whole, biases) if part is None else part(x, whole, biases)
        start, stop = first * self.embed_dim, last * self.embed_dim
        weight, bias = whole[start:stop], None if biases is None else biases[start:stop]
        if not isinstance(part, LoRAInProjection) or not part.concerns(start, stop):
            return F.linear(x, weight, bias)
        return part(x, weight, bias, start)

    def _separate(self, number: int, x: Tensor) -> Tensor:
        """The projection number 0, 1 or 2 of q, k and v, by a weight of its own."""
        name, d = SEPARATE[number], self.embed_dim
        weight: Tensor = getattr(self, f"{name}_weight")
        bias = None if self.in_proj_bias is None else self.in_proj_bias[number * d : (number + 1) * d]
        part = self._modules.get(name)
        return F.linear(x, weight, bias) if part is None else part(x, weight, bias)

    def _of_nested(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Of sequences of different lengths, padded in between; the weights at the padding are 0."""
        if x.layout != torch.strided or not self.batch_first:
            raise ArgumentError(
                "query: expected a nested tensor of the strided layout and batch_first=True, got "
                f"{x.layout} and batch_first={self.batch_first}; use a padded tensor and key_padding_mask"
            )
        if key_padding_mask is not None or attn_mask is not None:
            raise ArgumentError("query: expected a nested tensor without masks, or a padded one with them")
        lengths = [len(sequence) for sequence in x.unbind()]
        padded = torch.nested.to_padded_tensor(x, 0.0)
        there = torch.arange(padded.shape[1], device=x.device)
        padding = there >= torch.tensor(lengths, device=x.device)[:, None]
        # A sequence of no tokens attends to its padding: no weights at all would be NaN in gradients too.
        hidden = padding & ~padding.all(1, keepdim=True)
        output, weights = self.forward(
            padded, padded, padded, hidden, need_weights, None, average_attn_weights
        )
        if weights is not None:
            empty = padding[:, :, None] | padding[:, None, :]
            weights = weights.masked_fill(empty if average_attn_weights else empty[:, None], 0.0)
        rows = [sequence[:length] for sequence, length in zip(output, lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows), weights

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        if query.is_nested or key.is_nested or value.is_nested:
            raise ArgumentError(
                "query, key, value: expected padded tensors, or one nested tensor for all three, got a "
                "nested one among others; use key_padding_mask"
            )
        dims = query.dim()
        if dims not in (2, 3) or key.dim() != dims or value.dim() != dims:
            shapes = ", ".join(str(list(x.shape)) for x in (query, key, value))
            raise ArgumentError(f"query, key, value: expected three batches or three sequences, got {shapes}")
        if key_padding_mask is not None and key_padding_mask.dim() != dims - 1:
            raise ArgumentError(
                f"key_padding_mask: expected {dims - 1} dimensions, got {key_padding_mask.dim()}"
            )
        if attn_mask is not None and attn_mask.dim() not in (2, 3):
            raise ArgumentError(f"attn_mask: expected 2 or 3 dimensions, got {attn_mask.dim()}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ArgumentError(
                f"value: expected the length and batch of key, {list(key.shape[:-1])}, got "
                f"{list(value.shape[:-1])}"
            )
        if is_causal and attn_mask is None:
            raise ArgumentError("attn_mask: expected the mask that is_causal=True is a hint about, got None")

    def _samples_first(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs as `[N, L, features]`; those that are the same tensor stay the same."""
        if query.dim() == 3 and self.batch_first:
            return query, key, value
        changed: dict[int, Tensor] = {}
        for x in (query, key, value):
            if id(x) not in changed:
                changed[id(x)] = x.unsqueeze(0) if x.dim() == 2 else x.transpose(0, 1)
        return changed[id(query)], changed[id(key)], changed[id(value)]

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor
    ) -> Tensor | None:
        """What is added to the scores, broadcastable to `[N, heads, L, S]`, or None."""
        samples, length, keys = q.shape[0], q.shape[1], k.shape[1]
        padding = F._canonical_mask(
            key_padding_mask, "key_padding_mask", F._none_or_dtype(attn_mask), "attn_mask", q.dtype
        )
        mask = F._canonical_mask(attn_mask, "attn_mask", None, "", q.dtype, False)
        added = (self.bias_k is not None) + bool(self.add_zero_attn)  # keys that every query may attend to
        if mask is not None:
            shape = (length, keys) if mask.dim() == 2 else (samples * self.num_heads, length, keys)
            _check_shape("attn_mask", mask, shape)
            mask = F.pad(mask.view(-1, self.num_heads if mask.dim() == 3 else 1, length, keys), (0, added))
        if padding is not None:
            _check_shape("key_padding_mask", padding, (samples, keys))
            padding = F.pad(padding, (0, added))[:, None, None, :]
            mask = padding if mask is None else mask + padding
        return mask

    def _extended(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """k or v with the learned key and the zeros that the options of the constructor add."""
        if bias is not None:
            x = torch.cat([x, bias.to(x.dtype).expand(x.shape[0], 1, -1)], 1)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


def _check_shape(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(mask.shape) != shape:
        raise ArgumentError(f"{name}: expected shape {list(shape)}, got {list(mask.shape)}")


@register_call
def calling_attention(parent: nn.Module, child: str) -> Mapping[str, Any] | None:
    """The class that makes an `nn.MultiheadAttention` call its projections; None if it does so already."""
    if child in ("out_proj", PACKED, *SEPARATE) and type(parent) is nn.MultiheadAttention:
        return {CLASS: CallingMultiheadAttention}
    return None


@register_parts
def attention_parts(module: nn.Module) -> Iterable[Part]:
    """The input projections of an `nn.MultiheadAttention`."""
    if not isinstance(module, nn.MultiheadAttention):
        return ()
    return input_projections(module, _unknown(module, "its input projections, which are no layers"))


@register_refusal
def unknown_attention(parent: nn.Module, child: str) -> str | None:
    """Why `out_proj` of another attention is not adaptable: its forward may or may not call the layer."""
    if child != "out_proj" or not isinstance(parent, nn.MultiheadAttention):
        return None
    if "forward" in vars(parent):
        return "the forward of its nn.MultiheadAttention has been replaced"
    return _unknown(parent, "out_proj without calling it")


@register_refusal
def attention_by_function(parent: nn.Module, child: str) -> str | None:
    """Why a layer is not adaptable whose parent hands its weight to the function behind
    `nn.MultiheadAttention`."""
    forward: Any = inspect.getattr_static(type(parent), "forward", None)
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None or _FUNCTION not in code.co_names or is_made_to_call(parent, child):
        return None
    steps = [instruction.argval for instruction in dis.get_instructions(code)]
    if (child, "weight") not in pairwise(steps):
        return None
    return f"{type(parent).__name__} passes its weight to {_FUNCTION} without calling it"


def _unknown(attention: nn.MultiheadAttention, what: str) -> str | None:
    if type(attention) in (nn.MultiheadAttention, CallingMultiheadAttention):
        return None
    return (
        f"{type(attention).__name__} is a subclass of nn.MultiheadAttention, which uses the weight of {what}"
    )


register_adapted_class(LoRAOutProjection)
