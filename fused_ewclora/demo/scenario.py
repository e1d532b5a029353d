# SPDX-License-Identifier: Apache-2.0
"""The data of the frozen base, and the classes that are then learned task by task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .data import ImageSet, load_dataset, load_digits, load_mnist
from .formats import DataError


@dataclass(frozen=True)
class Split:
    """Images `[N, C, S, S]` and labels `[N]` of some classes; labels are positions in `classes`."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Scenario:
    """A data set for the base, and another one (or its remaining classes) for the tasks."""

    description: str
    base: ImageSet
    base_classes: tuple[int, ...]
    continual: ImageSet
    continual_classes: tuple[int, ...]


def make_scenario(dataset: str, root: Path, continual: ImageSet | None = None) -> Scenario:
    """MNIST after scikit-learn's digits, Fashion-MNIST after MNIST, else half of the classes after the rest.

    Of the ten digits the base takes four, so that three tasks of two classes remain. continual is the
    data set of the tasks, where it is already loaded.
    """
    continual = load_dataset(dataset, root) if continual is None else continual
    if dataset in ("mnist", "fashion-mnist"):
        base = load_digits() if dataset == "mnist" else load_mnist(root)
        return Scenario(
            f"base: {base.name}, all classes; tasks: {continual.name}, all classes",
            base,
            tuple(range(base.classes)),
            continual,
            tuple(range(continual.classes)),
        )
    cut = 4 if dataset == "digits" else continual.classes // 2
    if cut < 2:
        raise DataError(
            f"{continual.name}: expected at least 4 classes, 2 for the base, got {continual.classes}"
        )
    return Scenario(
        f"base: {continual.name}, classes 0..{cut - 1}; tasks: classes {cut}..{continual.classes - 1}",
        continual,
        tuple(range(cut)),
        continual,
        tuple(range(cut, continual.classes)),
    )


def task_classes(scenario: Scenario, tasks: int, seed: int) -> list[tuple[int, ...]]:
    """Classes of each task, in an order drawn from the seed; at least 2, a softmax over 1 is constant."""
    available = torch.tensor(scenario.continual_classes)
    if len(available) < 2 * tasks:
        raise DataError(
            f"tasks: {tasks} tasks of at least 2 classes need {2 * tasks} classes, got {len(available)}"
        )
    order = available[torch.randperm(len(available), generator=torch.Generator().manual_seed(seed))]
    return [tuple(part.tolist()) for part in torch.tensor_split(order, tasks)]


def select(
    images: ImageSet, classes: tuple[int, ...], per_class: int | None, test_per_class: int | None, seed: int
) -> Split:
    """Images of these classes: for training, drawn with the seed; for testing, the first of each class."""
    generator = torch.Generator().manual_seed(seed)

    def pick(labels: Tensor, limit: int | None, shuffle: bool) -> tuple[Tensor, Tensor]:
        chosen, targets = [], []
        for target, label in enumerate(classes):
            index = (labels == label).nonzero()[:, 0]
            if shuffle:
                index = index[torch.randperm(len(index), generator=generator)]
            chosen.append(index[:limit])
            targets.append(torch.full((len(chosen[-1]),), target))
        return torch.cat(chosen), torch.cat(targets)

    train, train_labels = pick(images.train_labels, per_class, shuffle=True)
    test, test_labels = pick(images.test_labels, test_per_class, shuffle=False)
    return Split(images.train_images[train], train_labels, images.test_images[test], test_labels, classes)
