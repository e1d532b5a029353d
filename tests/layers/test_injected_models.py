# SPDX-License-Identifier: Apache-2.0
"""Injected models under copying, activation checkpointing and compilation, and their gradients."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from models import (
    X,
    explicit_delta,
    injected,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fused_ewclora as fe


def test_copies_and_pickles():
    """Copies and pickles of an injected model work."""
    model = injected()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), model(X))
        fe.eject(other)
        assert all(p.requires_grad for p in other.parameters())
    assert len(fe.adapters(model)) == 2


def gradients(model: nn.Module, forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    forward(X.clone().requires_grad_()).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool):
    """Activation checkpointing gives the same gradients."""
    model = injected()

    def checkpointed(x: Tensor) -> Tensor:
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return model.head(x.mean(1))

    def plain(x: Tensor) -> Tensor:
        for block in model.blocks:
            x = block(x)
        return model.head(x.mean(1))

    expected = gradients(model, plain)
    assert set(expected) == {name for name, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(gradients(model, checkpointed), expected, rtol=0, atol=0)


def test_compile_one_graph():
    """A compiled model is one graph and equals the eager one."""
    model = injected()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X))
    torch.testing.assert_close(gradients(model, compiled), gradients(model, model))
    with fe.disabled(model):
        torch.testing.assert_close(compiled(X), model(X))
    assert fe.verify_forward(compiled, X) == {f"_orig_mod.blocks.{i}.attn.qkv": 1 for i in (0, 1)}


def test_matches_explicit_weight():
    """Gradients are those of the explicit weight."""
    model = injected().double()
    x = X.double()
    model(x).square().sum().backward()
    for name, layer in fe.adapters(model).items():
        explicit = copy.deepcopy(model)
        fe.eject(explicit)
        for p in explicit.parameters():
            p.grad = None
        explicit(x).square().sum().backward()
        g = explicit.get_submodule(name).weight.grad
        for adapter, lora_a, lora_b in layer.adapter_parameters():
            rows = torch.cat([torch.arange(start, stop) for start, stop in adapter.rows])
            torch.testing.assert_close(lora_a.grad, adapter.scaling * lora_b.T @ g[rows])
            torch.testing.assert_close(lora_b.grad, adapter.scaling * g[rows] @ lora_a.T)
    assert any(explicit_delta(layer).any() for layer in fe.adapters(model).values())
