# SPDX-License-Identifier: Apache-2.0
"""CL-LoRA (arXiv 2505.24816) as its authors train and test it: distillation through an early exit, cosine
heads, class means."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_ewclora.demo.formats import DataError
from fused_ewclora.errors import ArgumentError
from fused_ewclora.ewc.estimation import to_device
from fused_ewclora.methods import CLLoRA, Method
from fused_ewclora.methods.method import Loader

from .learner import Heads, Learner
from .protocols import ModelPerTask
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


class EarlyExit:
    """A network without the blocks behind its shared ones, so that what follows the last block (a norm, the
    class token or a mean of tokens) is applied to what the last shared block computes.

    The blocks are those of the module list or sequence that has all adapted layers. Raises `ArgumentError`
    where there is none, and where the shared layers are not those of its first blocks.
    """

    def __init__(self, model: nn.Module, method: CLLoRA) -> None:
        names = [name.split(".") for name in method.layers]
        same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))
        path = [parts[0] for parts in same]
        while path and not isinstance(model.get_submodule(".".join(path)), (nn.ModuleList, nn.Sequential)):
            path.pop()
        if not path:
            raise ArgumentError(
                "protocol: expected adapters in blocks of one nn.ModuleList or nn.Sequential, which can be "
                f"cut off behind the shared ones, got {', '.join(list(method.layers)[:3])}"
            )
        self.model, self.path, depth = model, path, len(path)
        order = [name for name, _ in self._blocks.named_children()]
        position = {".".join(name): order.index(name[depth]) for name in names}
        self.count = 1 + max(position[name] for name in method.shared_layers)
        if early := [
            name for name in position if name not in method.shared_layers and position[name] < self.count
        ]:
            raise ArgumentError(
                f"shared: expected all adapters of the first blocks of {'.'.join(path)} and no others, got "
                f"{', '.join(method.shared_layers)} without {early[0]}"
            )

    @property
    def _blocks(self) -> nn.ModuleList | nn.Sequential:
        found = self.model.get_submodule(".".join(self.path))
        assert isinstance(found, (nn.ModuleList, nn.Sequential))
        return found

    @contextmanager
    def taken(self) -> Iterator[None]:
        """A context in which the model runs through the exit."""
        owner, name, blocks = self.model.get_submodule(".".join(self.path[:-1])), self.path[-1], self._blocks
        setattr(owner, name, blocks[: self.count])
        try:
            yield
        finally:
            setattr(owner, name, blocks)


class SharedDistillation(ModelPerTask):
    """What the authors of CL-LoRA do beside the calls of every method.

    From the second task on every batch first goes through the early exit behind the shared blocks and the
    head of the task, for the distillation of the method (none where its kd_weight is 0) and the reassignment
    of its gradient. After a task the rows of its head become the means of the features of its classes, of
    training examples prepared as those for testing, and sigma becomes 1. An example is tested with the
    adapters of every task: the class with the highest cosine counts.

    separate_step: whether the optimizer takes a step for the distillation alone, as in the official code;
    otherwise its gradients are added to those of the loss.
    """

    learner = CosineHeads
    method: CLLoRA

    def __init__(self, separate_step: bool = False) -> None:
        if not isinstance(separate_step, bool):
            raise ArgumentError(f"protocol: separate_step: expected true or false, got {separate_step!r}")
        self.separate_step = separate_step

    def attach(self, model: Learner, method: Method) -> None:
        """Raises `ArgumentError` for other methods, models without cosine heads, and where there is no exit
        behind the shared layers."""
        if not isinstance(method, CLLoRA) or not isinstance(model, CosineHeads):
            raise ArgumentError(
                "protocol: expected CLLoRA and a problem with a head per task, got "
                f"{type(method).__name__} and {type(model).__name__}"
            )
        super().attach(model, method)
        self.exit = EarlyExit(model, method)

    def before_steps(self, optimizer: torch.optim.Optimizer, examples: Loader) -> None:
        self.optimizer, self.examples = optimizer, examples

    def backward(self, x: Any, y: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        if self.method.tasks and self.method.kd_weight:
            self._distil(x)
        return super().backward(x, y, rate)

    def _distil(self, x: Any) -> None:
        with self.exit.taken():
            self.method.distillation(x, self.model).backward()
        self.method.reassign_()
        if self.separate_step:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def after_task(self, number: int, batches: Loader, device: torch.device) -> None:
        """Class means take the place of the rows of the head."""
        assert isinstance(self.model, CosineHeads)
        head = self.model.heads[number]
        assert isinstance(head, CosineHead)
        self.model.eval()
        with torch.no_grad(), self.method.task(number):
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
