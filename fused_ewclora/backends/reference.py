# SPDX-License-Identifier: Apache-2.0
"""The plain PyTorch reference as a backend: serves every device and dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..reference import (
    ewc_penalty,
    fisher_accumulate,
    fisher_sums,
    kronecker_penalty,
    l1_penalty,
    lora_linear,
    merge,
)
from .candidate import Call, Candidate

_RUN: dict[str, Callable[..., Any]] = {
    "lora_linear": lora_linear.forward,
    "lora_linear_backward": lora_linear.backward,
    "ewc_penalty": ewc_penalty.penalty_and_grads,
    "factored_penalty": kronecker_penalty.penalty_and_grads,
    "kronecker_penalty": kronecker_penalty.penalty_and_grads,
    "l1_penalty": l1_penalty.penalty_and_grads_in_blocks,
    "fisher_accumulate_": fisher_accumulate.fisher_accumulate_,
    "fisher_sums_": fisher_sums.fisher_sums_,
    "merge_": merge.merge_,
    "soft_threshold_": merge.soft_threshold_,
}


def _supports(call: Call) -> str | None:
    return None


def candidates(op: str) -> tuple[Candidate, ...]:
    """The reference implementation of `op`."""
    return (Candidate("reference", "plain PyTorch", _supports, _RUN[op]),)
