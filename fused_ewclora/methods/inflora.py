# SPDX-License-Identifier: Apache-2.0
"""InfLoRA (arXiv 2404.00228): updates inside a subspace that is chosen before a task and does not touch the
inputs of earlier ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..config import LoRAConfig
from ..distributed.transaction import Transaction
from ..errors import ArgumentError
from ..ewc.estimation import Forward, default_forward
from ..ewc.settings import number
from ..layers.adapted import AdaptedLinear
from ..literals import Variant
from ..progress import showing
from ._projected import Projected
from ._subspace import Subspace, directions, extended
from .method import Loader, Loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class InfLoRA(Projected):
    """`y = x (W + B A)^T` with A `[r, d_in]` frozen, the r strongest directions of the task's inputs outside
    of the subspace that earlier tasks used; only B is trained (InfLoRA, arXiv 2404.00228;
    docs/mathematics.md, section 7).

    `prepare` makes one pass over the task's data, before training, and `end_task` a second one: what the task
    used becomes part of the subspace. At the end of a task `W <- W + B A` and B starts at 0. The subspace is
    that of DualGPM, one per layer in `subspaces`: it holds the share epsilon of the energy of every task's
    inputs, rising linearly over tasks as in the official code,
    `epsilon + (epsilon_last - epsilon) t / total_tasks`. Every row of the inputs counts, padding included.

    Args:
        model: as in `Method`.
        config: as in `Method`.
        epsilon: share of the energy of the first task's inputs that the subspace holds, in [0, 1].
        epsilon_last: what the share rises towards, in [0, 1].
        total_tasks: how many tasks there will be; None keeps the share at epsilon.
        variant: "paper", or "official": the covariance in place of the inputs in every decomposition and
            energy (so that energies are squared), rows of A of norm 1 / sqrt 3, one direction fewer after the
            first task. Both start from an exactly projected basis, and rows of A for which no direction is
            left are 0, where official ones are arbitrary.
        forward: forward(model, batch) -> (output, targets), of the passes over data, as in
            `EWC.estimate_fisher`.
        max_batches: how many batches a pass uses, in each process; None uses all.
        group: as in `Method`; the inputs are those of all its processes.

    Raises:
        ArgumentError: for values out of range, before anything is changed.
        TargetError: for adapters of another method, before anything is changed.
        EWCLoRAError: the errors of `Method`.

    Examples:
        >>> method = methods.InfLoRA(model, config, epsilon=0.95)
        >>> first, second = torch.eye(8)[:4], torch.randn(4, 8)
        >>> for task, inputs in enumerate([first, second]):
        ...     batches = [(inputs, y[:4])]
        ...     before = model(first)
        ...     method.begin_task(task)
        ...     method.prepare(batches)
        ...     optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        ...     optimizer.zero_grad()
        ...     criterion(model(inputs), y[:4]).backward()
        ...     optimizer.step()
        ...     method.end_task(batches)
        >>> torch.allclose(model(first), before, atol=1e-5)  # the second task did not change it
        True
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoRAConfig | None = None,
        *,
        epsilon: float = 0.95,
        epsilon_last: float = 1.0,
        total_tasks: int | None = None,
        variant: Variant = "paper",
        forward: Forward = default_forward,
        max_batches: int | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        self.epsilon = number("epsilon", epsilon, 0.0, 1.0)
        self.epsilon_last = number("epsilon_last", epsilon_last, 0.0, 1.0)
        if total_tasks is not None and (
            isinstance(total_tasks, bool) or not isinstance(total_tasks, int) or total_tasks < 1
        ):
            raise ArgumentError(f"total_tasks: expected an integer >= 1 or None, got {total_tasks!r}")
        self.total_tasks = total_tasks
        super().__init__(
            model, config, variant=variant, forward=forward, max_batches=max_batches, group=group
        )
        self.subspaces = {
            name: Subspace.empty(layer.in_features, layer.weight.device)
            for name, layer in self.layers.items()
        }

    def threshold(self, task: int) -> float:
        """The share of the energy of a task's inputs that the subspace must hold.

        Args:
            task: its number, counted from 0.

        Returns:
            The share, in [0, 1].

        Examples:
            >>> method = methods.InfLoRA(model, config, epsilon=0.5, epsilon_last=1.0, total_tasks=10)
            >>> method.threshold(0), method.threshold(5)
            (0.5, 0.75)
        """
        if self.total_tasks is None:
            return self.epsilon
        progress = min(task / self.total_tasks, 1.0)
        return self.epsilon + (self.epsilon_last - self.epsilon) * progress

    @torch.no_grad()
    def prepare(self, loader: Loader, loss_fn: Loss | None = None, *, progress: bool | None = None) -> None:
        """Chooses A for the task that has begun, from one pass over its data in eval mode.

        Adapters of a packed projection share their input and so their A.

        Args:
            loader: of the batches of the task.
            loss_fn: not used, there is no loss.
            progress: as in `end_task`.

        Raises:
            ArgumentError: outside of a task, for a B that is not 0 any more, an empty loader or inputs that
                are not finite; nothing is changed then.
            TargetError: for merged layers and those that never run; nothing is changed then.

        Examples:
            >>> method = methods.InfLoRA(model, config)
            >>> method.begin_task(0)
            >>> method.prepare(loader)
            >>> torch.allclose(model.fc.lora_A @ model.fc.lora_A.T, torch.eye(2), atol=1e-5)
            True
        """
        self._check_untrained()
        with showing(progress):
            covariances = self._covariances(loader)
        chosen = {}
        for name, layer in self.layers.items():
            used = self.subspaces[name].to(covariances[name].device)
            widest = max(piece.r for piece in layer.adapter_slices)
            chosen[name] = directions(covariances[name], used, widest, self.variant)
        chosen = self._same(chosen)
        with Transaction() as change:
            for name, layer in self.layers.items():
                for piece, lora_a, _ in layer.adapter_parameters():
                    change.copy_(lora_a, chosen[name][: piece.r])
        self._prepared = True

    def _owners(self, tasks: int) -> dict[str, AdaptedLinear]:
        return self.layers

    @torch.no_grad()
    def _end(self, loader: Loader, loss_fn: Loss | None) -> None:
        self._check_prepared("end_task")
        covariances = self._covariances(loader)
        epsilon, official = self.threshold(self.tasks), self.variant == "official"
        subspaces = {
            name: extended(
                used.to(covariances[name].device), covariances[name], epsilon, self.variant, fewer=official
            )
            for name, used in self.subspaces.items()
        }
        subspaces = self._same_subspaces(subspaces)
        self._fold()
        self.subspaces = subspaces
