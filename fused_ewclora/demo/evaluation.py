# SPDX-License-Identifier: Apache-2.0
"""Accuracies of a classifier with one head per task, on batches of test examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fused_ewclora as fe

from .vit import Classifier

PERCENT = 100.0
# The number of classes of a task, and batches of inputs, on the device of the model, and labels, on the CPU.
TestBatches = tuple[int, Iterable[tuple[Any, Tensor]]]


@torch.no_grad()
def accuracies(model: Classifier, tasks: Sequence[TestBatches]) -> tuple[list[float], list[float]]:
    """Class-incremental and task-aware accuracy on every task, in percent; labels count from 0 within a task.

    Class-incremental: the largest logit of all heads. Task-aware: the largest logit of the task's own head.
    """
    class_incremental, task_aware, offset = [], [], 0
    for classes, batches in tasks:
        own = slice(offset, offset + classes)
        incremental = aware = count = 0
        for inputs, labels in batches:
            logits = model.all_logits(inputs).cpu()
            incremental += int((logits.argmax(1) == labels + offset).sum())
            aware += int((logits[:, own].argmax(1) == labels).sum())
            count += len(labels)
        class_incremental.append(PERCENT * incremental / count)
        task_aware.append(PERCENT * aware / count)
        offset = own.stop
    return class_incremental, task_aware


def check_finite(model: nn.Module, where: str) -> None:
    """Raises `EWCLoRAError` for a model with values that are not finite: its accuracies would look like those
    of a bad method."""
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
            raise fe.EWCLoRAError(
                f"{where}: {name} is not finite after training; lower the learning rate or the lambda"
            )
