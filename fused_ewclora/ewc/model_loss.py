# SPDX-License-Identifier: Apache-2.0
"""The loss that a model computes itself, as those of transformers do, and what it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .known_losses import summed

IGNORED = -100  # target that cross_entropy leaves out


def loss_of(output: Any) -> Tensor | None:
    """The `loss` attribute or "loss" entry of a model output, if it is a tensor."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else None


def paired(form: str, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the targets that they predict, which are those of the next position where a model shifts."""
    if form == "shifted":
        return logits[:, :-1], targets[:, 1:]
    return logits, targets.reshape(logits.shape[:-1])


def _possible(logits: Tensor, targets: Any) -> list[str]:
    """The forms that the shapes allow and whose targets are classes of the logits."""
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dtype == torch.bool:
        return []
    shape = logits.shape[:-1]
    if logits.dim() < 2 or targets.shape not in (shape, (*shape, 1)) or not targets.numel():
        return []
    classes = (targets >= 0) & (targets < logits.shape[-1])
    if not bool((classes | (targets == IGNORED)).all()):
        return []
    shifted = logits.dim() == 3 and targets.shape == shape and shape[1] > 1
    return ["aligned", "shifted"] if shifted else ["aligned"]


def summed_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(the sum of -log p over all targets, how many of them count); the classes are the last dimension."""
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return summed(losses), (targets != IGNORED).sum()


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _near(total: Tensor, count: Tensor, loss: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether total / count is the loss, up to rounding in `dtype` and in fp32 sums."""
    tolerance = max(1e-4, 4 * torch.finfo(dtype).eps)
    return (total / count.clamp(min=1) - loss).abs() <= tolerance * (1 + loss.abs())


class ModelLoss:
    """Finds out, from its value, whether the loss of a model is the mean cross entropy of its logits against
    its labels, at the same positions ("aligned") or at the next ones ("shifted", causal language models)."""

    def __init__(self) -> None:
        self._form: str | None = None

    def form(self, loss: Tensor, logits: Tensor, targets: Any) -> str | None:
        """The form, or None for another loss. Batches without a target that counts decide nothing."""
        if self._form is not None or not loss.is_floating_point():
            return self._form
        matching, counts = [], {}
        with torch.no_grad():
            for form in _possible(logits, targets):
                total, counts[form] = summed_losses(*paired(form, _wide(logits), targets))
                if int(counts[form]) and bool(_near(total, counts[form], loss, loss.dtype)):
                    matching.append(form)
        if not matching and not bool(torch.isfinite(loss)):  # 0 / 0
            return next((form for form, count in counts.items() if not int(count)), None)
        if len(matching) > 1:
            matching = [_by_gradient(loss, logits, targets)]
        self._form = matching[0] if matching else None
        return self._form

    def changed(self, loss: Tensor, total: Tensor, count: Tensor, dtype: torch.dtype) -> Tensor:
        """Whether a later loss has another form; total and count are those of `summed_losses`, of logits in
        `dtype`."""
        loss, total = loss.detach(), total.detach()
        return (count > 0) & torch.isfinite(loss) & ~_near(total, count, loss, dtype)


def _by_gradient(loss: Tensor, logits: Tensor, targets: Tensor) -> str:
    """The form whose gradient is that of the loss; values agree by accident where logits are uniform."""
    (given,) = torch.autograd.grad(loss, [logits], retain_graph=True, allow_unused=True)
    if given is None:
        return "aligned"
    leaf = logits.detach().requires_grad_()
    errors = {}
    for form in ("aligned", "shifted"):
        total, count = summed_losses(*paired(form, _wide(leaf), targets))
        (expected,) = torch.autograd.grad(total / count, [leaf])
        errors[form] = float((expected - given).norm())
    return min(errors, key=errors.__getitem__)
