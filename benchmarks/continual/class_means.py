# SPDX-License-Identifier: Apache-2.0
"""Cosine heads whose rows become the means of classes: a classifier that is not trained on after its task."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_ewclora.demo.formats import DataError
from fused_ewclora.errors import ArgumentError
from fused_ewclora.ewc.estimation import to_device
from fused_ewclora.methods import Method
from fused_ewclora.methods.method import Loader

from .learner import Heads, Learner
from .protocols import Protocol
from .stream import Task


class CosineHead(nn.Module):
    """Logits sigma cos(x, w_k) of features x `[N, dim]` and a row w_k for every class; sigma starts at 1."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        bound = dim**-0.5
        self.weight = nn.Parameter(torch.empty(classes, dim).uniform_(-bound, bound))
        self.sigma = nn.Parameter(torch.ones(()))

    def forward(self, features: Tensor) -> Tensor:
        return self.sigma * F.normalize(features, dim=1) @ F.normalize(self.weight, dim=1).T


class CosineHeads(Heads):
    """A cosine head per task on the features of the backbone."""

    def begin_task(self, task: Task) -> None:
        """Adds the head of a task, and freezes those of earlier ones."""
        self.heads.requires_grad_(False)
        device = next(self.backbone.parameters()).device
        self.heads.append(CosineHead(self.backbone.dim, len(task.classes)).to(device))


class ClassMeans(Protocol):
    """Tasks train cosine heads. After a task the rows of its head become the means of the features of its
    classes, of training examples prepared as those for testing, and sigma becomes 1; the class with the
    highest cosine counts."""

    learner = CosineHeads

    def attach(self, model: Learner, method: Method) -> None:
        """Raises `ArgumentError` for models without cosine heads."""
        if not isinstance(model, CosineHeads):
            raise ArgumentError(
                "protocol: expected a problem without a learner of its own, for cosine heads, got "
                f"{type(model).__name__}"
            )
        super().attach(model, method)

    def before_steps(self, optimizer: torch.optim.Optimizer, examples: Loader) -> None:
        self.optimizer, self.examples = optimizer, examples

    def of_task(self, number: int) -> AbstractContextManager[Any]:
        """A context in which the model gives the features that a task is tested with."""
        return nullcontext()

    def after_task(self, number: int, batches: Loader, device: torch.device) -> None:
        """Class means take the place of the rows of the head."""
        assert isinstance(self.model, CosineHeads)
        head = self.model.heads[number]
        assert isinstance(head, CosineHead)
        self.model.eval()
        with torch.no_grad(), self.of_task(number):
            features = ((self.model.backbone(to_device(x, device)), y.to(device)) for x, y in self.examples)
            head.weight.copy_(class_means(features, len(head.weight)))
            head.sigma.fill_(1.0)


def class_means(batches: Iterable[tuple[Tensor, Tensor]], classes: int) -> Tensor:
    """`[classes, dim]` in fp64, of features `[N, dim]` and labels `[N]`; raises `DataError` for a class
    without any."""
    features, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    of_class = F.one_hot(labels, classes).double()
    counts = of_class.sum(0)
    if not bool(counts.all()):
        raise DataError(
            f"class means: expected training examples of {classes} classes, got {counts.tolist()}"
        )
    return of_class.T @ features.double() / counts[:, None]
