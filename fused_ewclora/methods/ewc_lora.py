# SPDX-License-Identifier: Apache-2.0
"""EWC-LoRA (arXiv 2602.17559): sequential LoRA under an EWC penalty on the product of its factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..config import LoRAConfig
from ..distributed.transaction import Transaction
from ..errors import ArgumentError
from ..ewc.controller import EWC
from ..literals import Labels
from ._resume import dump, parse, take_over
from ._shares import end_task, estimate_prior
from .method import Loader, Loss, Method

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from ..ewc.options import EWCOptions


class EWCLoRA(Method):
    """`EWC` behind the protocol of `Method`; `ewc` is the controller.

    hyperparameters are those of `EWC` (ewc_lambda, gamma, fisher_mode, ...); labels is the policy of its
    Fisher, group that of `Method`: F is that of the data of all its processes. Errors are those of both.

        >>> method = EWCLoRA(model, LoRAConfig(r=10, target_modules=["qkv"]), ewc_lambda=1e7)
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoRAConfig | None = None,
        *,
        labels: Labels = "empirical",
        group: ProcessGroup | None = None,
        **hyperparameters: Unpack[EWCOptions],
    ) -> None:
        super().__init__(model, config, group=group)
        self.ewc = EWC(model, **hyperparameters)
        self.labels = labels

    def penalty(self) -> Tensor:
        """(lambda/2) sum F (B diag(s) A)^2, 0 during the first task unless there is a prior."""
        return self.ewc.penalty()

    def estimate_prior(self, loader: Loader, loss_fn: Loss | None = None) -> None:
        """Before the first task, estimates F of the pretrained weights on the data of `loader` (each process
        on its share), so that the first task is penalised as well (`EWC.consolidate_prior`).

        With update="fixed" that F is all there is, the ablation of the paper with a precomputed Fisher, and
        no task has a pass of its own. The head that the labels belong to is the caller's. Raises
        `ArgumentError` once a task has begun, and the errors of `EWC.estimate_fisher` and
        `EWC.consolidate_prior`; nothing has changed then.

            >>> method.estimate_prior(proxy_loader, criterion); method.begin_task(0)
        """
        if self._running or self.tasks:
            raise ArgumentError("estimate_prior: expected to be called before the first task begins")
        estimate_prior(self.ewc, loader, loss_fn, self.labels, self.group)

    def _end(self, loader: Loader, loss_fn: Loss | None) -> None:
        end_task(self.ewc, loader, loss_fn, self.labels, self.group)

    def state_dict(self) -> dict[str, Any]:
        """{"tensors": the Fishers, "config": counts of tasks and how the Fishers were made}, between tasks.
        Weights and adapters are in the model's own state_dict.

        >>> torch.save([model.state_dict(), method.state_dict()], "task3.pt")
        """
        ewc = self.ewc.state_dict()
        return dump(self, ewc["tensors"], ewc=ewc["config"])

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes over a `state_dict()` of an EWCLoRA with the same settings and adapters, which may be freshly
        injected; nothing changes unless all of it fits.

        Load the model's own state_dict as well. Raises `ArgumentError` during a task, `CheckpointError` or
        `FisherError` naming what does not fit.

            >>> model.load_state_dict(state); method.load_state_dict(method_state)
        """
        tensors, config = parse(self, saved)
        state = self.ewc.parse_state({"tensors": tensors, "config": config.get("ewc")})
        with Transaction() as change:
            self.ewc.take_over(state, change)
        take_over(self, config)
