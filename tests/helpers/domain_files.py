# SPDX-License-Identifier: Apache-2.0
"""Small files in the layouts of the image sets of X-TAIL and MTIL."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.continual import domains

CLASSES = ("snow_leopard", "Lotus")  # of every set with a split, in this order
TRAIN, TEST = 3, 2  # images of a class

Writer = Callable[[Path], None]  # of an image


def entries(split: str, count: int) -> list[list[Any]]:
    """Of a split: class by class, in folders named after their classes."""
    return [[f"{c}/{split}{n}.png", label, c] for label, c in enumerate(CLASSES) for n in range(count)]


def write_split(name: str, root: Path, image: Writer, **changes: Any) -> Path:
    """A set of one of CoOp's splits; changes replace parts of the split file, which is returned."""
    domain = domains.DOMAINS[name]
    folder = root / domain.folders[0]
    content = {"train": entries("train", TRAIN), "val": [], "test": entries("test", TEST)}
    for path, _, _ in content["train"] + content["test"]:
        file = folder / domain.images / path
        file.parent.mkdir(parents=True, exist_ok=True)
        image(file)
    file = folder / domain.split
    file.write_text(json.dumps({**content, **changes}))
    return file


def write_aircraft(root: Path, image: Writer) -> Path:
    folder = root / "fgvc_aircraft"
    (folder / "images").mkdir(parents=True)
    (folder / "variants.txt").write_text("707-320\nAn-12 B\n")
    number = 0
    for split, count in (("train", TRAIN), ("test", TEST)):
        lines = []
        for variant in ("An-12 B", "707-320"):
            for _ in range(count):
                image(folder / "images" / f"{number:07d}.jpg")
                lines.append(f"{number:07d} {variant}\n")
                number += 1
        (folder / f"images_variant_{split}.txt").write_text("".join(lines))
    return folder


def write_mnist(root: Path) -> Path:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split, count in (("train", TRAIN), ("t10k", TEST)):
        labels = np.arange(10, dtype=np.uint8).repeat(count)
        images = (labels[:, None, None] * 20 + np.zeros((1, 28, 28))).astype(np.uint8)
        for kind, data in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(f">BBBB{data.ndim}I", 0, 0, 8, data.ndim, *data.shape)
            (folder / f"{split}-{kind}-ubyte").write_bytes(head + data.tobytes())
    return folder


def write_cifar(root: Path) -> Path:
    folder = root / "cifar-100-python"
    folder.mkdir()
    for split, count in (("train", TRAIN), ("test", TEST)):
        labels = [0, 1] * count
        data = np.arange(len(labels) * 3072, dtype=np.int64).reshape(-1, 3072).astype(np.uint8)
        (folder / split).write_bytes(pickle.dumps({b"data": data, b"fine_labels": labels}, protocol=2))
    names = {b"fine_label_names": [b"aquarium_fish", b"bear"]}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=2))
    return folder


def write_all(root: Path, image: Writer) -> None:
    """Every set of `domains.DOMAINS`, with two classes, MNIST with ten."""
    write_aircraft(root, image)
    write_mnist(root)
    write_cifar(root)
    for name, domain in domains.DOMAINS.items():
        if domain.split:
            write_split(name, root, image)
