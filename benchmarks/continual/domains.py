# SPDX-License-Identifier: Apache-2.0
"""The image sets of X-TAIL and MTIL from their official files, in the published splits of CoOp.

Expected layouts in the data folder (`DOMAINS`; docs/reproduce/clip.md lists them):

    <folder>/split_zhou_<Name>.json    {"train": [[path, label, class], ...], "val": ..., "test": ...}
    fgvc_aircraft/variants.txt, images_variant_{train,test}.txt, images/*.jpg
    MNIST/raw/*-ubyte[.gz]             as torchvision stores it
    cifar-100-python/{train,test,meta}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fused_ewclora.demo.formats import DataError, read_idx_pair

from . import image_sets
from .image_sets import Collection, Examples

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Domain:
    """An image set: where it is, how it is read, and the text of a class, template.format(name).

    folders: the names that its folder may have; images: the folder of paths in the split, below it; split:
    the name of the file of splits, empty for sets of another form.
    """

    folders: tuple[str, ...]
    template: str
    split: str = ""
    images: str = ""
    suffix: str = ""  # of names of classes
    reader: Callable[[Path], Collection] | None = None

    def folder(self, root: Path) -> Path:
        """Its folder in `root`; raises `DataError` that names the alternatives."""
        for name in self.folders:
            if (root / name).is_dir():
                return root / name
        raise DataError(f"{root}: expected a folder {' or '.join(self.folders)}, found none")

    def text(self, name: str) -> str:
        """The prompt of a class."""
        return self.template.format(name + self.suffix)


def read(domain: str, root: Path) -> Collection:
    """All images of one of `DOMAINS` for training and for testing; the validation split is not used.

    Raises `DataError` that names the file and what was expected.

        >>> read("EuroSAT", Path("data")).classes[:2]
        ('Annual Crop Land', 'Forest')
    """
    known = DOMAINS[check(domain)]
    folder = known.folder(root)
    return known.reader(folder) if known.reader else _split_file(domain, folder, known)


def check(domain: Any) -> str:
    """The name of a domain; raises `DataError` for any other value."""
    if not isinstance(domain, str) or domain not in DOMAINS:
        raise DataError(f"datasets: expected names of {', '.join(DOMAINS)}, got {domain!r}")
    return domain


def few(examples: Examples, shots: int, seed: int) -> Examples:
    """`shots` images of every class, drawn with the seed, in the order of classes; of classes that have fewer
    some are drawn several times, as the official code does."""
    random = np.random.RandomState(seed)  # the same draws in all versions of NumPy
    chosen = []
    for label in np.unique(examples.labels):
        places = np.flatnonzero(examples.labels == label)
        chosen.append(random.choice(places, shots, replace=len(places) < shots))
    index = np.concatenate(chosen)
    images = examples.images
    kept = images[index] if isinstance(images, np.ndarray) else [images[i] for i in index.tolist()]
    return Examples(kept, examples.labels[index])


def _split_file(name: str, folder: Path, domain: Domain) -> Collection:
    file = folder / domain.split
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: expected the published split as JSON: {error}") from error
    if not isinstance(content, dict) or any(not isinstance(content.get(s), list) for s in ("train", "test")):
        raise DataError(f'{file}: expected {{"train": [...], "val": [...], "test": [...]}}')
    files = _Files(folder / domain.images)
    names: dict[int, str] = {}
    splits = []
    for split in ("train", "test"):
        paths, labels = [], []
        for number, entry in enumerate(content[split]):
            where = f"{file}: {split}[{number}]"
            path, label, class_name = _entry(entry, where)
            if (known := names.setdefault(label, class_name)) != class_name:
                raise DataError(
                    f"{where}: label {label} is class {class_name!r} here and {known!r} elsewhere"
                )
            paths.append(files.found(path, where))
            labels.append(label)
        splits.append(Examples(paths, np.array(labels, np.int64)))
    return Collection(name, _classes(names, file), *splits)


def _entry(entry: Any, where: str) -> tuple[str, int, str]:
    if isinstance(entry, list) and len(entry) == 3:
        path, label, name = entry
        whole = isinstance(label, int) and not isinstance(label, bool) and label >= 0
        if isinstance(path, str) and whole and isinstance(name, str) and name:
            return path, label, name
    raise DataError(f"{where}: expected [path, label >= 0, class], got {entry!r}")


def _classes(names: dict[int, str], file: Path) -> tuple[str, ...]:
    if sorted(names) != list(range(len(names))) or not names:
        raise DataError(f"{file}: expected labels 0, 1, 2 and so on, one per class, got {sorted(names)[:5]}")
    classes = tuple(names[label] for label in range(len(names)))
    _distinct(classes, file)
    return classes


def _distinct(classes: Sequence[str], file: Path) -> None:
    if twice := [name for name in classes if classes.count(name) > 1]:
        raise DataError(f"{file}: expected a name for each class, but two have the name {twice[0]!r}")


class _Files:
    """The files below a folder; every folder is listed once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._present = folder, dict[Path, set[str]]()

    def found(self, path: str, where: str) -> Path:
        """The file of a path; raises `DataError` for one that is missing or outside of the folder."""
        if not path or path.startswith("/") or {"", ".", ".."} & set(path.split("/")):
            raise DataError(f"{where}: expected a path below {self.folder}, got {path!r}")
        file = self.folder / path
        if file.parent not in self._present:
            exists = file.parent.is_dir()
            self._present[file.parent] = {entry.name for entry in file.parent.iterdir()} if exists else set()
        if file.name not in self._present[file.parent]:
            raise DataError(f"{where}: {file}: expected an image, found no such file")
        return file


