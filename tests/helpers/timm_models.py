# SPDX-License-Identifier: Apache-2.0
"""Tiny variants of models that timm knows by name, for tests/integrations."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import seeding
import timm
import torch
from torch import Tensor, nn

import fused_ewclora as fe

CLASSES = 4
VERSION = tuple(map(int, timm.__version__.split(".")[:3]))
_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
_SWIN = {"img_size": 32, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
_PVT = {
    "embed_dims": (8, 8),
    "depths": (1, 1),
    "num_heads": (1, 2),
    "sr_ratios": (2, 1),
    "mlp_ratios": (2, 2),
}


@dataclass(frozen=True)
class Tiny:
    """A model and what of it is adapted."""

    name: str
    options: dict[str, Any]
    targets: tuple[str, ...] = ("qkv",)
    slices: tuple[str, ...] | None = ("k", "v")
    size: int = 16
    bypassed: bool = False

    def make(self, **options: Any) -> nn.Module:
        """In fp64 and eval mode, with parameters large enough that every one of them shows in the output."""
        self.skip_if_refused()
        torch.set_num_threads(1)  # matrices this small only wait for each other's threads
        torch.manual_seed(0)
        model = timm.create_model(self.name, num_classes=CLASSES, **{**self.options, **options}).double()
        model.eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))  # layer scales of 1e-5, weights of 0.02
        return model

    def skip_if_refused(self) -> None:
        if self.bypassed and VERSION < (1, 0, 8):
            pytest.skip(f"timm {timm.__version__} cannot call the projections of {self.name}")

    def config(self, **options: Any) -> fe.LoRAConfig:
        return fe.LoRAConfig(r=3, target_modules=list(self.targets), slices=self.slices, **options)

    def images(self, count: int = 3) -> Tensor:
        generator = seeding.generator(count)
        return torch.randn(count, 3, self.size, self.size, generator=generator, dtype=torch.float64)


MODELS = {
    "vit": Tiny("vit_base_patch16_224", _VIT),
    "deit": Tiny("deit_base_distilled_patch16_224", _VIT),
    "beit": Tiny("beit_base_patch16_224", _VIT, bypassed=True),
    "beitv2": Tiny("beitv2_base_patch16_224", _VIT, bypassed=True),
    "eva02": Tiny("eva02_tiny_patch14_224", _VIT, bypassed=True),
    "eva02 separate": Tiny("eva02_base_patch14_448", _VIT, targets=("k_proj", "v_proj"), slices=None),
    "swin": Tiny("swin_tiny_patch4_window7_224", _SWIN, size=32),
    "swinv2": Tiny("swinv2_tiny_window8_256", _SWIN, size=32, bypassed=True),
    "pvtv2": Tiny("pvt_v2_b0", _PVT, targets=("kv",), size=32),
    "cait": Tiny("cait_xxs24_224", {**_VIT, "depth": 1, "depth_token_only": 1}),
}


def adapted(tiny: Tiny, **options: Any) -> nn.Module:
    """The model with random adapters; the head trains."""
    model = tiny.make(**options)
    fe.inject(model, tiny.config())
    randomise(model)
    heads = model.get_classifier()  # two of a distilled model
    for head in heads if isinstance(heads, tuple) else (heads,):
        head.requires_grad_(True)
    return model


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """What training would do to lora_B."""
    for layer in fe.adapters(model).values():
        for _, _, lora_b in layer.adapter_parameters():
            lora_b.normal_(0, 0.3)


def dense(model: nn.Module) -> nn.Module:
    """A plain timm model that computes the same, whose weights require gradients."""
    other = copy.deepcopy(model)
    fe.eject(other)
    return other
