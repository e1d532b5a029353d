# SPDX-License-Identifier: Apache-2.0
"""CL-LoRA (arXiv 2505.24816) as its authors train and test it: distillation through an early exit, cosine
heads, class means."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from fused_ewclora.errors import ArgumentError
from fused_ewclora.methods import CLLoRA, Method

from .class_means import ClassMeans
from .learner import Learner


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


class SharedDistillation(ClassMeans):
    """What the authors of CL-LoRA do beside the calls of every method.

    From the second task on every batch first goes through the early exit behind the shared blocks and the
    head of the task, for the distillation of the method (none where its kd_weight is 0) and the reassignment
    of its gradient. Class means are those under the adapters of their task, and an example is tested with the
    adapters of every task.

    separate_step: whether the optimizer takes a step for the distillation alone, as in the official code;
    otherwise its gradients are added to those of the loss.
    """

    method: CLLoRA

    def __init__(self, separate_step: bool = False) -> None:
        if not isinstance(separate_step, bool):
            raise ArgumentError(f"protocol: separate_step: expected true or false, got {separate_step!r}")
        self.separate_step = separate_step

    def attach(self, model: Learner, method: Method) -> None:
        """Raises `ArgumentError` for other methods, models without cosine heads, and where there is no exit
        behind the shared layers."""
        if not isinstance(method, CLLoRA):
            raise ArgumentError(f"protocol: expected the method CLLoRA, got {type(method).__name__}")
        super().attach(model, method)
        self.model.of_task = method.task
        self.exit = EarlyExit(model, method)

    def of_task(self, number: int) -> AbstractContextManager[Any]:
        return self.method.task(number)

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
