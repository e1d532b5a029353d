# SPDX-License-Identifier: Apache-2.0
"""The Fisher of a plain model by autograd, one sample at a time, in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def dense_fisher(
    plain: nn.Module,
    names: Sequence[str] | Mapping[str, str],
    samples: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
) -> dict[str, Tensor]:
    """The mean over samples of (dL_n / dW)^2 for the weights of the layers called `names`, or by other names
    for parameters; `loss(model, sample)` is L_n. A weight that takes no part in the loss has the Fisher 0."""
    model = copy.deepcopy(plain).double().eval().requires_grad_(False)
    places = names if isinstance(names, Mapping) else {name: f"{name}.weight" for name in names}
    weights = [model.get_parameter(place).requires_grad_(True) for place in places.values()]
    totals = [torch.zeros_like(weight) for weight in weights]
    count = 0
    for sample in samples:
        grads = torch.autograd.grad(loss(model, sample), weights, allow_unused=True)
        for total, grad in zip(totals, grads, strict=True):
            total += 0.0 if grad is None else grad**2
        count += 1
    return {name: total / count for name, total in zip(names, totals, strict=True)}
