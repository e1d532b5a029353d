# SPDX-License-Identifier: Apache-2.0
"""Tiny variants of convolutional and hybrid models of timm and torchvision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock, ResNet

CLASSES = 5
Make = Callable[[], nn.Module]


def _timm(name: str, **options: Any) -> Make:
    return lambda: timm.create_model(name, num_classes=CLASSES, **options)


def _coatnet() -> nn.Module:
    config = MaxxVitCfg(
        embed_dim=(8, 16, 16, 32),
        depths=(1, 1, 1, 1),
        block_type=("C", "C", "T", "T"),
        stem_width=(8, 8),
        transformer_cfg=MaxxVitTransformerCfg(dim_head=8),
    )
    return MaxxVit(config, img_size=32, num_classes=CLASSES)


def _resnet() -> nn.Module:
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)
    model.layer3, model.layer4 = nn.Identity(), nn.Identity()
    model.fc = nn.Linear(128, CLASSES)
    return model


@dataclass(frozen=True)
class Architecture:
    """How to make a model, the size of its images, and the numbers of its convolutions."""

    make_plain: Make
    size: int
    adapted: int
    grouped: int = 0

    def make(self) -> nn.Module:
        """In fp64 and eval mode, with parameters large enough that every one of them shows in the output."""
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model = self.make_plain().double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model


ARCHITECTURES: Mapping[str, Architecture] = {
    "convnext": Architecture(
        _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), conv_mlp=True), 32, 12, 4
    ),
    "coatnet": Architecture(_coatnet, 32, 20, 2),
    "fastvit": Architecture(
        _timm("fastvit_t8", layers=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32)), 64, 16, 22
    ),
    "levit_conv": Architecture(
        _timm("levit_conv_128s", img_size=64, embed_dim=(32, 48, 64), num_heads=(2, 2, 2), depth=(1, 1, 1)),
        64,
        26,
    ),
    "mobilevit": Architecture(_timm("mobilevit_xxs"), 64, 28, 7),
    "vit": Architecture(
        _timm("vit_base_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2), 16, 1
    ),
    "resnet": Architecture(_resnet, 32, 6),
    "convnext_torchvision": Architecture(
        lambda: ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=CLASSES), 32, 2, 2
    ),
    "vit_torchvision": Architecture(
        lambda: torchvision.models.VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=CLASSES), 16, 1
    ),
}


def convolutions(model: nn.Module, grouped: bool = False) -> list[str]:
    """The names of the convolutions that can be adapted, or of the grouped ones."""
    kinds = (nn.Conv2d, nn.Conv1d)
    named = [(name, module) for name, module in model.named_modules() if type(module) in kinds]
    return [name for name, module in named if (module.groups > 1) is grouped]
