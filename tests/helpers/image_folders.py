# SPDX-License-Identifier: Apache-2.0
"""Small files in the formats of CIFAR-100, ImageNet-R, ImageNet-A and DomainNet, for tests/integrations."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.continual import image_sets

SIDE = 40
WNIDS = ("n01443537", "n01484850", "n01494475", "n01498041")
CLASSES = ("airplane", "bear", "cup", "diamond")


def picture(number: int) -> Image.Image:
    random = np.random.default_rng(number)
    return Image.fromarray(random.integers(0, 256, (SIDE, SIDE + 10, 3), dtype=np.uint8))


def write_images(folder: Path, count: int, first: int = 0) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        picture(first + number).save(folder / f"art_{number}.png")


def write_cifar(root: Path, per_class: int = 3, **changes: Any) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir()
    labels = [number % len(CLASSES) for number in range(per_class * len(CLASSES))]
    data = np.random.default_rng(0).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    for split in ("train", "test"):
        content = {b"data": data, b"fine_labels": labels, **changes.get(split, {})}
        (folder / split).write_bytes(pickle.dumps(content, protocol=2))
    names = {b"fine_label_names": [name.encode() for name in CLASSES]}
    (folder / "meta").write_bytes(pickle.dumps(changes.get("meta", names), protocol=2))


def write_split(name: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        for split, count in (("train", 3), ("test", 2)):
            for position, wnid in enumerate(WNIDS):
                write_images(root / name / split / wnid, count + position % 2, 10 * position)

    return write


def write_released(root: Path) -> None:
    for position, wnid in enumerate(WNIDS):
        write_images(root / "imagenet-r" / wnid, 10, 10 * position)


def write_domainnet(root: Path) -> None:
    folder = root / "domainnet"
    for domain in image_sets.DOMAINS:
        for position, name in enumerate(CLASSES):
            write_images(folder / domain / name, 3, 10 * position)
        for split, numbers in (("train", (0, 2)), ("test", (1,))):
            lines = [f"{domain}/{name}/art_{n}.png {p}\n" for p, name in enumerate(CLASSES) for n in numbers]
            (folder / f"{domain}_{split}.txt").write_text("".join(lines))


WRITERS: dict[str, Callable[[Path], None]] = {
    "cifar100": write_cifar,
    "imagenet-r": write_split("imagenet-r"),
    "imagenet-a": write_split("imagenet-a"),
    "domainnet": write_domainnet,
}
