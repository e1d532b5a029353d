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
    """Incremental Ensemble Learning: y = x (W0 + (1/t) (D_1 + ... + D_t))^T with D_k = B_k A_k, of which task
    t trains the last one inside of the sum, under the penalty

        beta [ 1/2 (1 - 1/t) <F D_t, D_t> - (1/t) <F D_t, D_1 + ... + D_{t-1}> ]

    (docs/mathematics.md, section 5.1). F is the Fisher of the weights W0 before all tasks, the mean over the
    samples of tasks 1 to t; W0 stays until `export` folds the mean in.

        method.begin_task(t)
        ...                           # tune the new head on the features of W0: with method.pretrained()
        method.prepare(loader)        # the Fisher of W0 on the task's data, under that head
        ...                           # as with every method
        method.end_task(loader)       # needs no data

    beta: strength of the penalty; it has no default, as it depends on F and the optimizer.
    variant: "official" takes 1/t = 1/2 in the first task, which has no penalty in "paper", and adds 1e-5 to
    every number of F. There the penalty is not part of the loss: see `decoupled_step_`.
    labels: of the Fisher, as in `EWC.estimate_fisher`; "exact", the expectation over classes, is the paper's.
    fisher, fisher_dtype: how F is kept, as in `EWC`. generator: source of each new A. group: as in `Method`.

    Heads are the caller's, with any penalty on them. `compose` chooses tasks. Parameters are replaced by
    `end_task`. Raises the errors of `Method`, `ArgumentError` for bad values and `TargetError` for adapters
    that another method or library manages, that have learned scales or that are sharded.

        >>> method = IEL(model, LoRAConfig(r=16, target_modules=["qkv", "proj", "fc1", "fc2"]), beta=0.5)
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
