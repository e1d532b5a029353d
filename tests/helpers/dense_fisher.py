"""The Fisher of a plain model by autograd, one sample at a time, in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def dense_fisher(
    plain: nn.Module, names: Sequence[str], samples: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> dict[str, Tensor]:
    """The mean over samples of (dL_n / dW)^2 for the weights of the layers, or the parameters, called
    `names`; `loss(model, sample)` is L_n. A weight that takes no part in the loss has the Fisher 0."""
    model = copy.deepcopy(plain).double().eval().requires_grad_(False)
    parameters = dict(model.named_parameters())
    weights = [parameters[name if name in parameters else f"{name}.weight"] for name in names]
    for weight in weights:
        weight.requires_grad_(True)
    totals = [torch.zeros_like(weight) for weight in weights]
    count = 0
    for sample in samples:
        grads = torch.autograd.grad(loss(model, sample), weights, allow_unused=True)
        for total, grad in zip(totals, grads, strict=True):
            total += 0.0 if grad is None else grad**2
        count += 1
    return {name: total / count for name, total in zip(names, totals, strict=True)}
