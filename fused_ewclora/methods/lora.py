"""Sequential LoRA: every task trains a fresh adapter, which is then folded into the weights."""

from __future__ import annotations

import torch

from .._transaction import Transaction
from ..inject import check_mergeable
from .method import Loader, Loss, Method


class LoRA(Method):
    """The baseline without protection: W <- W + B diag(s) A after each task, A and B start anew.

    Errors are those of `Method`; `TargetError` for merged or tied weights.

        >>> method = LoRA(model, LoRAConfig(r=10, target_modules=["qkv"]))
    """

    @torch.no_grad()
    def _end(self, loader: Loader, loss_fn: Loss | None) -> None:
        check_mergeable(self.model)
        weights = [(layer.base_weight, layer.consolidated_weight()) for layer in self.layers.values()]
        with Transaction() as change:
            for weight, value in weights:
                change.copy_(weight, value)
            for layer in self.layers.values():
                for _, lora_a, lora_b in layer.adapter_parameters():
                    change.remember(lora_a)
                    change.remember(lora_b)
                layer.reset_adapters()
        for layer in self.layers.values():
            layer.consolidated_tasks += 1
