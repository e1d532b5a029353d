# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing, reentrant or not: the same gradients, dropout included."""

from __future__ import annotations

import pytest
import torch
from strategies import DROPOUT_BACKENDS, Values
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_ewclora import functional as FE

pytestmark = pytest.mark.parametrize("backend", DROPOUT_BACKENDS)


def gradients(backend: str, reentrant: bool | None, dropout_p: float, seed: int | None) -> list[Tensor]:
    """Two layers and an activation; `reentrant` None runs without checkpointing."""
    values = Values(0, backend)
    inputs = [
        values.normal(*shape) for shape in ((9, 33), (29, 33), (5, 33), (29, 5), (33, 29), (4, 29), (33, 4))
    ]
    for tensor in inputs:
        tensor.requires_grad_()
    options = {"dropout_p": dropout_p, "training": True, "seed": seed, "backend": backend}

    def block(x: Tensor, w1: Tensor, a1: Tensor, b1: Tensor, w2: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        hidden = FE.lora_linear(x, w1, None, a1, b1, **options).tanh()
        return FE.lora_linear(hidden, w2, None, a2, b2, **options)

    torch.manual_seed(11)
    y = block(*inputs) if reentrant is None else checkpoint(block, *inputs, use_reentrant=reentrant)
    y.square().sum().backward()
    return [tensor.grad for tensor in inputs]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("dropout_p", "seed"), [(0.0, None), (0.5, None), (0.5, 3)])
def test_gradients_unchanged(backend, reentrant, dropout_p, seed):
    """Gradients are the same as without checkpointing."""
    plain = gradients(backend, None, dropout_p, seed)
    assert all(map(torch.equal, gradients(backend, reentrant, dropout_p, seed), plain))


def test_other_mask_differs(backend):
    """With other seeds the gradients differ: the test above can fail."""
    assert not torch.equal(gradients(backend, False, 0.5, 3)[0], gradients(backend, False, 0.5, 4)[0])
