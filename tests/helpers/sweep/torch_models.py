# SPDX-License-Identifier: Apache-2.0
"""Architectures of torchvision and of torch.nn itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import CLASS, CLASSES, TOKENS, Architecture, classes, images


def _torchvision(title: str, make: Callable[[Any], nn.Module], size: int = 32) -> Architecture:
    def made() -> nn.Module:
        import torchvision

        return make(torchvision.models)

    return Architecture("torchvision", title, made, images(size), classes(), CLASS, positional=True)


def _swin(models: Any, version: str) -> nn.Module:
    swin = models.swin_transformer
    block, merging = {
        "v1": (swin.SwinTransformerBlock, swin.PatchMerging),
        "v2": (swin.SwinTransformerBlockV2, swin.PatchMergingV2),
    }[version]
    made: nn.Module = swin.SwinTransformer(
        [4, 4], 8, [2, 1], [2, 2], [4, 4], num_classes=CLASSES, block=block, downsample_layer=merging
    )
    return made


class Sequences(nn.Module):
    """A layer of torch.nn between an embedding of 8 numbers per token and a head.

    order: whether the layer takes `[N, T, d]` ("batch first") or `[T, N, d]` ("sequence first").
    """

    def __init__(self, layer: nn.Module, order: str) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Linear(8, 16), layer, nn.Linear(16, CLASSES)
        self.order = order

    def run(self, x: Tensor) -> Tensor:
        y = (
            self.layer(x, x.flip(-1))
            if isinstance(self.layer, (nn.Transformer, nn.TransformerDecoderLayer))
            else self.layer(x)
        )
        return y[0] if isinstance(y, tuple) else y

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.run(x) if self.order == "batch first" else self.run(x.transpose(0, 1)).transpose(0, 1)
        return self.head(y.mean(1))

    def get_classifier(self) -> nn.Module:
        return self.head


def _torch(title: str, make: Callable[[bool], nn.Module], order: str = "batch first") -> Architecture:
    return Architecture(
        "torch", f"{title}, {order}", lambda: Sequences(make(order == "batch first"), order),
        lambda n: {"x": torch.randn(n, TOKENS, 8, dtype=torch.float64)}, classes(), CLASS, positional=True,
    )  # fmt: skip


def _encoder_layer(batch_first: bool, **options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first, **options)


_ORDERS = ("batch first", "sequence first")
ARCHITECTURES = [
    _torchvision(
        "VisionTransformer", lambda m: m.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=CLASSES)
    ),
    _torchvision("SwinTransformer", lambda m: _swin(m, "v1")),
    _torchvision("SwinTransformer V2", lambda m: _swin(m, "v2")),
    _torchvision(
        "MaxVit", lambda m: m.MaxVit((64, 64), 8, 2, [8, 8], [1, 1], 4, 0.0, num_classes=CLASSES), size=64
    ),
    _torchvision(
        "ConvNeXt",
        lambda m: m.ConvNeXt(
            [m.convnext.CNBlockConfig(8, 16, 1), m.convnext.CNBlockConfig(16, None, 1)], num_classes=CLASSES
        ),
    ),
    _torchvision("ResNet", lambda m: m.ResNet(m.resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)),
    _torchvision("mobilenet_v3_small", lambda m: m.mobilenet_v3_small(num_classes=CLASSES, width_mult=0.25)),
    *(
        _torch(title, make, order)
        for title, make in {
            "TransformerEncoderLayer": _encoder_layer,
            "TransformerEncoderLayer, norm first": lambda first: _encoder_layer(first, norm_first=True),
            "TransformerEncoder": lambda first: nn.TransformerEncoder(_encoder_layer(first), 2),
            "TransformerDecoderLayer": lambda first: nn.TransformerDecoderLayer(16, 2, 32, batch_first=first),
            "Transformer": lambda first: nn.Transformer(16, 2, 1, 1, 32, batch_first=first),
        }.items()
        for order in _ORDERS
    ),
    _torch("LSTM", lambda first: nn.LSTM(16, 16, batch_first=first)),
]
