# SPDX-License-Identifier: Apache-2.0
"""The Fisher of the weights before all tasks, as a mean over the samples of all tasks so far."""

from __future__ import annotations

import torch

from ..errors import FisherError
from ..ewc.anchored import AnchoredEWC

FLOOR = 1e-5  # what the official code of IEL and ITA adds to F


class PretrainedFisher(AnchoredEWC):
    """`AnchoredEWC` for a Fisher that is estimated before the adapters of a task are trained."""

    def _note_gradients(self) -> None:
        """Nothing has been trained whose absence could be told."""

    @torch.no_grad()
    def raise_task_(self, value: float, of_sum: bool = False) -> None:
        """Adds `value` to every number of the Fisher of the task that was estimated last, to that of its mean
        or of its sum over samples."""
        task = self._state.task
        if task is None:
            raise FisherError("prepare: this task has no Fisher yet")
        for sums in task.buffers.values():
            sums.add_(value if of_sum else value * task.samples)

    def take_in(self) -> None:
        """F <- (N F + n F_task) / (N + n), for N samples so far and n of the task."""
        task = self._state.task
        before = sum(record.samples for record in self.history)
        self.consolidate(0.0 if task is None else before / (before + max(task.samples, 1)))
        self.watch.dismiss()  # an optimizer made before goes on
