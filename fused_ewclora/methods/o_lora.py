# SPDX-License-Identifier: Apache-2.0
"""O-LoRA (arXiv 2310.14152): factors of every task, held orthogonal to those of earlier tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import LoRAConfig
from ..ewc.settings import checked_lambda, one_of
from ..literals import Variant
from ..report import Report
from ._overlap import overlaps
from ._stacked import Stacked
from .method import VARIANTS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class OLoRA(Stacked):
    """O-LoRA: every task adds `B_t A_t` to the sum, whose earlier terms are frozen, with A_t kept orthogonal
    to the rows of all earlier A (arXiv 2310.14152; docs/mathematics.md, section 12).

    It is not the initialisation of the name "olora". The loss, summed over adapters, in which the A_i have no
    part of the scale s:

        loss + lambda_1 sum_{i<t} sum (A_i A_t^T)^2         variant "paper"
        loss + lambda_1 sum_{i<t} sum |A_i A_t^T|           variant "official", the code of the authors
        ... + lambda_2 (||A_t||_F + ||B_t||_F)              of that code, where lambda_2 is 0

    `end_task` replaces parameters and needs no data: make the optimizer, and DistributedDataParallel, anew
    for each task.

    Args:
        model: a plain model, which is injected with `config`, or one with injected adapters.
        config: of the adapters to inject; None for a model that has them.
        lambda_1: strength of the orthogonality; 0.5 in the scripts of the authors.
        lambda_2: strength of the norms.
        variant: "paper" or "official", as above.
        generator: source of each new A; None is the default generator.
        group: the processes that train this model together, as in `Method`.

    Raises:
        ArgumentError: for bad values, and from `end_task` for factors that are not finite; and as `Method`
            does.
        TargetError: for adapters that another method composes, that have learned scales, that PEFT manages or
            that are sharded, before anything is changed.

    Examples:
        >>> method = methods.OLoRA(model, config, lambda_1=0.5)
        >>> for task in range(2):
        ...     method.begin_task(task)
        ...     optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        ...     (criterion(model(x), y) + method.penalty()).backward()
        ...     optimizer.step()
        ...     method.end_task(loader)
        >>> method.tasks
        2
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoRAConfig | None = None,
        *,
        lambda_1: float = 0.5,
        lambda_2: float = 0.0,
        variant: Variant = "paper",
        generator: torch.Generator | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        self.lambda_1 = checked_lambda(lambda_1, "lambda_1")
        self.lambda_2 = checked_lambda(lambda_2, "lambda_2")
        self.variant = one_of("variant", variant, VARIANTS)
        super().__init__(model, config, generator=generator, group=group)

    def penalty(self) -> Tensor:
        """The terms above for all adapters, in fp32 (fp64 for fp64) whatever autocast says.

        Returns:
            A 0-d tensor.
        """
        zero = super().penalty()
        with torch.autocast(zero.device.type, enabled=False):
            terms = [term.to(zero.device) for term in self._terms()]
            return torch.stack(terms).sum() if terms else zero

    def _terms(self) -> list[Tensor]:
        terms = []
        for _, _, _, now in self._all():
            wide = torch.promote_types(now.lora_A.dtype, torch.float32)
            lora_a, lora_b, past = (t.to(wide) for t in (now.lora_A, now.lora_B, now.lora_past_A))
            if self.lambda_1 and past.shape[0]:
                products = past @ lora_a.T
                sizes = products.abs() if self.variant == "official" else products.square()
                terms.append(self.lambda_1 * sizes.sum())
            if self.lambda_2:
                terms.append(self.lambda_2 * (torch.linalg.norm(lora_a) + torch.linalg.norm(lora_b)))
        return terms

    def report(self) -> Report:
        """Says per adapter, for every task that has ended, how far A_t overlaps earlier tasks: the share of
        its squared length inside of the span of earlier A, 0 if it is orthogonal to them, 1 if it has nothing
        of its own.

        Returns:
            A printable `Report`, with the mean over later tasks in its summary.
        """
        self._check_not_exported("report")
        rows: list[dict[str, Any]] = [
            {"name": key, "rank": now.lora_past_A.shape[0], "overlaps": overlaps(now.tasks())}
            for key, _, _, now in self._all()
        ]
        later = [share for row in rows for share in row["overlaps"][1:]]
        summary = {"tasks": self.tasks, "overlap": sum(later) / len(later) if later else 0.0}
        return Report("O-LoRA factors", rows, [f"mean overlap {summary['overlap']:.4g}"], summary)
