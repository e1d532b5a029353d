# SPDX-License-Identifier: Apache-2.0
"""Published image sets from their official files: the images of every class in every split.

Only CIFAR-100 is decoded here, whose images are arrays in one file. Expected layouts in the data folder:

    cifar-100-python/{train,test,meta}            the archive "CIFAR-100 python version", extracted
    imagenet-r/<wnid>/*, imagenet-a/<wnid>/*      as released, or split as train/<wnid>/*, test/<wnid>/*
    domainnet/<domain>/<class>/*                  six domains, and <domain>_train.txt, <domain>_test.txt

Images of your own: "folder:<path>", a folder of images per class as ImageFolder of torchvision reads it,
split as train/<class>/* and test/<class>/* (or val/<class>/*) or not at all; "datasets:<path or name>",
images of the package datasets (`hub_images`).
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fused_ewclora.demo.formats import (
    IMAGE_SUFFIXES,
    DataError,
    class_folders,
    read_bytes,
    read_cifar100,
    restricted_unpickle,
)

TEST_SHARE = 0.2  # of each class, for sets that are released without a split
DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")


@dataclass(frozen=True)
class Examples:
    """Images, as files, uint8 `[N, H, W, 3]` or `[N, H, W]`, or images of PIL, and labels `[N]` int64,
    positions in the classes."""

    images: Sequence[Any] | np.ndarray
    labels: np.ndarray

    def of(self, classes: Sequence[int]) -> Examples:
        """Those of some classes, labelled by their positions in `classes`, in the order of the files."""
        positions = {label: position for position, label in enumerate(classes)}
        index = np.flatnonzero(np.isin(self.labels, list(classes)))
        labels = np.array([positions[label] for label in self.labels[index].tolist()], np.int64)
        if isinstance(self.images, np.ndarray):
            return Examples(self.images[index], labels)
        return Examples(_Chosen(self.images, index.tolist()), labels)


class _Chosen(Sequence[Any]):
    """Some of the images, read on access."""

    def __init__(self, images: Sequence[Any], index: list[int]) -> None:
        self.images, self.index = images, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: Any) -> Any:
        return self.images[self.index[position]]


@dataclass(frozen=True)
class Collection:
    """An image set. Raises `DataError` for a class without images in one of the splits."""

    name: str
    classes: tuple[str, ...]
    train: Examples
    test: Examples

    def __post_init__(self) -> None:
        for split, examples in (("training", self.train), ("test", self.test)):
            if len(examples.images) != len(examples.labels):
                raise DataError(
                    f"{self.name}: {split}: {len(examples.images)} images but {len(examples.labels)} labels"
                )
            wrong = (examples.labels < 0) | (examples.labels >= len(self.classes))
            if wrong.any():
                raise DataError(
                    f"{self.name}: {split}: expected labels 0..{len(self.classes) - 1}, "
                    f"got {examples.labels[wrong][0]}"
                )
            counts = np.bincount(examples.labels, minlength=len(self.classes))
            if not counts.all():
                name = self.classes[int(counts.argmin())]
                raise DataError(f"{self.name}: class {name}: expected {split} images, found none")


def read(dataset: str, root: Path, split_seed: int = 0) -> Collection:
    """One of `READERS`, or images of your own, from the data folder `root`; split_seed: for sets without a
    split.

    Raises `DataError` that names the files it expects.

        >>> read("cifar100", Path("data")).classes[:2]
        ('apple', 'aquarium_fish')
    """
    kind, _, rest = str(dataset).partition(":")
    if kind == "folder" and rest:
        return folders(rest, "a folder of images")(root, split_seed)
    if kind == "datasets" and rest:
        return hub_images(rest, root)
    if dataset not in READERS:
        known = ", ".join(READERS)
        raise DataError(f"dataset: expected one of {known}, folder:PATH or datasets:NAME, got {dataset!r}")
    return READERS[dataset](root, split_seed)


def cifar100(root: Path, split_seed: int) -> Collection:
    """60,000 images of 100 classes, with the official split."""
    folder = root / "cifar-100-python"
    for name in ("train", "test", "meta"):
        if not (folder / name).is_file():
            raise DataError(
                f"{folder}: expected the files train, test and meta of CIFAR-100 (its archive "
                f"cifar-100-python.tar.gz, extracted in {root}), found no {name}"
            )
    meta = restricted_unpickle(io.BytesIO(read_bytes(folder / "meta")), str(folder / "meta"))
    names = meta.get(b"fine_label_names") if isinstance(meta, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise DataError(f"{folder / 'meta'}: expected a list fine_label_names")
    classes = tuple(name.decode() for name in names)

    def examples(split: str) -> Examples:
        images, labels = read_cifar100(folder / split)
        return Examples(np.ascontiguousarray(images.transpose(0, 2, 3, 1)), labels.astype(np.int64))

    return Collection("cifar100", classes, examples("train"), examples("test"))


def folders(name: str, official: str) -> Callable[[Path, int], Collection]:
    """A reader of folders of images per class, `root/<name>`; `official` is what to look for."""

    def collect(root: Path, split_seed: int) -> Collection:
        folder = root / name
        if not folder.is_dir():
            raise DataError(
                f"{folder}: expected {official}, one folder of images per class, or already split as "
                "train/<class>/* and test/<class>/*; found no such folder"
            )
        if (folder / "train").is_dir() or (folder / "test").is_dir() or (folder / "val").is_dir():
            return _split_folders(name, folder)
        return _unsplit_folders(name, folder, split_seed)

    return collect


def domainnet(root: Path, split_seed: int) -> Collection:
    """345 classes, each with images of all six domains, split by the official lists.

    A line of a list is "<path below domainnet> <label>"; classes are in the order of these labels.
    """
    folder = root / "domainnet"
    files = [f"{domain}_{split}.txt" for domain in DOMAINS for split in ("train", "test")]
    for file in files:
        if not (folder / file).is_file():
            raise DataError(
                f"{folder}: expected the images of DomainNet (cleaned version) as <domain>/<class>/* and the "
                f"lists <domain>_train.txt, <domain>_test.txt for {', '.join(DOMAINS)}; found no {file}"
            )
    names: dict[int, str] = {}
    present: dict[Path, set[str]] = {}  # files by folder, so that every folder is listed once
    splits = {
        split: [
            entry for domain in DOMAINS for entry in _listed(folder, f"{domain}_{split}.txt", names, present)
        ]
        for split in ("train", "test")
    }
    if sorted(names) != list(range(len(names))) or len(set(names.values())) != len(names):
        raise DataError(
            f"{folder}: expected labels 0..{len(names) - 1}, one per class, "
            f"got {sorted(names.items())[:3]} and others"
        )
    train, test = (
        Examples([path for path, _ in entries], np.array([label for _, label in entries], np.int64))
        for entries in splits.values()
    )
    return Collection("domainnet", tuple(names[label] for label in sorted(names)), train, test)


def hub_images(name: str, root: Path) -> Collection:
    """A data set of the package datasets, by its name on the hub or the path of `save_to_disk` below root.

    Splits "train" and "test" (or "validation"); a column of images, "image" or "img", and one of class
    labels, "label" or "fine_label".
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(f"dataset: datasets:{name}: pip install datasets ({error})") from error
    where, local = f"datasets:{name}", root / name
    try:
        found = datasets.load_from_disk(str(local)) if local.is_dir() else datasets.load_dataset(name)
    except Exception as error:  # of the hub client, HTTP or files
        raise DataError(f"{where}: cannot be loaded: {type(error).__name__}: {error}") from error
    held_out = "test" if "test" in found else "validation"
    if missing := [split for split in ("train", held_out) if split not in found]:
        raise DataError(f"{where}: expected splits train and test, found no {missing[0]} in {sorted(found)}")
    columns = found["train"].features
    image, label = (
        next((column for column in names if column in columns), None)
        for names in (("image", "img"), ("label", "fine_label"))
    )
    if image is None or label is None or not hasattr(columns[label], "names"):
        raise DataError(f"{where}: expected columns image and label (of classes), got {sorted(columns)}")

    def examples(split: str) -> Examples:
        data = found[split]
        return Examples(_Column(data, image), np.asarray(data[label], np.int64))

    return Collection(name, tuple(columns[label].names), examples("train"), examples(held_out))


