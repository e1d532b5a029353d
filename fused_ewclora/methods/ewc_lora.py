"""EWC-LoRA (arXiv 2602.17559): sequential LoRA under an EWC penalty on the product of its factors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..config import LoRAConfig
from ..ewc import EWC
from .method import Loader, Loss, Method


class EWCLoRA(Method):
    """`EWC` behind the protocol of `Method`; `ewc` is the controller.

    hyperparameters are those of `EWC` (ewc_lambda, gamma, fisher_mode, ...); labels is the policy of its
    Fisher. Errors are those of both.

        >>> method = EWCLoRA(model, LoRAConfig(r=10, target_modules=["qkv"]), ewc_lambda=1e7)
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoRAConfig | None = None,
        *,
        labels: str = "empirical",
        **hyperparameters: Any,
    ) -> None:
        super().__init__(model, config)
        self.ewc = EWC(model, **hyperparameters)
        self.labels = labels

    def penalty(self) -> Tensor:
        """(lambda/2) sum F (B diag(s) A)^2, 0 during the first task."""
        return self.ewc.penalty()

    def _end(self, loader: Loader, loss_fn: Loss | None) -> None:
        self.ewc.end_task(loader, loss_fn, labels=self.labels)
