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
    """Incremental Task Arithmetic: task t trains y = x (W0 + D_t)^T, D_t = B_t A_t, alone, under the penalty

        (alpha/2) <F D_t, D_t>

    (docs/mathematics.md, section 5.1). F is the Fisher of the weights W0 before all tasks, the mean over the
    samples of tasks 1 to t. Between tasks the model computes with W0 + (1/t) (D_1 + ... + D_t), which
    `export` folds in; within a task, also in eval mode, with W0 + D_t.

    The calls are those of `IEL`. alpha: strength of the penalty, without a default.
    variant: "official" takes F from tasks 1 to t - 1, and 1e-5 for every number of F in the first task. There
    the penalty is not part of the loss: see `decoupled_step_`.
    The other arguments, and the errors, are those of `IEL`.

        >>> method = ITA(model, LoRAConfig(r=16, target_modules=["qkv", "proj", "fc1", "fc2"]), alpha=0.02)
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
        """As `Composed.penalty`; (alpha/2) 1e-5 ||D_1||^2 in the first task of variant "official"."""
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
