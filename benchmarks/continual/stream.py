# SPDX-License-Identifier: Apache-2.0
"""What a run learns: a stream of tasks with disjoint classes, and the frozen backbone that is adapted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from fused_ewclora.demo.formats import DataError

if TYPE_CHECKING:
    from .learner import Learner

Inputs = Tensor | tuple[Tensor, ...]


class Arrays(Dataset[Any]):
    """Examples in memory: inputs, a tensor `[N, ...]` or a tuple of them, and labels `[N]` int64.

    An index may be a list, which makes a batch without collating examples one by one.
    """

    def __init__(self, inputs: Inputs, labels: Tensor) -> None:
        for value in inputs if isinstance(inputs, tuple) else (inputs,):
            if len(value) != len(labels):
                raise DataError(f"inputs: expected {len(labels)} examples, one per label, got {len(value)}")
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | list[int]) -> tuple[Inputs, Tensor]:
        if isinstance(self.inputs, tuple):
            return tuple(value[index] for value in self.inputs), self.labels[index]
        return self.inputs[index], self.labels[index]


@dataclass(frozen=True)
class Task:
    """Training and test examples `(inputs, label)` of some classes; a label is a position in `classes`.

    train_as_test: the training examples prepared as those for testing; None where `train` is that.
    """

    classes: tuple[str, ...]
    train: Dataset[Any]
    test: Dataset[Any]
    train_as_test: Dataset[Any] | None = None


@dataclass(frozen=True)
class Stream:
    """Tasks in the order in which they are learned; sizes may differ, classes may not repeat.

    Raises `DataError` for no task at all, a task without classes or examples, and a class seen twice.
    """

    name: str
    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        if not self.tasks:
            raise DataError(f"{self.name}: expected at least one task, got none")
        seen: dict[str, int] = {}
        for number, task in enumerate(self.tasks):
            if not task.classes:
                raise DataError(f"{self.name}: task {number}: expected at least one class, got none")
            for kind, data in (("training", task.train), ("test", task.test)):
                if size(data) == 0:
                    raise DataError(f"{self.name}: task {number}: expected {kind} examples, got none")
            for name in task.classes:
                if name in seen:
                    raise DataError(
                        f"{self.name}: class {name!r} is in task {seen[name]} and again in task {number}"
                    )
                seen[name] = number


@dataclass(frozen=True)
class Problem:
    """A stream and the backbone that learns it.

    backbone: frozen modules; runs copy it and never change it. learner: what a run makes of the copy; None is
    `learner.Heads`, for which the backbone maps inputs to features `[N, dim]`, and `backbone.dim` is their
    width. facts: descriptive values for the record (for instance the accuracy of a base that was trained
    here).
    """

    stream: Stream
    backbone: nn.Module
    facts: dict[str, Any] = field(default_factory=dict)
    learner: Callable[[nn.Module], Learner] | None = None


def size(data: Dataset[Any]) -> int:
    """Number of examples."""
    return len(data)  # type: ignore[arg-type]


def loader(
    data: Dataset[Any],
    batch_size: int,
    generator: torch.Generator | None = None,
    workers: int = 0,
    drop_last: bool = False,
) -> DataLoader[Any]:
    """Batches (inputs, labels), shuffled if a generator is given; the last one may be smaller, unless such a
    one is dropped."""
    order = SequentialSampler(data) if generator is None else RandomSampler(data, generator=generator)  # type: ignore[arg-type]
    if isinstance(data, Arrays):
        return DataLoader(data, sampler=BatchSampler(order, batch_size, drop_last=drop_last), batch_size=None)
    return DataLoader(
        data,
        batch_size,
        sampler=order,
        num_workers=workers,
        persistent_workers=workers > 0,
        drop_last=drop_last,
    )


def split_classes(classes: Sequence[str], tasks: int | Sequence[int]) -> Iterator[tuple[str, ...]]:
    """Consecutive classes of each task: a number of tasks of nearly equal size, or tasks with these numbers
    of classes, which need not use all classes.

    Raises `DataError` when there are fewer classes than asked for, or a task would get none.
    """
    if isinstance(tasks, int):
        share, rest = divmod(len(classes), max(tasks, 1))
        sizes = [share + (number < rest) for number in range(tasks)]
    else:
        sizes = list(tasks)
    if not sizes or min(sizes) < 1:
        raise DataError(f"tasks: expected at least one class per task, got {sizes} of {len(classes)} classes")
    if sum(sizes) > len(classes):
        raise DataError(f"tasks: {sizes} are {sum(sizes)} classes, the data have {len(classes)}")
    start = 0
    for count in sizes:
        yield tuple(classes[start : start + count])
        start += count
