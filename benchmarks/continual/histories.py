# SPDX-License-Identifier: Apache-2.0
"""A model per task of a sequence, each with the history of that task, ready for training steps (`costs`)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_ewclora as fe
from fused_ewclora.demo.vit import VisionTransformer, key_value_config
from fused_ewclora.errors import ArgumentError, EWCLoRAError
from fused_ewclora.methods import Method, SDLoRA

from . import accounting, looped
from .configuration import METHODS, Training
from .learner import Heads
from .run import make_optimizer

Batch = tuple[Tensor, Tensor]

LOOPED = "LoopedSDLoRA"  # a kind beside those of METHODS
CLASSES = 10  # of every task
CHANNELS = 3
HISTORY_STEPS = 2  # of training in each earlier task, enough that no direction is 0
WARMUP = 3
# Relative error of the fp32 loss, loop against product: sums of about 1e3 terms in two orders, in few layers.
LOSS_TOLERANCE = 1e-4
TRAINING = Training(lr=1e-3, head_lr=5e-3)


@dataclass(frozen=True)
class Network:
    """The transformer of `demo.vit` and its batches of random images, adapters on k and v of each qkv."""

    dim: int = 384
    depth: int = 3
    num_heads: int = 6
    side: int = 28
    patch: int = 4
    batch: int = 16
    rank: int = 10

    def described(self) -> dict[str, int]:
        """As records name it; the class token is one of the tokens."""
        tokens = (self.side // self.patch) ** 2 + 1
        return {
            "dim": self.dim,
            "blocks": self.depth,
            "tokens": tokens,
            "batch": self.batch,
            "rank": self.rank,
        }

    def classifier(self) -> Heads:
        """Without adapters and heads."""
        return Heads(VisionTransformer(self.side, self.patch, CHANNELS, self.dim, self.depth, self.num_heads))

    def config(self) -> fe.LoRAConfig:
        return key_value_config(self.dim, self.rank)

    def example(self, device: torch.device) -> Batch:
        images = torch.rand(self.batch, CHANNELS, self.side, self.side, device=device)
        return images, torch.randint(CLASSES, (self.batch,), device=device)


QUICK = Network(dim=32, depth=1, num_heads=2, side=8, batch=4, rank=4)


class State:
    """A model in one task of a sequence, ready for training steps."""

    def __init__(self, method: Method, kind: str) -> None:
        self.method: Method | None = method
        self.tasks = method.tasks  # that have ended
        self.model = method.model
        if kind == LOOPED:
            assert isinstance(method, SDLoRA)
            looped.unstack_(method)
            self.method = None
        self.optimizer = make_optimizer(self.model, TRAINING)  # type: ignore[arg-type]

    def step(self, batch: Batch) -> float:
        """A whole training step; returns the loss with its penalty, so that a GPU has finished."""
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        if self.method is not None:
            self.method.after_step(0, 1)  # the last of a task, when proximal steps are on
        return loss.item()

    def loss(self, batch: Batch) -> Tensor:
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        return loss if self.method is None else loss + self.method.penalty()

    def adapter_parameters(self) -> int:
        if self.method is not None:
            return accounting.adapter_parameters(self.method)
        return sum(p.numel() for p in looped.parameters(self.model))

    def state_bytes(self) -> int:
        if self.method is not None:
            return accounting.state_bytes(self.method)
        return sum(p.nbytes for p in looped.parameters(self.model))


def histories(
    kind: str, options: Mapping[str, Any], tasks: int, network: Network, device: torch.device, seed: int
) -> list[Method]:
    """One method per task, with a model of its own: number k has ended k tasks on random images, and begun
    and prepared the next.

    kind: of `METHODS`, or `LOOPED` for the SDLoRA that the loop is made from.
    """
    torch.manual_seed(seed)
    model = network.classifier().to(device)
    method: Method = _class(kind)(model, network.config(), **options)
    methods = []
    for task in range(tasks):
        model.add_head(CLASSES).to(device)
        loader = [network.example(device) for _ in range(HISTORY_STEPS)]
        method.begin_task(task)
        method.prepare(loader, F.cross_entropy)
        methods.append(copy.deepcopy(method))
        if task + 1 < tasks:
            optimizer = make_optimizer(model, TRAINING)
            for step, (images, labels) in enumerate(loader):
                optimizer.zero_grad()
                (F.cross_entropy(model(images), labels) + method.penalty()).backward()
                optimizer.step()
                method.after_step(step, len(loader))
            method.end_task(loader, F.cross_entropy)
    return methods


def prepared(
    name: str,
    kind: str,
    options: Mapping[str, Any],
    tasks: int,
    network: Network,
    device: torch.device,
    seed: int,
) -> tuple[list[State], Batch]:
    """Checked states, one per task, after their warm-up, and the batch that all of them train on.

    Raises `EWCLoRAError` for a state that fails a check, so that it is never timed.
    """
    methods = histories(kind, options, tasks, network, device, seed)
    batch = network.example(device)
    expected = []
    for number, method in enumerate(methods):
        if method.tasks != number:
            raise EWCLoRAError(f"{name}: expected {number} tasks that have ended, got {method.tasks}")
        if isinstance(method, SDLoRA) and method.kd_threshold is None:
            _check_directions(name, method)
        with torch.no_grad():
            expected.append(F.cross_entropy(method.model(batch[0]), batch[1]).item())
    states = [State(method, kind) for method in methods]
    for state, loss in zip(states, expected, strict=True):
        with torch.no_grad():
            actual = F.cross_entropy(state.model(batch[0]), batch[1]).item()
        if not abs(actual - loss) <= LOSS_TOLERANCE * abs(loss):  # a NaN is refused, too
            raise EWCLoRAError(
                f"{name}: task {state.tasks}: expected a loss of {loss}, as the method has, got {actual}"
            )
        for _ in range(WARMUP):
            state.step(batch)
        _check_gradients(name, state)
    return states, batch


def _class(kind: str) -> type[Method]:
    if kind == LOOPED:
        return SDLoRA
    if kind not in METHODS:
        raise ArgumentError(f"kind: expected one of {', '.join((*METHODS, LOOPED))}, got {kind!r}")
    method_class: type[Method] = METHODS[kind]
    return method_class


def _check_directions(name: str, method: SDLoRA) -> None:
    for row in method.report().rows:
        if len(row["tasks"]) != method.tasks:
            raise EWCLoRAError(
                f"{name}: {row['name']}: expected {method.tasks} directions, got {len(row['tasks'])}"
            )


def _check_gradients(name: str, state: State) -> None:
    """After a step."""
    for label, parameter in state.model.named_parameters():
        gradient = parameter.grad
        if parameter.requires_grad and (gradient is None or not bool(torch.isfinite(gradient).all())):
            raise EWCLoRAError(f"{name}: task {state.tasks}: {label} has no finite gradient")
