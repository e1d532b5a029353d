# SPDX-License-Identifier: Apache-2.0
"""Adapters folded into the base weights at the end of a task: every new value is computed and checked first,
then all of them are written, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ..distributed.transaction import Transaction
from ..errors import EWCLoRAError
from ..layers.adapted import AdaptedLinear, Updates
from ..layers.finite import check_finite
from ..layers.quantised import warn_of_rounding


@contextmanager
def folding(
    layers: Mapping[str, AdaptedLinear],
    weights: Mapping[str, Updates],
    *,
    action: str,
    error: type[EWCLoRAError],
    agree: Callable[[Callable[[], None]], None],
    others: Mapping[str, Tensor] | None = None,
    finite: bool = True,
) -> Iterator[Transaction]:
    """Writes new base weights, then runs the block, which starts the adapters anew through the transaction;
    an exception in it undoes everything.

    Args:
        weights: what to write to the base weights, by the names of layers.
        action: the name of the call, with which errors begin.
        error: raised when a new value holds NaN or Inf, before anything is written.
        agree: makes an error in one process an error in all.
        others: further new values to check, by what they are.
        finite: whether to check new values.
    """
    values = dict(others or {})
    for name, updates in weights.items():
        new = f"W + B diag(s) A of {name or 'model'}"
        values |= {f"{new}, tensor {i}" if i else new: value for i, (_, value) in enumerate(updates)}
    if finite:
        agree(lambda: check_finite(values, action, error))
    with torch.no_grad(), Transaction() as change:
        for updates in weights.values():
            for target, value in updates:
                change.copy_(target, value)
        yield change
        for name in weights:
            layers[name].consolidated_tasks += 1
    warn_of_rounding(action, {name: layers[name] for name in weights})
