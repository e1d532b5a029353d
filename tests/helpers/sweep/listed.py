# SPDX-License-Identifier: Apache-2.0
"""All architectures, in the order of the table."""

from __future__ import annotations

from . import open_clip_models, timm_models, torch_models, transformers_models
from .architecture import Architecture

ARCHITECTURES: list[Architecture] = [
    *timm_models.ARCHITECTURES,
    *transformers_models.ARCHITECTURES,
    *open_clip_models.ARCHITECTURES,
    *torch_models.ARCHITECTURES,
]


def find(library: str, name: str) -> Architecture:
    return next(one for one in ARCHITECTURES if (one.library, one.name) == (library, name))
