# SPDX-License-Identifier: Apache-2.0
"""What a pass over data finds out about its batches without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import FisherError

_NEVER = 2**62  # a batch that no pass reaches


class Findings:
    """Faults of batches, as flags on the device.

    Reading a flag waits for the device, so `check` is for the first batches, where most faults show, and the
    end of a pass.
    """

    def __init__(self) -> None:
        self._batch = 1
        self._faults: dict[str, Tensor] = {}
        self._counted: Tensor | None = None

    def end_batch(self) -> int:
        """To be called after each batch; returns its number, from 1."""
        self._batch += 1
        return self._batch - 1

    def fault(self, message: str, flag: Tensor) -> None:
        """The 0-d `flag` says whether the present batch has the fault."""
        first = torch.where(flag, self._batch, _NEVER)
        before = self._faults.get(message)
        self._faults[message] = first if before is None else torch.minimum(before.to(first.device), first)

    def loss(self, loss: Tensor) -> None:
        """A loss that is about to be backpropagated must be finite."""
        self.fault("loss: expected finite values, got NaN or Inf", ~torch.isfinite(loss.detach()).all())

    def targets(self, counted: Tensor) -> None:
        """How many targets of a batch are not ignored."""
        total = counted.sum()
        self._counted = total if self._counted is None else self._counted.to(total.device) + total

    def check(self) -> None:
        """Raises `FisherError` naming the first batch with a fault."""
        for message, first in self._faults.items():
            if (batch := int(first)) < _NEVER:
                raise FisherError(
                    f"{message}, in batch {batch}. What this pass gathered was discarded, nothing else was "
                    "changed"
                )

    def check_counted(self) -> None:
        """Raises `FisherError` when targets were seen and all of them were ignored."""
        if self._counted is not None and int(self._counted) == 0:
            raise FisherError(
                "loader: expected targets that count, but every target of the pass is ignored "
                "(ignore_index), so there is no loss to take a Fisher of"
            )


class ClassOrder:
    """Whether the batches of a pass hold one class each, which makes mode "batch" too large: a batch of one
    class has a mean gradient far from that of the data."""

    def __init__(self) -> None:
        self._batches = 0
        self._first: Tensor | None = None
        self._single: Tensor | None = None
        self._differ: Tensor | None = None

    def note(self, targets: Any) -> None:
        """The class indices `[N]` of a batch; those of one sample, and other targets, tell nothing."""
        if not isinstance(targets, Tensor) or targets.dim() != 1 or len(targets) < 2:
            return
        if targets.is_floating_point() or targets.is_complex():
            return
        first, single = targets[0], (targets == targets[0]).all()
        if self._first is None or self._single is None or self._differ is None:
            self._first, self._single, self._differ = first, single, torch.zeros_like(single)
        self._single, self._differ = self._single & single, self._differ | (first != self._first)
        self._batches += 1

    def sorted(self) -> bool:
        """Whether each of at least two batches had a single label, and not all the same."""
        if self._batches < 2 or self._single is None or self._differ is None:
            return False
        return bool(self._single & self._differ)
