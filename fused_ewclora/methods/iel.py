# SPDX-License-Identifier: Apache-2.0
"""IEL (arXiv 2405.16350): task vectors that are trained inside of their mean, in the pre-training basin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from ..config import LoRAConfig
from ..ewc.settings import checked_lambda
from ..ewc.structures import Structure
from ..literals import Labels, StructureName, Variant
from ._composed import Composed
from ._pretrained import FLOOR

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class IEL(Composed):
    """Incremental Ensemble Learning, `y = x (W0 + (1/t) (D_1 + ... + D_t))^T` with `D_k = B_k A_k`, of which
    task t trains the last one inside of the sum (arXiv 2405.16350; docs/mathematics.md, section 5.1).

    The penalty is

        beta [ 1/2 (1 - 1/t) <F D_t, D_t> - (1/t) <F D_t, D_1 + ... + D_{t-1}> ]

    where F is the Fisher of the weights W0 before all tasks, the mean over the samples of tasks 1 to t. W0
    stays until `export` folds the mean in. `prepare` estimates the Fisher of W0 on the task's data under the
    new head, which is tuned before on the features of W0, `with method.pretrained()`; `end_task` needs no
    data and replaces parameters. `compose` chooses tasks. Heads are the caller's, with any penalty on them.

    Args:
        model: a plain model, which is injected with `config`, or one with injected adapters.
        config: of the adapters to inject; None for a model that has them.
        beta: strength of the penalty; it has no default, as it depends on F and the optimizer.
        variant: "paper", or "official", which takes 1/t = 1/2 in the first task, which has no penalty in
            "paper", and adds 1e-5 to every number of F. There the penalty is not part of the loss: see
            `decoupled_step_`.
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
        >>> method = methods.IEL(model, config, beta=0.5)
        >>> method.begin_task(0)
        >>> with method.pretrained():  # to tune the new head
        ...     features = model.fc(x)
        >>> method.prepare(loader)  # before training
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> (criterion(model(x), y) + method.penalty()).backward()
        >>> optimizer.step()
        >>> method.end_task(loader)
        >>> list(method.fishers)
        ['fc']
    """

    mean_of_past = True

    def __init__(
        self,
        model: nn.Module,
        config: LoRAConfig | None = None,
        *,
        beta: float,
        variant: Variant = "paper",
        labels: Labels = "exact",
        fisher: StructureName | Structure = "dense",
        fisher_dtype: torch.dtype | Literal["8bit"] = torch.float32,
        generator: torch.Generator | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        self.beta = checked_lambda(beta, "beta")
        super().__init__(model, config, variant, labels, fisher, fisher_dtype, generator, group)

    def _strength(self) -> float:
        first = 2 if self.variant == "official" else 1
        return self.beta * (1.0 - 1.0 / max(self.tasks + 1, first))

    def _take_in(self) -> None:
        if self.variant == "official":
            self._ewc.raise_task_(FLOOR)
        self._ewc.take_in()
