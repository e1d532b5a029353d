# SPDX-License-Identifier: Apache-2.0
"""Towers of open_clip under a head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import CLASS, CLASSES, TOKENS, Architecture, classes, images

_TEXT = {"context_length": TOKENS, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2}
_VIT = {"layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 32}


class Tower(nn.Module):
    """One tower of a CLIP model and a head."""

    def __init__(self, clip: nn.Module, text: bool) -> None:
        super().__init__()
        self.clip, self.head, self.text = clip, nn.Linear(16, CLASSES), text
        if text:
            del clip.visual

    def forward(self, x: Tensor) -> Tensor:
        features = self.clip.encode_text(x) if self.text else self.clip.visual(x)
        return self.head(features)

    def get_classifier(self) -> nn.Module:
        return self.head


def _tower(title: str, vision: Mapping[str, Any], text: bool = False, **options: Any) -> Architecture:
    def made() -> nn.Module:
        import open_clip

        clip = open_clip.CLIP(16, {**_VIT, **vision}, {**_TEXT, **options})
        if not text:
            for name in ("transformer", "token_embedding", "ln_final"):
                delattr(clip, name)
            clip.positional_embedding = clip.text_projection = None
        return Tower(clip, text)

    def tokens(n: int) -> dict[str, Tensor]:
        return {"x": torch.randint(1, 50, (n, TOKENS))}

    return Architecture(
        "open_clip", title, made, tokens if text else images(32), classes(), CLASS, positional=True
    )


_RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
_POOL = {"attentional_pool": True, "attn_pooler_queries": 3, "attn_pooler_heads": 2}
ARCHITECTURES = [
    _tower("ViT", {}),
    _tower("ViT, pooled by attention", _POOL),
    _tower("ModifiedResNet", _RESNET),
    _tower("text tower", {}, text=True),
    _tower("text tower, normalised queries", {}, text=True, qk_norm=True),
]
