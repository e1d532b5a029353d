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
    """The baseline without protection: W <- W + B diag(s) A after each task, A and B start anew.

    Errors are those of `Method`. `end_task` raises `TargetError` for merged or tied weights and
    `ArgumentError` for a sum that is not finite; nothing is changed then.

        >>> method = LoRA(model, LoRAConfig(r=10, target_modules=["qkv"]))
    """

    def _end(self, loader: Loader, loss_fn: Loss | None) -> None:
        placement = LocalPlacement(self.model, self.layers)
        with folded(placement, self.group) as change:
            placement.reset_adapters(change, self._drawing())

    def state_dict(self) -> dict[str, Any]:
        """{"tensors": {}, "config": counts of tasks}, between tasks. Weights and adapters are in the model's
        own state_dict."""
        return dump(self, {})

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes over a `state_dict()` of a LoRA on the same layers; load the model's own as well.

        Raises `ArgumentError` during a task and `CheckpointError` naming what does not fit.
        """
        _, config = parse(self, saved)
        take_over(self, config)
