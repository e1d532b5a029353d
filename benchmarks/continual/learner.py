# SPDX-License-Identifier: Apache-2.0
"""What a run trains: the adapted network, and what the tasks of a stream need beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_ewclora.demo.evaluation import accuracies
from fused_ewclora.demo.vit import Classifier
from fused_ewclora.methods import Method

from .stream import Task

# Accuracies in percent by protocol. "class_incremental" and "task_aware": one for every task that has begun.
# "every_task", of learners that can name classes which they were not trained on: one for every task.
Scores = dict[str, list[float]]
# The test examples of a task: inputs on the device of the model, and labels on the CPU.
Batches = Callable[[Task], Iterable[tuple[Any, Tensor]]]


class Learner(nn.Module):
    """A network that learns the tasks of a stream one after the other.

    `backbone` is frozen and carries the adapters; `forward(inputs)` returns what `loss(outputs, labels)`, the
    mean over the examples of a batch, takes. Both also serve the passes over data of methods.
    """

    backbone: nn.Module
    # Whether `scores` has "every_task"; a run then also asks for it before the first task.
    every_task = False

    def begin_task(self, task: Task) -> None:
        """Prepares for the classes of the next task. A resumed run begins all tasks so far anew, and then
        loads the state of the module."""
        raise NotImplementedError

    def check_method(self, method: Method) -> None:
        """Raises `ArgumentError` for a method that could not end a task of this network. A run calls it
        before its first task, with the adapters of the method in the backbone."""

    def trained(self) -> list[nn.Parameter]:
        """The parameters that the current task trains beside the adapters, at the rate `head_lr`."""
        return []

    def loss(self, outputs: Any, labels: Tensor) -> Tensor:
        """The loss of a batch of the current task, 0-d."""
        raise NotImplementedError

    def scores(self, tasks: Sequence[Task], begun: int, batches: Batches) -> Scores:
        """Accuracies after `begun` of the tasks have begun."""
        raise NotImplementedError


class Heads(Classifier, Learner):
    """A linear head per task on the features of the backbone, `[N, backbone.dim]`."""

    loss = staticmethod(F.cross_entropy)  # type: ignore[assignment]
    # Of methods that have a model for every task: a context in which the backbone is that of task k.
    of_task: Callable[[int], AbstractContextManager[Any]] | None = None

    def begin_task(self, task: Task) -> None:
        """Adds the head of a task, and freezes those of earlier ones."""
        device = next(self.backbone.parameters()).device
        self.add_head(len(task.classes)).to(device)

    def trained(self) -> list[nn.Parameter]:
        """Those of the newest head."""
        return list(self.heads[-1].parameters())

    def all_logits(self, images: Tensor) -> Tensor:
        """Logits of all heads side by side, `[N, classes seen so far]`, each on the features of its task."""
        if self.of_task is None:
            return super().all_logits(images)
        logits = []
        for number, head in enumerate(self.heads):
            with self.of_task(number):
                logits.append(head(self.backbone(images)))
        return torch.cat(logits, dim=1)

    def scores(self, tasks: Sequence[Task], begun: int, batches: Batches) -> Scores:
        """Class-incremental: the largest logit of all heads; task-aware: that of the task's own head."""
        seen = [(len(task.classes), batches(task)) for task in tasks[:begun]]
        incremental, aware = accuracies(self, seen)
        return {"class_incremental": incremental, "task_aware": aware}
