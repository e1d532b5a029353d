# SPDX-License-Identifier: Apache-2.0
"""The check that new values are finite before any of them is written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import EWCLoRAError


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold NaN or Inf; one host synchronisation for all of them."""
    if not tensors:
        return []
    device = next(iter(tensors.values())).device
    flags = torch.stack([torch.isfinite(_wide(tensor)).all().to(device) for tensor in tensors.values()])
    return [name for name, finite in zip(tensors, flags.tolist(), strict=True) if not finite]


def _wide(tensor: Tensor) -> Tensor:
    """`isfinite` is not defined for floats of one byte."""
    return tensor.float() if tensor.element_size() == 1 else tensor


def check_finite(new: Mapping[str, Tensor], action: str, error: type[EWCLoRAError]) -> None:
    """Raises `error`, which begins with the name of the call, `action`, when a new value holds NaN or Inf."""
    if bad := nonfinite(new):
        count = f" ({len(bad)} of {len(new)} tensors)" if len(new) > 1 else ""
        raise error(f"{action}: {bad[0]}: expected finite values, got NaN or Inf{count}; nothing was changed")
