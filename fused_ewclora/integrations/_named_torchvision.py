# SPDX-License-Identifier: Apache-2.0
"""Classification models of torchvision by name: of images, and of videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._library import require

BATCH = 2
FRAMES = 4  # of a video that is smaller than the native one
NATIVE_FRAMES = 16
# Classifiers inside of the network, which run in training alone.
_AUXILIARY = ("googlenet", "inception_v3")

Size = tuple[int, int]


def names() -> list[str]:
    """The names of all classification models."""
    models = require("torchvision").models
    return [*models.list_models(module=models), *models.list_models(module=models.video)]


def native_size(name: str) -> Size:
    """Height and width of the images that the weights of a model were trained on."""
    size = require("torchvision").models.get_model_weights(name).DEFAULT.transforms.keywords["crop_size"]
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return height, width


def multiple_of(name: str) -> int:
    """What must divide the sides of an image."""
    if name.startswith("vit_"):
        return int(name.rpartition("_")[2])  # the size of a patch
    # MaxViT halves them five times, to windows of 7; MViT is built for one size.
    return 224 if name.startswith(("maxvit_", "mvit_")) else 1


def make(name: str, size: Size, native: bool) -> tuple[nn.Module, Tensor]:
    """The model with random weights for images of a size, and some of these; videos are short unless they are
    `native`."""
    models = require("torchvision").models
    model = models.get_model(name, weights=None, **_options(name, size))
    count = NATIVE_FRAMES if native else FRAMES
    frames = (count,) if name in models.list_models(module=models.video) else ()
    return model, torch.randn(BATCH, 3, *frames, *size)


def _options(name: str, size: Size) -> Mapping[str, Any]:
    """The arguments of a model beside its weights."""
    if name.startswith("vit_"):
        return {"image_size": size[0]}
    return {"aux_logits": False, "init_weights": False} if name in _AUXILIARY else {}
