# SPDX-License-Identifier: Apache-2.0
"""Arguments of an autograd.Function as the compiler wants them: each tensor once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def distinct(tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """While compiling, views in place of tensors that came before; their gradients add up as before.

    Dynamo does not trace Functions that are given one tensor twice. Eager calls are left as they are.
    """
    if not torch.compiler.is_compiling():
        return tensors
    seen: set[Tensor] = set()
    given: list[Tensor | None] = []
    for tensor in tensors:
        if tensor is None or tensor not in seen:
            given.append(tensor)
        else:
            given.append(tensor.view_as(tensor))
        if tensor is not None:
            seen.add(tensor)
    return given
