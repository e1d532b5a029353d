# SPDX-License-Identifier: Apache-2.0
"""What the protocol of a method asks of a run beside the calls that every method has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fused_ewclora.errors import ArgumentError
from fused_ewclora.methods import Method
from fused_ewclora.methods.method import Loader

from .dotted import named
from .learner import Heads, Learner


class Protocol:
    """The calls of every method and no others; subclasses add what their method's authors do beside them.

    Made with the keywords of a configuration's "protocol" other than "kind", before anything is loaded: wrong
    ones raise `ArgumentError` or `TypeError`. A run then attaches it to its model and method.
    """

    # What a run makes of a backbone where the problem has no learner of its own.
    learner: type[Learner] = Heads

    model: Learner
    method: Method

    def attach(self, model: Learner, method: Method) -> None:
        """Takes the model and the method of a run, before its first task; raises `ArgumentError` for those
        that it is not for."""
        self.model, self.method = model, method

    def before_task(self, number: int, batches: Loader, device: torch.device) -> None:
        """Between `begin_task` and `prepare` of the method; `batches` are those of `prepare`, shuffled anew
        in every pass."""

    def prepare(self, batches: Loader) -> None:
        """Calls `prepare` of the method, after `before_task`."""
        self.method.prepare(batches, self.model.loss)

    def before_steps(self, optimizer: torch.optim.Optimizer, examples: Loader) -> None:
        """Before the first step of a task, with the optimizer that takes them; `examples` are all training
        examples of the task prepared as those for testing, in batches that are not shuffled."""

    def backward(self, x: Any, y: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """Gives the trained parameters the gradients of a step; they have none before. Returns its loss and
        its penalty, 0-d.

        rate: the learning rate of the adapters in this step over that of the first step of the task.
        """
        loss, penalty = self.model.loss(self.model(x), y), self.method.penalty()
        (loss + penalty).backward()
        return loss, penalty

    def after_task(self, number: int, batches: Loader, device: torch.device) -> None:
        """After `end_task` of the method, with the batches of it."""

    def kept_tensors(self) -> Iterable[Tensor]:
        """What it holds from step to step beside the state of the method; counted in a run's record."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """What it remembers from task to task: tensors and plain values in containers."""
        return {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes over a `state_dict()`, after `attach`."""


class ModelPerTask(Protocol):
    """For methods that have a model for every task: each head sees the features of its own task."""

    def attach(self, model: Learner, method: Method) -> None:
        """Raises `ArgumentError` for models without heads and methods without `task`."""
        super().attach(model, method)
        if not isinstance(model, Heads) or not hasattr(method, "task"):
            raise ArgumentError(
                "protocol: expected a problem with a head per task and a method with a model per task, got "
                f"{type(model).__name__} and {type(method).__name__}"
            )
        model.of_task = method.task


# kind -> "module:Class"
PROTOCOLS = {
    "plain": "protocols:Protocol",
    "model-per-task": "protocols:ModelPerTask",
    "tuned-heads": "tuned_heads:TunedHeads",  # IEL, ITA
    "class-means": "class_means:ClassMeans",
    "cl-lora": "cl_lora:SharedDistillation",
}
# Of methods whose runs need one: used where a configuration names none.
OF_METHODS = {"CLLoRA": "model-per-task"}


def make(method_kind: str, protocol: Mapping[str, Any]) -> Protocol:
    """The protocol that a configuration asks for, by {"kind": one of `PROTOCOLS` or "package.module:Class"}
    and its keywords, or that of the kind of method; raises `ArgumentError` for anything else."""
    options = dict(protocol)
    kind = options.pop("kind", OF_METHODS.get(method_kind, "plain") if not options else None)
    if isinstance(kind, str) and kind in PROTOCOLS:
        found = named(f"{__package__}.{PROTOCOLS[kind]}", "protocol: kind")
    else:
        found = named(kind, "protocol: kind") if isinstance(kind, str) and ":" in kind else None
    if not (isinstance(found, type) and issubclass(found, Protocol)):
        known = f'{", ".join(PROTOCOLS)} or "package.module:Class"'
        raise ArgumentError(f"protocol: kind: expected one of {known}, got {kind!r}")
    try:
        return found(**options)
    except TypeError as error:
        raise ArgumentError(f"protocol: {error}") from error
