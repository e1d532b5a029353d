# SPDX-License-Identifier: Apache-2.0
"""Preprocessing and augmentation of published image protocols, with torchvision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fused_ewclora.demo.formats import DataError

from ..extras import prepare_torchvision

Transform = Callable[[Any], Tensor]  # of a PIL image, to [3, size, size] fp32
Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of the channels
NONE: Statistics = ((0.0,) * 3, (1.0,) * 3)


def training(
    size: int,
    crop_scale: Sequence[float],
    statistics: Statistics,
    flip: bool = True,
    interpolation: str = "bilinear",
) -> Transform:
    """A random crop with a share of the area in crop_scale, scaled to size x size and, with flip, mirrored
    with probability 1/2; values in 0..1, then normalised."""
    if len(crop_scale) != 2 or not 0.0 < crop_scale[0] <= crop_scale[1] <= 1.0:
        raise DataError(f"crop_scale: expected two numbers, 0 < low <= high <= 1, got {crop_scale!r}")
    kinds = _torchvision()
    mode = kinds.InterpolationMode(_interpolation(interpolation))
    steps = [kinds.RandomResizedCrop(size, scale=tuple(crop_scale), interpolation=mode)]
    if flip:
        steps.append(kinds.RandomHorizontalFlip())
    return _composed(kinds, steps, statistics)


def testing(size: int, crop_fraction: float, interpolation: str, statistics: Statistics) -> Transform:
    """The shorter side scaled to size / crop_fraction, then a centre crop; values 0..1, normalised."""
    if not isinstance(crop_fraction, (int, float)) or not 0.0 < crop_fraction <= 1.0:
        raise DataError(f"crop_fraction: expected a number, 0 < crop_fraction <= 1, got {crop_fraction!r}")
    kinds = _torchvision()
    mode = kinds.InterpolationMode(_interpolation(interpolation))
    steps = [kinds.Resize(int(size / crop_fraction), interpolation=mode), kinds.CenterCrop(size)]
    return _composed(kinds, steps, statistics)


def statistics_of(normalize: Any, pretrained_config: Mapping[str, Any]) -> Statistics:
    """For "model" those with which the weights were trained; for None those that change nothing; or the
    values of {"mean": [3 numbers], "std": [3 numbers]}."""
    if normalize is None:
        return NONE
    values = pretrained_config if normalize == "model" else normalize
    try:
        mean, std = tuple(map(float, values["mean"])), tuple(map(float, values["std"]))
    except (TypeError, KeyError, ValueError):
        mean = std = ()
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0.0:
        raise DataError(
            'normalize: expected null, "model" or {"mean": [3 numbers], "std": [3 numbers > 0]}, '
            f"got {normalize!r}"
        )
    return mean, std


def _interpolation(name: str) -> str:
    if name not in ("bilinear", "bicubic"):
        raise DataError(f"interpolation: expected bilinear or bicubic, got {name!r}")
    return name


def _torchvision() -> Any:
    prepare_torchvision()
    try:
        from torchvision import transforms
    except ImportError as error:
        raise DataError(f"image problems need torchvision (pip install torchvision): {error}") from error
    return transforms


def _composed(kinds: Any, steps: Sequence[Any], statistics: Statistics) -> Transform:
    end = [] if statistics == NONE else [kinds.Normalize(*statistics)]
    composed: Transform = kinds.Compose([*steps, kinds.ToTensor(), *end])
    return composed
