"""timm."""

from __future__ import annotations

from typing import Any

from .architecture import CLASS, CLASSES, Architecture, classes, images


def _made(name: str, size: int | tuple[int, int] = 32, **options: Any) -> Architecture:
    def make():
        import timm

        return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)

    return Architecture("timm", name, make, images(size), classes(), CLASS, positional=True)


def _sized(name: str, size: int = 32, **options: Any) -> Architecture:
    """Of a model that is built for one size of images."""
    return _made(name, size, img_size=size, **options)


_VIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
ARCHITECTURES = [
    _sized("vit_base_patch16_224", **_VIT),
    _sized("beit_base_patch16_224", **_VIT),
    _sized("swin_tiny_patch4_window7_224", embed_dim=8, depths=(2, 1), num_heads=(2, 2), window_size=4),
    _made("test_resnet"),
    _made("mixer_b16_224", img_size=32, patch_size=8, num_blocks=2, embed_dim=16),
]
