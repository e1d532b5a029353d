# SPDX-License-Identifier: Apache-2.0
"""The settings of `EWC`: their allowed values, and the conversion of lambda between Fisher modes."""

from __future__ import annotations

import math
from typing import TypeVar, get_args

import torch

from ..errors import ArgumentError
from ..literals import FisherMode, MergeMode, Update

FISHER_MODES: tuple[FisherMode, ...] = get_args(FisherMode)
MERGE_MODES: tuple[MergeMode, ...] = get_args(MergeMode)
UPDATES: tuple[Update, ...] = get_args(Update)
LARGEST = torch.finfo(torch.float32).max  # the penalty is computed in fp32
Named = TypeVar("Named", bound=str)


def one_of(name: str, value: str, allowed: tuple[Named, ...]) -> Named:
    for known in allowed:
        if value == known:
            return known
    raise ArgumentError(f"{name}: expected one of {allowed}, got {value!r}")


def number(name: str, value: float, low: float, high: float) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not (low <= value <= high and math.isfinite(value))
    ):
        upper = "" if math.isinf(high) else f" and <= {high}"
        raise ArgumentError(f"{name}: expected a finite number >= {low}{upper}, got {value!r}")
    return float(value)


def checked_lambda(value: float, name: str = "ewc_lambda") -> float:
    """Check a strength of the penalty: a number >= 0 that is finite in fp32; returns it."""
    return number(name, value, 0.0, LARGEST)


def convert_lambda(ewc_lambda: float, from_mode: FisherMode, to_mode: FisherMode, batch_size: int) -> float:
    """The lambda that gives the same penalty with a Fisher of the other mode, `lambda_sample = lambda_batch /
    batch_size` (docs/mathematics.md, section 3.2).

    It rests on `F_batch ~ F_sample / batch_size`, which holds in expectation where the mean gradient of a
    batch is small beside the gradients of single samples, that is near an optimum: `E F_batch = F_sample / n
    + (1 - 1/n) (E g)^2`. The published lambda = 1e7 belongs to mode "batch" at batch size 128.

    Args:
        ewc_lambda: of from_mode.
        from_mode: "sample" or "batch".
        to_mode: "sample" or "batch".
        batch_size: samples per batch of the Fisher pass.

    Returns:
        The lambda of to_mode.

    Raises:
        ArgumentError: for a value that is out of range.

    Examples:
        >>> fe.convert_lambda(1e7, "batch", "sample", batch_size=128)
        78125.0
    """
    checked_lambda(ewc_lambda)
    one_of("from_mode", from_mode, FISHER_MODES)
    one_of("to_mode", to_mode, FISHER_MODES)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ArgumentError(f"batch_size: expected an integer >= 1, got {batch_size!r}")
    if from_mode == to_mode:
        return float(ewc_lambda)
    return ewc_lambda / batch_size if to_mode == "sample" else ewc_lambda * batch_size