class _Column(Sequence[Any]):
    """The images of a data set, decoded on access."""

    def __init__(self, data: Any, column: str) -> None:
        self.data, self.column = data, column

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> Any:
        return self.data[int(index)][self.column]


READERS: dict[str, Callable[[Path, int], Collection]] = {
    "cifar100": cifar100,
    "imagenet-r": folders("imagenet-r", "ImageNet-R (its archive imagenet-r.tar, extracted)"),
    "imagenet-a": folders("imagenet-a", "ImageNet-A (its archive imagenet-a.tar, extracted)"),
    "domainnet": domainnet,
}


def _images(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"{folder}: expected images ({', '.join(IMAGE_SUFFIXES)}), found none")
    return files


def _examples(files: Sequence[Sequence[Path]]) -> Examples:
    """From the files of each class."""
    labels = np.repeat(np.arange(len(files)), [len(of_class) for of_class in files])
    return Examples([file for of_class in files for file in of_class], labels)


def _split_folders(name: str, folder: Path) -> Collection:
    held_out = "val" if (folder / "val").is_dir() and not (folder / "test").is_dir() else "test"
    classes, tested = class_folders(folder / "train"), class_folders(folder / held_out)
    if differing := sorted(set(classes) ^ set(tested)):
        where, lacking = ("train", held_out) if differing[0] in classes else (held_out, "train")
        raise DataError(f"{folder}: class {differing[0]} is in {where} and not in {lacking}")
    train, test = (_examples([_images(folder / split / c) for c in classes]) for split in ("train", held_out))
    return Collection(name, tuple(classes), train, test)


