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
from ._start import ejected_on_error
from .method import Loader, Loss, Method

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from ..ewc.options import EWCOptions


class EWCLoRA(Method):
    """`EWC` behind the protocol of `Method`: sequential LoRA under the penalty
    `(lambda/2) sum F (B diag(s) A)^2` (EWC-LoRA, arXiv 2602.17559; docs/mathematics.md, sections 2 to 4).

    `ewc` is the controller. `end_task` estimates the Fisher of the task's data with its loss_fn, and folds
    the adapters into the weights.

    Args:
        model: as in `Method`.
        config: as in `Method`.
        labels: the policy of the Fisher's labels, "empirical", "sampled" or "exact", as in
            `EWC.estimate_fisher`.
        group: as in `Method`; F is that of the data of all its processes.
        **hyperparameters: all arguments of `EWC` but the model (ewc_lambda, gamma, fisher_mode, ...).

    Raises:
        EWCLoRAError: the errors of `Method` and of `EWC`.

    Examples:
        >>> method = methods.EWCLoRA(model, config, ewc_lambda=100.0)
        >>> penalties = []
        >>> for task in range(2):
        ...     method.begin_task(task)
        ...     optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        ...     for inputs, labels in loader:
        ...         optimizer.zero_grad()
        ...         (criterion(model(inputs), labels) + method.penalty()).backward()
        ...         optimizer.step()
        ...     penalties.append(method.penalty().item())
        ...     method.end_task(loader, criterion)
        >>> penalties[0], penalties[1] > 0.0
        (0.0, True)
        >>> method.ewc.fishers["fc"].shape
        torch.Size([6, 8])
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
        with ejected_on_error(model):
            super().__init__(model, config, group=group)
            self.ewc = EWC(model, **hyperparameters)
        self.labels = labels

    def penalty(self) -> Tensor:
        """The penalty `(lambda/2) sum F (B diag(s) A)^2`.

        Returns:
            0-d and differentiable; 0 during the first task, unless there is a prior.
        """
        self._check_not_exported("penalty")
        return self.ewc.penalty()

    def estimate_prior(self, loader: Loader, loss_fn: Loss | None = None) -> None:
        """Before the first task, estimates F of the pretrained weights, so that the first task is penalised
        as well (`EWC.consolidate_prior`).

        With update="fixed" that F is all there is, the ablation of the paper with a precomputed Fisher, and
        no task has a pass of its own. The head that the labels belong to is the caller's.

        Args:
            loader: of the batches that F is estimated on; each process has its share.
            loss_fn: as in `EWC.estimate_fisher`.

        Raises:
            ArgumentError: once a task has begun.
            EWCLoRAError: the errors of `EWC.estimate_fisher` and `EWC.consolidate_prior`; nothing has changed
                then.

        Examples:
            >>> method = methods.EWCLoRA(model, config, ewc_lambda=100.0)
            >>> method.estimate_prior(loader, criterion)
            >>> method.begin_task(0)
            >>> list(method.ewc.fishers)
            ['fc']
        """
        self._check_not_exported("estimate_prior")
        if self._running or self.tasks:
            raise ArgumentError("estimate_prior: expected to be called before the first task begins")
        estimate_prior(self.ewc, loader, loss_fn, self.labels, self.group)

    def _end(self, loader: Loader, loss_fn: Loss | None) -> None:
        end_task(self.ewc, loader, loss_fn, self.labels, self.group)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on, between tasks. Weights and adapters are in the model's own
        state_dict. Tensors are not copied.

        Returns:
            {"tensors": the Fishers, "config": counts of tasks and how the Fishers were made}.

        Raises:
            ArgumentError: during a task.
        """
        ewc = self.ewc.state_dict()
        return dump(self, ewc["tensors"], ewc=ewc["config"])

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes over a `state_dict()` of an EWCLoRA with the same settings and adapters, which may be freshly
        injected; nothing changes unless all of it fits. Load the model's own state_dict as well.

        Args:
            saved: what `state_dict` returned, also from a file.

        Raises:
            ArgumentError: during a task.
            CheckpointError: naming what does not fit.
            FisherError: naming what does not fit of the Fishers.

        Examples:
            >>> method = methods.EWCLoRA(model, config, ewc_lambda=100.0)
            >>> method.begin_task(0)
            >>> method.end_task(loader, criterion)
            >>> torch.save([model.state_dict(), method.state_dict()], "task0.pt")
            >>> weights, state = torch.load("task0.pt", weights_only=True)
            >>> _ = model.load_state_dict(weights)
            >>> later = methods.EWCLoRA(model, ewc_lambda=100.0)
            >>> later.load_state_dict(state)
            >>> later.tasks
            1
        """
        tensors, config = parse(self, saved)
        state = self.ewc.parse_state({"tensors": tensors, "config": config.get("ewc")})
        with Transaction() as change:
            self.ewc.take_over(state, change)
        take_over(self, config)
