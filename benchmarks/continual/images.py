# SPDX-License-Identifier: Apache-2.0
"""Image sets, published ones and your own, on pretrained vision transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from fused_ewclora.demo.formats import DataError

from . import backbones, image_sets, image_transforms
from .image_sets import Examples
from .image_transforms import Transform
from .stream import Problem, Stream, Task, split_classes


class Images(Dataset[Any]):
    """(image, label) of some examples, decoded on access. Raises `DataError` for other files."""

    def __init__(self, examples: Examples, transform: Transform) -> None:
        self.examples, self.transform = examples, transform

    def __len__(self) -> int:
        return len(self.examples.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(_decoded(self.examples.images[index])), int(self.examples.labels[index])


def load(
    root: Path,
    seed: int,
    device: str,
    *,
    dataset: str,
    model: str,
    tasks: int | Sequence[int],
    image_size: int = 224,
    pretrained: bool | str = True,
    shuffle: bool = False,
    crop_scale: Sequence[float] = (0.08, 1.0),
    crop_fraction: float = 0.875,
    interpolation: str = "bilinear",
    train_interpolation: str = "bilinear",
    normalize: Any = None,
    split_seed: int = 0,
) -> Problem:
    """Images `[N, 3, image_size, image_size]` fp32 of a set in `root`, whose files `image_sets` describes;
    your own are "folder:PATH" or "datasets:NAME".

    model, pretrained: see `backbones.make`. shuffle: the order of classes is drawn with the seed, by the
    generator of PyCIL, PILOT and code derived from them, so that equal seeds give equal orders; otherwise it
    is that of the data set. crop_scale and train_interpolation are for training images, crop_fraction and
    interpolation for test images, normalize for both: see `image_transforms`; None leaves values in 0..1, as
    most official codes do. split_seed: for sets without a published split. Raises `DataError`.

        >>> load(root, 0, "cuda", dataset="cifar100", model="vit_base_patch16_224.augreg_in21k", tasks=10)
    """
    for name, value, least in (("image_size", image_size, 1), ("split_seed", split_seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise DataError(f"{name}: expected an integer >= {least}, got {value!r}")
    collection = image_sets.read(dataset, root, split_seed)
    backbone = backbones.make(root, model, image_size, pretrained, seed)
    statistics = image_transforms.statistics_of(normalize, backbone.pretrained_config)
    train = image_transforms.training(image_size, crop_scale, statistics, interpolation=train_interpolation)
    test = image_transforms.testing(image_size, crop_fraction, interpolation, statistics)
    stream_tasks = []
    for names in split_classes(_ordered(collection.classes, seed if shuffle else None), tasks):
        labels = [collection.classes.index(name) for name in names]
        seen, unseen = collection.train.of(labels), collection.test.of(labels)
        stream_tasks.append(Task(names, Images(seen, train), Images(unseen, test), Images(seen, test)))
    facts = {
        "description": f"{dataset}, {len(collection.classes)} classes; {model}",
        "train_images": len(collection.train.labels),
        "test_images": len(collection.test.labels),
        "weights": pretrained if isinstance(pretrained, str) else ("timm" if pretrained else "random"),
        "parameters": sum(p.numel() for p in backbone.parameters()),
    }
    return Problem(Stream(dataset, tuple(stream_tasks)), backbone.to(device), facts)


def _ordered(classes: Sequence[str], seed: int | None) -> list[str]:
    if seed is None:
        return list(classes)
    return [classes[i] for i in np.random.RandomState(seed).permutation(len(classes))]


def _decoded(image: Any) -> Any:
    from PIL import Image

    if isinstance(image, np.ndarray):
        return Image.fromarray(image).convert("RGB")
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        with Image.open(image) as file:
            return file.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{image}: not a readable image: {error}") from error
