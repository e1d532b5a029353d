"""Sequential LoRA: every task trains a fresh adapter, which is then folded into the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..distributed.transaction import Transaction
from ..layers.inject import check_mergeable
from ._resume import dump, parse, take_over
from .method import Loader, Loss, Method


class LoRA(Method):
    """The baseline without protection: W <- W + B diag(s) A after each task, A and B start anew.

    Errors are those of `Method`; `TargetError` for merged or tied weights.

        >>> method = LoRA(model, LoRAConfig(r=10, target_modules=["qkv"]))
    """

    @torch.no_grad()
    def _end(self, loader: Loader, loss_fn: Loss | None) -> None:
        check_mergeable(self.model)
        generator = self._drawing()
        weights = [(layer.base_weight, layer.consolidated_weight()) for layer in self.layers.values()]
        with Transaction() as change:
            for weight, value in weights:
                change.copy_(weight, value)
            for layer in self.layers.values():
                for _, lora_a, lora_b in layer.adapter_parameters():
                    change.remember(lora_a)
                    change.remember(lora_b)
                layer.reset_adapters(generator)
        for layer in self.layers.values():
            layer.consolidated_tasks += 1

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
