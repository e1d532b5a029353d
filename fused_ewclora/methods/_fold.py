"""The end of a task: adapters go into the weights, all of them or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..distributed.transaction import Transaction
from ..errors import ArgumentError
from ..ewc.fisher_pass import nonfinite
from ..layers.adapted import AdaptedLinear
from ..layers.inject import check_mergeable


@contextmanager
def folding(model: nn.Module, layers: Mapping[str, AdaptedLinear]) -> Iterator[Transaction]:
    """W <- W + B diag(s) A in every layer (fp32 sum, one rounding), then the block, which starts adapters
    anew.

    What the block changes through the transaction is undone with the weights when it raises. Raises
    `TargetError` for merged or tied weights and `ArgumentError` for sums that are not finite, before anything
    is changed.
    """
    check_mergeable(model)
    with torch.no_grad():
        values = {name: layer.consolidated_weight() for name, layer in layers.items()}
    if bad := nonfinite(values):
        raise ArgumentError(
            f"end_task: {bad[0]}: expected a finite W + B diag(s) A, got NaN or Inf ({len(bad)} such "
            "layers); nothing was changed"
        )
    with torch.no_grad(), Transaction() as change:
        for name, layer in layers.items():
            change.copy_(layer.base_weight, values[name])
        yield change
    for layer in layers.values():
        layer.consolidated_tasks += 1
