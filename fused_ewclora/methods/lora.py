# SPDX-License-Identifier: Apache-2.0
"""Sequential LoRA: every task trains a fresh adapter, which is then folded into the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ewc.placement import LocalPlacement
from ._resume import dump, parse, take_over
from ._shares import folded
from .method import Loader, Loss, Method


class LoRA(Method):
    """The baseline without protection: `W <- W + B diag(s) A` after each task, and A and B start anew.

    `end_task` looks at no data. It raises `TargetError` for merged or tied weights and `ArgumentError` for a
    sum that is not finite; nothing is changed then.

    Args:
        model: as in `Method`.
        config: as in `Method`.
        group: as in `Method`.

    Raises:
        EWCLoRAError: the errors of `Method`.

    Examples:
        >>> method = methods.LoRA(model, config)
        >>> for task in range(2):
        ...     method.begin_task(task)
        ...     optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        ...     for inputs, labels in loader:
        ...         optimizer.zero_grad()
        ...         criterion(model(inputs), labels).backward()
        ...         optimizer.step()
        ...     learned = model(x)
        ...     method.end_task(loader)
        >>> torch.allclose(model(x), learned, atol=1e-6)
        True
        >>> model.fc.lora_B.any()  # folded into the weight
        tensor(False)
    """

    def _end(self, loader: Loader, loss_fn: Loss | None) -> None:
        placement = LocalPlacement(self.model, self.layers)
        with folded(placement, self.group) as change:
            placement.reset_adapters(change, self._drawing())

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on, between tasks. Weights and adapters are in the model's own
        state_dict.

        Returns:
            {"tensors": {}, "config": counts of tasks}.

        Raises:
            ArgumentError: during a task.
        """
        return dump(self, {})

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes over a `state_dict()` of a LoRA on the same layers; load the model's own as well.

        Args:
            saved: what `state_dict` returned, also from a file.

        Raises:
            ArgumentError: during a task.
            CheckpointError: naming what does not fit.
        """
        _, config = parse(self, saved)
        take_over(self, config)
