# SPDX-License-Identifier: Apache-2.0
"""A Fisher pass over data: the loop, and its parts by the names under which programs import them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..distributed.wrappers import unwrapped
from ..progress import checked
from .batches import (
    Batch,
    Forward,
    batch_size_of,
    check_max_batches,
    check_samples_of,
    default_forward,
    leading_size,
    limited,
    to_device,
)
from .fisher_pass import FisherPass
from .losses import (
    LABELS,
    LabelPolicy,
    LossFunction,
    check_labels,
    check_loss,
    default_logits,
    default_loss,
    exact_terms,
    negative_log_likelihood,
    sample_labels,
)
from .model_loss import IGNORED
from .pass_checks import ModelCheck, PassChecks
from .restoring import (
    Undo,
    enable_gradients,
    enter_evaluation,
    evaluation_mode,
    gradients_untouched,
    set_gradients_aside,
)

__all__ = [
    "IGNORED",
    "LABELS",
    "Batch",
    "Data",
    "Forward",
    "LabelPolicy",
    "LossFunction",
    "batch_size_of",
    "check_labels",
    "check_loss",
    "check_max_batches",
    "check_samples_of",
    "default_forward",
    "default_logits",
    "default_loss",
    "evaluation_mode",
    "exact_terms",
    "gradients_untouched",
    "leading_size",
    "limited",
    "negative_log_likelihood",
    "run",
    "sample_labels",
    "to_device",
    "unwrapped",
]


@dataclass(frozen=True)
class Data:
    """The batches of a loader, and how a model takes them; raises `ArgumentError` for a bad max_batches."""

    loader: Iterable[Any]
    device: torch.device
    forward: Forward
    batch_size_fn: Callable[[Any], int]
    max_batches: int | None
    progress: bool | None

    def __post_init__(self) -> None:
        check_max_batches(self.max_batches)
        checked(self.progress)

    def batches(self) -> Iterator[tuple[Batch, int]]:
        """(batch on the device, samples in it), of batches that are not empty."""
        for batch in limited(self.loader, self.max_batches, self.progress):
            if samples := check_samples_of(self.batch_size_fn(batch)):
                yield to_device(batch, self.device), samples


def run(
    model: nn.Module,
    data: Data,
    policy: LabelPolicy,
    running: FisherPass,
    undo: Undo,
    check_finite: bool,
    begin: Callable[[FisherPass, Undo], None],
) -> PassChecks:
    """Runs all forward and backward passes, in eval mode, with gradients and captures that `undo` takes back;
    begin(running, undo) puts the captures on the layers. Returns what was checked of the pass."""
    model = unwrapped(model)
    enable_gradients(undo)
    enter_evaluation(model, undo)
    clear = set_gradients_aside(model, undo)
    begin(running, undo)
    placement = running.placement
    compare = ModelCheck(
        model, placement.layers, data.forward, policy.alone, policy.loss_reduction, clear, data.batch_size_fn
    )
    in_order = running.mode == "batch" and policy.labels == "empirical"
    checks = PassChecks(policy, placement, compare, in_order)
    running.checks.append(checks.at_end)
    for batch, samples in data.batches():
        output, targets = running.forward(lambda part: data.forward(model, part), batch, samples)
        for loss, keep_graph in policy.passes(output, targets, samples):
            if not getattr(loss, "requires_grad", True):
                running.check_ran()
            check_loss(loss)
            if check_finite:
                policy.findings.loss(loss)
            loss.backward(retain_graph=keep_graph)
            running.finish_batch()
            clear()
        running.samples = (running.samples or 0) + samples
        checks.after(batch, targets, samples)
    return checks
