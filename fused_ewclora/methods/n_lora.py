# SPDX-License-Identifier: Apache-2.0
"""N-LoRA (arXiv 2410.10179): sparse changes, so that those of different tasks do not collide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import functional as FE
from ..config import LoRAConfig
from ..errors import TargetError
from ..ewc.settings import checked_lambda, number, one_of
from ..literals import Variant
from ..report import Report
from ._factors import Factors
from ._overlap import collisions, overlaps
from ._stacked import Stacked
from .method import VARIANTS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class NLoRA(Stacked):
    """N-LoRA: every task adds `B_t A_t` to the sum, whose earlier terms are frozen, under an l1 norm that
    makes its elements small, so that few are large in two tasks (arXiv 2410.10179;
    docs/mathematics.md, section 13).

    The loss, summed over adapters:

        loss + lambda_1 sum |s B_t A_t|         variant "paper", without forming B A
        loss + lambda_1 sum |A_t B_t|           variant "official", the code of the authors

    `end_task` replaces parameters and needs no data: make the optimizer, and DistributedDataParallel, anew
    for each task.

    Args:
        model: a plain model, which is injected with `config`, or one with injected adapters.
        config: of the adapters to inject; None for a model that has them.
        lambda_1: strength of the norm.
        variant: "paper", or "official", whose product is `[r, r]`, of the factors in the other order, and
            exists for square weights alone; its lambda_1 (0.4 for T5, 0.46 for LLaMA) says nothing about the
            other variant.
        generator: source of each new A; None is the default generator.
        group: the processes that train this model together, as in `Method`.

    Raises:
        ArgumentError: for bad values, and from `end_task` for factors that are not finite; and as `Method`
            does.
        TargetError: for adapters that another method composes, that have learned scales, that PEFT manages or
            that are sharded, and for weights that are not square under "official", before anything is
            changed.

    Examples:
        >>> method = methods.NLoRA(model, config, lambda_1=1e-3)
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
        lambda_1: float,
        variant: Variant = "paper",
        generator: torch.Generator | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        self.lambda_1 = checked_lambda(lambda_1, "lambda_1")
        self.variant = one_of("variant", variant, VARIANTS)
        super().__init__(model, config, generator=generator, group=group)

    def _check_layers(self) -> None:
        super()._check_layers()
        for name, layer in self.layers.items() if self.variant == "official" else ():
            for piece in layer.adapter_slices:
                if piece.row_count != layer.in_features:
                    raise TargetError(
                        f"{name}: variant 'official' takes the product A B: expected as many outputs as "
                        f"inputs, got {piece.row_count} and {layer.in_features}"
                    )

    def penalty(self) -> Tensor:
        """lambda_1 times the norm above, in fp32 (fp64 for fp64) whatever autocast says.

        Returns:
            A 0-d tensor.
        """
        zero = super().penalty()
        if self.lambda_1 == 0.0:
            return zero
        with torch.autocast(zero.device.type, enabled=False):
            terms = self._norms() if self.variant == "paper" else self._official_norms()
            return torch.stack([term.to(zero.device) for term in terms]).sum()

    def _norms(self) -> Iterator[Tensor]:
        """One for each device and dtype."""
        together: dict[tuple[torch.device, torch.dtype], list[tuple[Factors, float]]] = {}
        for _, _, piece, now in self._all():
            together.setdefault((now.lora_A.device, now.lora_A.dtype), []).append((now, piece.scaling))
        for entries in together.values():
            lora_as, lora_bs = [now.lora_A for now, _ in entries], [now.lora_B for now, _ in entries]
            yield FE.l1_penalty(lora_as, lora_bs, [scaling for _, scaling in entries], self.lambda_1)

    def _official_norms(self) -> Iterator[Tensor]:
        for _, _, _, now in self._all():
            wide = torch.promote_types(now.lora_A.dtype, torch.float32)
            yield self.lambda_1 * (now.lora_A.to(wide) @ now.lora_B.to(wide)).abs().sum()

    def report(self, threshold: float = 1e-3) -> Report:
        """Says per adapter how sparse every task's product is, and how much of it tasks share.

        The shares are, for every task that has ended, that of the elements of B_t A_t that are not 0
        (densities) and that of A_t inside of the span of earlier A (overlaps, as of `OLoRA`), and the mean
        over pairs of tasks of the share of elements that are not 0 in both (collisions).

        Args:
            threshold: elements of at most this share, in [0, 1], of the largest of B_t A_t count as 0. With 0
                the shares are those of the paper, which training without a proximal step leaves near 1.

        Returns:
            A printable `Report`, with the mean collisions in its summary.

        Raises:
            ArgumentError: for a threshold out of range.
        """
        self._check_not_exported("report")
        threshold = number("threshold", threshold, 0.0, 1.0)
        rows: list[dict[str, Any]] = []
        for key, _, _, now in self._all():
            tasks = now.tasks()
            shares = collisions(tasks, threshold)
            pairs = shares[torch.ones_like(shares).triu(1) > 0]
            rows.append(
                {
                    "name": key,
                    "rank": now.lora_past_A.shape[0],
                    "overlaps": overlaps(tasks),
                    "densities": tuple(shares.diagonal().tolist()),
                    "collisions": float(pairs.mean()) if pairs.numel() else 0.0,
                }
            )
        summary = {"tasks": self.tasks, "collisions": sum(row["collisions"] for row in rows) / len(rows)}
        return Report("N-LoRA factors", rows, [f"mean collisions {summary['collisions']:.4g}"], summary)
