# SPDX-License-Identifier: Apache-2.0
"""torchvision: the layouts of its packed projections, and the Swin attentions, which bypass theirs.

The window attentions of Swin, Swin V2 and Video Swin pass the weights of `qkv` and `proj` to a function.
Injection gives them a class whose forward computes the same and calls both layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import QKVLayout
from ..layers.bypass import CLASS, register_call, register_refusal
from ..layers.matching import register_heads, register_layout
from ..report import Report
from ._library import require
from ._packed import packed_projections

require("torchvision")

from torchvision.models.maxvit import RelativePositionalMultiHeadAttention  # noqa: E402  (after the check)
from torchvision.models.swin_transformer import (  # noqa: E402
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
)
from torchvision.models.video.mvit import MultiscaleAttention  # noqa: E402
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d  # noqa: E402

__all__ = [
    "CallingWindowAttention",
    "CallingWindowAttention3d",
    "CallingWindowAttentionV2",
    "layout_of",
    "targets",
]
APART = -100.0  # torchvision's score between tokens that only the cyclic shift has brought together
LARGEST_SCALE = math.log(100.0)  # of the cosine attention (Swin V2, arXiv 2111.09883)


class CallingWindowAttention(ShiftedWindowAttention):
    """torchvision's `ShiftedWindowAttention` that calls `qkv` and `proj`, with samples first.

    `fused_ewclora.inject` gives this class to attentions; it has the arguments of torchvision's.
    x `[N, height, width, channels]`, as the result.

    Examples:
        >>> import torchvision
        >>> swin = torchvision.models.swin_t()
        >>> _ = fe.inject(swin, fe.LoRAConfig(target_modules=["qkv"]))
        >>> type(swin.features[1][0].attn).__name__
        'CallingWindowAttention'
    """

    def forward(self, x: Tensor) -> Tensor:
        """The output of torchvision's class, from the layers instead of their weights.

        Args:
            x: `[N, height, width, channels]`.

        Returns:
            The output, in the shape of x.
        """
        return _in_windows(self, x, self.window_size, _shifts(self, x), self.get_relative_position_bias())


class CallingWindowAttentionV2(ShiftedWindowAttentionV2):
    """torchvision's `ShiftedWindowAttentionV2` (cosine attention) that calls `qkv` and `proj`.

    `fused_ewclora.inject` gives this class to attentions; it has the arguments of torchvision's.
    x `[N, height, width, channels]`, as the result.

    Examples:
        >>> import torchvision
        >>> swin = torchvision.models.swin_v2_t()
        >>> _ = fe.inject(swin, fe.LoRAConfig(target_modules=["qkv"]))
        >>> type(swin.features[1][0].attn).__name__
        'CallingWindowAttentionV2'
    """

    def forward(self, x: Tensor) -> Tensor:
        """The output of torchvision's class, from the layers instead of their weights.

        Args:
            x: `[N, height, width, channels]`.

        Returns:
            The output, in the shape of x.
        """
        bias = self.get_relative_position_bias()
        return _in_windows(self, x, self.window_size, _shifts(self, x), bias, self.logit_scale)


class CallingWindowAttention3d(ShiftedWindowAttention3d):
    """torchvision's `ShiftedWindowAttention3d` (Video Swin) that calls `qkv` and `proj`.

    `fused_ewclora.inject` gives this class to attentions; it has the arguments of torchvision's.
    x `[N, frames, height, width, channels]`, as the result.

    Examples:
        >>> import torchvision
        >>> swin = torchvision.models.video.swin3d_t()
        >>> _ = fe.inject(swin, fe.LoRAConfig(target_modules=["qkv"]))
        >>> type(swin.features[0][0].attn).__name__
        'CallingWindowAttention3d'
    """

    def forward(self, x: Tensor) -> Tensor:
        """The output of torchvision's class, from the layers instead of their weights.

        Args:
            x: `[N, frames, height, width, channels]`.

        Returns:
            The output, in the shape of x.
        """
        sizes = x.shape[1:-1]
        window = [min(w, size) for w, size in zip(self.window_size, sizes, strict=True)]
        shift = [
            0 if size <= w else s for s, w, size in zip(self.shift_size, self.window_size, sizes, strict=True)
        ]
        return _in_windows(self, x, window, shift, self.get_relative_position_bias(window))


def _shifts(attention: Any, x: Tensor) -> list[int]:
    """No shift along a side that has one window."""
    sides = zip(attention.shift_size, attention.window_size, x.shape[1:-1], strict=True)
    return [0 if size <= w else s for s, w, size in sides]


def _in_windows(
    attention: Any,
    x: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
    bias: Tensor,
    logit_scale: Tensor | None = None,
) -> Tensor:
    """Attention inside shifted windows over all axes of x `[N, *sizes, channels]` but the first and last."""
    sizes, axes = x.shape[1:-1], tuple(range(1, x.dim() - 1))
    padding = [(-size) % w for size, w in zip(sizes, window, strict=True)]
    x = F.pad(x, (0, 0, *itertools.chain(*((0, p) for p in reversed(padding)))))
    padded = x.shape[1:-1]
    shifted = any(shift)
    if shifted:
        x = torch.roll(x, tuple(-s for s in shift), axes)
    tokens = _partition(x, window)
    heads = attention.num_heads
    qkv = attention.qkv(tokens).unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5)
    q, k, v = qkv.unbind(0)  # each [N, windows, heads, tokens, channels / heads]
    scores = _scaled(q, k) if logit_scale is None else _cosine(q, k, attention.qkv.bias, logit_scale)
    scores = scores + bias
    if shifted:
        scores = scores + _apart(x, window, shift).unsqueeze(1)
    weights = F.dropout(scores.softmax(-1), attention.attention_dropout, attention.training)
    tokens = attention.proj((weights @ v).transpose(-3, -2).flatten(-2))
    tokens = F.dropout(tokens, attention.dropout, attention.training)
    x = _joined(tokens, window, padded)
    if shifted:
        x = torch.roll(x, tuple(shift), axes)
    return x[(slice(None), *(slice(size) for size in sizes))].contiguous()


def _scaled(q: Tensor, k: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)


def _cosine(q: Tensor, k: Tensor, bias: Tensor | None, logit_scale: Tensor) -> Tensor:
    if bias is not None:
        # torchvision takes the bias of k for zero. In its checkpoints it is, and then nothing changes here.
        k = k - bias.chunk(3)[1].view(k.shape[-3], 1, -1).to(k.dtype)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return scores * logit_scale.clamp(max=LARGEST_SCALE).exp()


def _partition(x: Tensor, window: Sequence[int]) -> Tensor:
    """`[N, *sizes, channels]` -> `[N, windows, tokens of a window, channels]`."""
    dims = len(window)
    split = [part for size, w in zip(x.shape[1:-1], window, strict=True) for part in (size // w, w)]
    x = x.reshape(x.shape[0], *split, x.shape[-1])
    counts, inside = range(1, 2 * dims + 1, 2), range(2, 2 * dims + 1, 2)
    x = x.permute(0, *counts, *inside, 2 * dims + 1)
    return x.flatten(dims + 1, 2 * dims).flatten(1, dims)


def _joined(tokens: Tensor, window: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The inverse of `_partition`."""
    dims = len(window)
    counts = [size // w for size, w in zip(sizes, window, strict=True)]
    x = tokens.reshape(tokens.shape[0], *counts, *window, tokens.shape[-1])
    order = [axis for i in range(dims) for axis in (1 + i, 1 + dims + i)]
    return x.permute(0, *order, 2 * dims + 1).reshape(tokens.shape[0], *sizes, tokens.shape[-1])


def _apart(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """`[windows, tokens, tokens]`: `APART` between tokens of different regions of the image, else 0."""
    regions = x.new_zeros((1, *x.shape[1:-1], 1))
    pieces = [(slice(0, -w), slice(-w, -s), slice(-s, None)) for w, s in zip(window, shift, strict=True)]
    for number, region in enumerate(itertools.product(*pieces)):
        regions[0][region] = number
    inside = _partition(regions, window).squeeze(-1).squeeze(0)
    different = inside.unsqueeze(1) != inside.unsqueeze(2)
    return torch.zeros_like(different, dtype=x.dtype).masked_fill(different, APART)


_CALLING: dict[type[nn.Module], type[nn.Module]] = {
    ShiftedWindowAttention: CallingWindowAttention,
    ShiftedWindowAttentionV2: CallingWindowAttentionV2,
    ShiftedWindowAttention3d: CallingWindowAttention3d,
}
# Class -> its packed projection, q, k and v in thirds.
_PACKED: dict[type[nn.Module], str] = {
    **{cls: "qkv" for pair in _CALLING.items() for cls in pair},
    MultiscaleAttention: "qkv",
    RelativePositionalMultiHeadAttention: "to_qkv",
}


def _defined_in(parent: nn.Module) -> type | None:
    """The class whose forward method `parent` runs; None if it was replaced on the instance."""
    if "forward" in vars(parent):
        return None
    return next(cls for cls in type(parent).__mro__ if "forward" in vars(cls))


@register_layout
def layout_of(parent: nn.Module, child: str) -> QKVLayout | None:
    """The layout of a packed projection of a torchvision attention; a rule of `register_layout`.

    Args:
        parent: a module, such as an attention of torchvision.
        child: the name of the projection below it.

    Returns:
        The layout, q, k and v in thirds; None where `child` is no packed projection that is known, or no
        `nn.Linear`.

    Examples:
        >>> import torchvision
        >>> attention = torchvision.models.swin_t().features[1][0].attn
        >>> fe.integrations.torchvision.layout_of(attention, "qkv").sizes
        (96, 96, 96)
    """
    if _PACKED.get(_defined_in(parent) or nn.Module) != child:
        return None
    projection = parent.get_submodule(child)
    if not isinstance(projection, nn.Linear):
        return None
    return QKVLayout(("q", "k", "v"), (projection.out_features // 3,) * 3)


@register_call
def bypass_settings(parent: nn.Module, child: str) -> Mapping[str, Any] | None:
    """The class that makes a Swin attention call its layers; a rule of `register_call`.

    Args:
        parent: a module, such as an attention of torchvision.
        child: the name of the layer below it.

    Returns:
        The class, as the setting of the class of the parent; None for anything but `qkv` and `proj` of a Swin
        attention.

    Examples:
        >>> import torchvision
        >>> attention = torchvision.models.swin_t().features[1][0].attn
        >>> settings = fe.integrations.torchvision.bypass_settings(attention, "qkv")
        >>> list(settings.values()) == [fe.integrations.torchvision.CallingWindowAttention]
        True
    """
    calling = _CALLING.get(type(parent))
    return {CLASS: calling} if calling is not None and child in ("qkv", "proj") else None


@register_refusal
def unknown_window_attention(parent: nn.Module, child: str) -> str | None:
    """Why a subclass of a Swin attention that inherits its forward is not adaptable.

    Args:
        parent: a module, such as an attention of torchvision.
        child: the name of the layer below it.

    Returns:
        The reason, or None where the layer is adaptable.

    Examples:
        >>> import torchvision
        >>> attention = torchvision.models.swin_t().features[1][0].attn
        >>> fe.integrations.torchvision.unknown_window_attention(attention, "qkv") is None
        True
    """
    owner = _defined_in(parent)
    if child not in ("qkv", "proj") or owner not in _CALLING or type(parent) in _CALLING:
        return None
    return f"{type(parent).__name__} inherits the forward of {owner.__name__}, which uses its weight alone"


# The attributes of classification models that end with the layer that gives the scores of the classes.
_CLASSIFIERS = ("fc", "classifier", "head", "heads")
# Those of classifiers further inside, which run in training alone: of GoogLeNet and Inception.
_AUXILIARY = ("aux1", "aux2", "AuxLogits")


@register_heads
def heads(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of a torchvision model that give the scores of the classes; a rule of `register_heads`.

    Args:
        model: a model.

    Yields:
        The last linear layer or convolution of each classifier, also of auxiliary ones; nothing for a model
        whose class is not torchvision's.

    Examples:
        >>> import torchvision
        >>> resnet = torchvision.models.resnet18()
        >>> list(fe.integrations.torchvision.heads(resnet)) == [resnet.fc]
        True
    """
    if not type(model).__module__.startswith("torchvision.models."):
        return
    for name in (*_CLASSIFIERS, *_AUXILIARY):
        classifier = getattr(model, name, None)
        layers = [] if classifier is None else [*classifier.modules()]
        yield from [layer for layer in layers if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Conv3d))][-1:]


def targets(model: nn.Module) -> Report:
    """A table of the packed projections of a torchvision model whose layout is known. Nothing is changed.

    Args:
        model: a model of torchvision, or one that contains its modules.

    Returns:
        A report; `QKVLayout(row["segments"], row["sizes"], row["interleave"])` is the layout of a row of its
        `rows`, and `row["notes"]` says which class `inject` gives to a parent that would bypass the
        layer.

    Examples:
        >>> import torchvision
        >>> report = fe.integrations.torchvision.targets(torchvision.models.swin_t())
        >>> first = report.rows[0]
        >>> first["name"], first["segments"], first["sizes"]
        ('features.1.0.attn.qkv', ('q', 'k', 'v'), (96, 96, 96))
    """
    return packed_projections("torchvision", model, layout_of, bypass_settings)
