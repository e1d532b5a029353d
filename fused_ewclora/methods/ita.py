# SPDX-License-Identifier: Apache-2.0
"""ITA (arXiv 2405.16350): task vectors trained one by one, in the pre-training basin, and averaged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ..config import LoRAConfig
from ..ewc.settings import checked_lambda
from ..ewc.structures import Structure
from ..literals import Labels, StructureName, Variant
from ._composed import Composed
from ._pretrained import FLOOR

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ITA(Composed):
    """Incremental Task Arithmetic: task t trains `y = x (W0 + D_t)^T`, `D_t = B_t A_t`, alone, and all tasks
    are averaged (arXiv 2405.16350; docs/mathematics.md, section 5.1).

    The penalty is

        (alpha/2) <F D_t, D_t>

    where F is the Fisher of the weights W0 before all tasks, the mean over the samples of tasks 1 to t.
    Between tasks the model computes with `W0 + (1/t) (D_1 + ... + D_t)`, which `export` folds in; within a
    task, also in eval mode, with `W0 + D_t`. The calls are those of `IEL`.

    Args:
        model: a plain model, which is injected with `config`, or one with injected adapters.
        config: of the adapters to inject; None for a model that has them.
        alpha: strength of the penalty, without a default.
        variant: "paper", or "official", which takes F from tasks 1 to t - 1, and 1e-5 for every number of F
            in the first task. There the penalty is not part of the loss: see `decoupled_step_`.
        labels: of the Fisher, as in `EWC.estimate_fisher`; "exact", the expectation over classes, is the
            paper's.
        fisher: how F is kept, as in `EWC`; variant "official" takes "dense" alone.
        fisher_dtype: of F, as in `EWC`.
        generator: source of each new A; None is the default generator.
        group: the processes that train this model together, as in `Method`.

    Raises:
        ArgumentError: for bad values, and as `Method` does.
        TargetError: for adapters that another method or library manages, that have learned scales or that are
            sharded.

    Examples:
        >>> method = methods.ITA(model, config, alpha=0.02)
        >>> method.begin_task(0)
        >>> method.prepare(loader)  # before training
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> (criterion(model(x), y) + method.penalty()).backward()
        >>> optimizer.step()
        >>> method.end_task(loader)
        >>> method.tasks
        1
    """

    mean_of_past = False

    def __init__(
        self,
        model: nn.Module,
        config: LoRAConfig | None = None,
        *,
        alpha: float,
        variant: Variant = "paper",
        labels: Labels = "exact",
        fisher: StructureName | Structure = "dense",
        fisher_dtype: torch.dtype | Literal["8bit"] = torch.float32,
        generator: torch.Generator | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        self.alpha = checked_lambda(alpha, "alpha")
        super().__init__(model, config, variant, labels, fisher, fisher_dtype, generator, group)

    def penalty(self) -> Tensor:
        """As `Composed.penalty`, but in the first task of variant "official" `(alpha/2) 1e-5 ||D_1||^2`.

        Returns:
            A 0-d tensor, differentiable; 0 between tasks.

        Raises:
            ArgumentError: in a task that was not prepared.
        """
        if self.variant == "paper" or self.tasks or not self._running:
            return super().penalty()
        self._check_prepared("penalty")
        squares = [now.square(piece.scaling) for _, _, piece, now in self._vectors()]
        return self.alpha * FLOOR / 2 * torch.stack([s.to(squares[0].device) for s in squares]).sum()

    def _strength(self) -> float:
        return self.alpha

    def _take_in(self) -> None:
        if self.variant == "paper":
            self._ewc.take_in()
        elif self.tasks == 0:
            self._ewc.raise_task_(FLOOR, of_sum=True)

    def _take_in_last(self) -> None:
        if self.variant == "official":
            self._ewc.take_in()