def _aircraft(folder: Path) -> Collection:
    """100 variants, with the official split; lines of its lists are "<image> <variant>"."""
    classes = tuple(line.strip() for line in _lines(folder / "variants.txt") if line.strip())
    if not classes:
        raise DataError(f"{folder / 'variants.txt'}: expected a variant per line, found none")
    _distinct(classes, folder / "variants.txt")
    numbers = {name: label for label, name in enumerate(classes)}
    files = _Files(folder / "images")

    def examples(split: str) -> Examples:
        file = folder / f"images_variant_{split}.txt"
        paths, labels = [], []
        for number, line in enumerate(_lines(file), 1):
            image, _, name = line.strip().partition(" ")
            if name not in numbers:
                raise DataError(
                    f"{file}: line {number}: expected <image> <variant>, one of variants.txt, got {line!r}"
                )
            paths.append(files.found(f"{image}.jpg", f"{file}: line {number}"))
            labels.append(numbers[name])
        return Examples(paths, np.array(labels, np.int64))

    return Collection("Aircraft", classes, examples("train"), examples("test"))


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def _mnist(folder: Path) -> Collection:
    """Ten digits; classes have the names that the official code makes of torchvision's."""

    def examples(split: str) -> Examples:
        images, labels = read_idx_pair(folder / "raw", split)
        return Examples(np.ascontiguousarray(images[:, 0]), labels.astype(np.int64))

    classes = tuple(f'number: "{digit} - {word}"' for digit, word in enumerate(DIGITS))
    return Collection("MNIST", classes, examples("train"), examples("t10k"))


def _cifar100(folder: Path) -> Collection:
    found = image_sets.cifar100(folder.parent, 0)
    classes = tuple(name.replace("_", " ") for name in found.classes)
    return Collection("CIFAR100", classes, found.train, found.test)


PHOTO = "a photo of a {}."
# By the name in the papers; templates are the ones that the official code trains and tests with.
DOMAINS = {
    "Aircraft": Domain(("fgvc_aircraft",), "a photo of a {}, a type of aircraft.", reader=_aircraft),
    "Caltech101": Domain(
        ("caltech-101", "caltech101"), PHOTO, "split_zhou_Caltech101.json", "101_ObjectCategories"
    ),
    "CIFAR100": Domain(("cifar-100-python",), PHOTO, reader=_cifar100),
    "DTD": Domain(("dtd",), "{} texture.", "split_zhou_DescribableTextures.json", "images"),
    "EuroSAT": Domain(
        ("eurosat",), "a centered satellite photo of {}.", "split_zhou_EuroSAT.json", "2750",
        " satellite location",
    ),
    "Flowers": Domain(
        ("oxford_flowers",), "a photo of a {}, a type of flower.", "split_zhou_OxfordFlowers.json", "jpg"
    ),
    "Food": Domain(("food-101",), "a photo of {}, a type of food.", "split_zhou_Food101.json", "images"),
    "MNIST": Domain(("MNIST",), 'a photo of the number: "{}".', reader=_mnist),
    "OxfordPet": Domain(
        ("oxford_pets",), "a photo of a {}, a type of pet.", "split_zhou_OxfordPets.json", "images"
    ),
    "StanfordCars": Domain(("stanford_cars",), PHOTO, "split_zhou_StanfordCars.json"),
    "SUN397": Domain(("sun397",), PHOTO, "split_zhou_SUN397.json", "SUN397"),
}  # fmt: skip
ORDERS = {
    "x-tail": (
        "Aircraft", "Caltech101", "DTD", "EuroSAT", "Flowers", "Food", "MNIST", "OxfordPet", "StanfordCars",
        "SUN397",
    ),
    "mtil-1": (
        "Aircraft", "Caltech101", "CIFAR100", "DTD", "EuroSAT", "Flowers", "Food", "MNIST", "OxfordPet",
        "StanfordCars", "SUN397",
    ),
    "mtil-2": (
        "StanfordCars", "Food", "MNIST", "OxfordPet", "Flowers", "SUN397", "Aircraft", "Caltech101", "DTD",
        "EuroSAT", "CIFAR100",
    ),
}  # fmt: skip