def _unsplit_folders(name: str, folder: Path, split_seed: int) -> Collection:
    """A fifth of each class, but at least one image, is for testing, the same images in every run.

    The published splits of these sets were drawn once and are lists of files; this one has the same size.
    """
    # The legacy generator: its permutations are the same in all versions of NumPy.
    random = np.random.RandomState(split_seed)
    classes = class_folders(folder)
    train, test = [], []
    for class_name in classes:
        files = _images(folder / class_name)
        if len(files) < 2:
            raise DataError(f"{folder / class_name}: expected at least 2 images, one for testing, got 1")
        order = random.permutation(len(files))
        count = max(1, round(TEST_SHARE * len(files)))
        test.append([files[i] for i in sorted(order[:count])])
        train.append([files[i] for i in sorted(order[count:])])
    return Collection(name, tuple(classes), _examples(train), _examples(test))


def _listed(
    folder: Path, name: str, names: dict[int, str], present: dict[Path, set[str]]
) -> list[tuple[Path, int]]:
    """(file, label) of each line of a list; `names` collects the class of each label."""
    entries = []
    try:
        lines = (folder / name).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder / name}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{folder / name}: line {number}"
        path, _, label = line.strip().rpartition(" ")
        parts = path.split("/")
        if len(parts) != 3 or {"", ".", ".."} & set(parts) or not label.isdecimal():
            raise DataError(f"{where}: expected <domain>/<class>/<file> <label>, got {line!r}")
        if (known := names.setdefault(int(label), parts[1])) != parts[1]:
            raise DataError(f"{where}: label {label} is class {parts[1]} here and {known} elsewhere")
        file = folder / path
        if file.parent not in present:
            exists = file.parent.is_dir()
            present[file.parent] = {entry.name for entry in file.parent.iterdir()} if exists else set()
        if file.name not in present[file.parent]:
            raise DataError(f"{where}: {file}: expected an image, found no such file")
        entries.append((file, int(label)))
    return entries
