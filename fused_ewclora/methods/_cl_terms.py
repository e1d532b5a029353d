# SPDX-License-Identifier: Apache-2.0
"""The terms of CL-LoRA's loss beside the caller's, and the weights of a gradient (docs/mathematics.md,
section 7)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError

TINY = 1e-8  # of the official code, against block weights of 0


def distilled(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The cross entropy of softened logits `[N, C]`, the mean over samples."""
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ArgumentError(f"early_exit: expected logits [N, C], got {list(student.shape)}")
    log_p = F.log_softmax(student / temperature, dim=1)
    return -(F.softmax(teacher / temperature, dim=1) * log_p).sum() / student.shape[0]


def recomputes(output: Tensor) -> bool:
    """Whether the backward pass of a tensor goes through reentrant activation checkpoints, which compute
    their blocks again."""
    seen: set[Any] = set()
    waiting: list[Any] = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return False


def mean_cosine(now: Tensor, earlier: Tensor) -> Tensor:
    """The mean over earlier tasks of |cos| of block weights `[adapters]` and `[tasks, adapters]`."""
    norms = torch.linalg.vector_norm(earlier, dim=1, keepdim=True)
    return ((earlier / (norms + TINY)) @ (now / (torch.linalg.vector_norm(now) + TINY))).abs().mean()


def importance(teacher: Tensor) -> Tensor:
    """||row i of B|| over its mean over rows, `[rows]`; 1 for a B of 0."""
    norms = torch.linalg.vector_norm(teacher.detach(), dim=1)
    total = norms.sum()
    return torch.where(total > 0.0, norms * (len(norms) / total), torch.ones_like(norms))
