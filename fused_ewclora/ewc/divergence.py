# SPDX-License-Identifier: Apache-2.0
"""What to say of lambda when the training has diverged under the penalty."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import EWCLoRAError
from ..fishers import EightBitFisher, Fisher, KroneckerFisher
from ..layers.finite import nonfinite
from ..layers.watch import local
from .placement import LocalPlacement, Placement

CHOOSE_LAMBDA = (
    "Set it with ewc.ewc_lambda = ..., or EWC(model, ewc_lambda=...). Its size depends on fisher_mode and "
    "the data: 1e7 is published for fisher_mode='batch' at batch size 128, which is convert_lambda(1e7, "
    "'batch', 'sample', batch_size=128) = 78125 for 'sample'; small models need far less"
)


def divergence(
    placement: Placement, fishers: Mapping[str, Fisher], ewc_lambda: float, fisher_mode: str
) -> str | None:
    """A sentence about lambda when adapters hold NaN or Inf, or the penalty is not finite, else None.

    It makes no collective calls: an error can be that of one process.
    """
    adapters = {
        f"{name} of {ref.key}": local(matrix)
        for ref in placement.refs
        for name, matrix in zip((ref.piece.a_name, ref.piece.b_name), ref.matrices(), strict=True)
    }
    bad, size = nonfinite(adapters), _size_of_penalty(placement, fishers, ewc_lambda)
    if not bad and math.isfinite(size):
        return None
    largest = max(map(_largest, fishers.values()), default=0.0)
    place = f"{bad[0]} holds NaN or Inf: the training has diverged. " if bad else ""
    return (
        f"{place}The penalty is {size:g} with ewc_lambda={ewc_lambda:g} and fisher_mode={fisher_mode!r}, "
        f"ewc_lambda * max F = {ewc_lambda * largest:.3g}; an ewc_lambda that is too large, or a learning "
        f"rate that is too large for it, is a likely cause. {CHOOSE_LAMBDA}"
    )


def _largest(fisher: Fisher) -> float:
    """The largest entry of F."""
    if isinstance(fisher, EightBitFisher):
        return fisher.largest()
    if isinstance(fisher, Tensor):
        return float(fisher.max()) if fisher.numel() else 0.0
    if not (fisher[0].numel() and fisher[1].numel()):
        return 0.0
    if isinstance(fisher, KroneckerFisher):
        return float(fisher.outputs.diagonal().max() * fisher.inputs.diagonal().max())
    return float(fisher.rows.max() * fisher.columns.max() / fisher.columns.sum())


@torch.no_grad()
def _size_of_penalty(placement: Placement, fishers: Mapping[str, Fisher], ewc_lambda: float) -> float:
    """The penalty of this process, NaN where it cannot be computed."""
    if not isinstance(placement, LocalPlacement):
        return math.nan
    try:
        return float(placement.penalty(fishers, ewc_lambda))
    except (EWCLoRAError, RuntimeError):
        return math.nan
