# SPDX-License-Identifier: Apache-2.0
"""Layers whose adapters are composed of more than lora_A and lora_B."""

from __future__ import annotations

import copy
import pickle

import torch
import torch.nn.functional as F
from tiny_models import WIDTH, adapted, batches, data
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.functional import Adapter

PAST = 3  # rank of the frozen direction


class Stacked:
    """One frozen direction beside lora_A and lora_B, each with a learned magnitude."""

    def adapters(self, layer: fe.AdaptedLinear) -> list[Adapter]:
        piece, lora_a, lora_b = layer.adapter_parameters()[0]
        magnitudes = layer.lora_magnitudes.repeat_interleave(torch.tensor([PAST, piece.r]))
        joined = torch.cat([layer.lora_past_A, lora_a]), torch.cat([layer.lora_past_B, lora_b], dim=1)
        return [Adapter(*joined, magnitudes, piece.rows)]


class Nothing:
    """All ranks are pruned."""

    def adapters(self, layer: fe.AdaptedLinear) -> list[Adapter]:
        return []


def stacked() -> nn.Module:
    model = adapted()
    layer = model.fc
    layer.lora_past_A = nn.Parameter(torch.randn(PAST, WIDTH).double(), requires_grad=False)
    layer.lora_past_B = nn.Parameter(torch.randn(WIDTH, PAST).double(), requires_grad=False)
    layer.lora_magnitudes = nn.Parameter(torch.tensor([0.5, 2.0]).double())
    layer.composer = Stacked()
    return model


def delta(layer: fe.AdaptedLinear) -> Tensor:
    past = layer.lora_past_B @ layer.lora_past_A
    return layer.lora_magnitudes[0] * past + layer.lora_magnitudes[1] * layer.lora_B @ layer.lora_A


def test_forward_uses_composer():
    """A layer runs the factors that its composer returns."""
    layer = stacked().fc
    x = torch.randn(5, WIDTH).double()
    dy = torch.randn(5, WIDTH).double()
    parameters = [layer.lora_A, layer.lora_B, layer.lora_magnitudes]
    gradients = torch.autograd.grad(layer(x), parameters, dy)
    y = F.linear(x, layer.weight + delta(layer), layer.bias)
    torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)
    for ours, expected in zip(gradients, torch.autograd.grad(y, parameters, dy), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_merge_uses_composer():
    """Merging and consolidation use the composed factors that run."""
    model = stacked()
    x, y = data(8)
    expected = model.fc.weight + delta(model.fc).detach()
    torch.testing.assert_close(model.fc.consolidated_weight(), expected, rtol=1e-12, atol=1e-12)
    before = model(x)
    fe.merge(model)
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-12)
    fe.unmerge(model)
    ewc = fe.EWC(model, ewc_lambda=3.0, fisher_dtype=torch.float64)
    ewc.estimate_fisher(batches(x, y, 4), F.cross_entropy)
    ewc.consolidate()
    torch.testing.assert_close(model.fc.weight, expected, rtol=1e-12, atol=1e-12)


def test_penalty_uses_composer():
    """The penalty is that of the composed factors that run."""
    model = stacked()
    ewc = fe.EWC(model, ewc_lambda=3.0, fisher_dtype=torch.float64)
    ewc.end_task(batches(*data(8), 4), F.cross_entropy)
    with torch.no_grad():
        for _, parameter in model.fc.named_lora_parameters():
            parameter.normal_()
    fisher = ewc.fishers["fc"]
    expected = 1.5 * (fisher * delta(model.fc).square()).sum()
    for key, part in (("qkv.k", "k"), ("qkv.v", "v")):
        product = getattr(model.qkv, f"lora_B_{part}") @ getattr(model.qkv, f"lora_A_{part}")
        expected = expected + 1.5 * (ewc.fishers[key] * product.square()).sum()
    penalty = ewc.penalty()
    torch.testing.assert_close(penalty.double(), expected, rtol=1e-6, atol=0.0)
    wanted = [model.fc.lora_A, model.fc.lora_B, model.fc.lora_magnitudes]
    for ours, theirs in zip(
        torch.autograd.grad(penalty, wanted), torch.autograd.grad(expected, wanted), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_direct_penalty_gradients():
    """Penalty gradients added without a loss reach the parameters of the composition."""
    model = stacked()
    ewc = fe.EWC(model, ewc_lambda=3.0, fisher_dtype=torch.float64)
    ewc.end_task(batches(*data(8), 4), F.cross_entropy)
    with torch.no_grad():
        model.fc.lora_B.normal_()
    wanted = [model.fc.lora_A, model.fc.lora_B, model.fc.lora_magnitudes]
    expected = torch.autograd.grad(ewc.penalty(), wanted)
    for parameter in wanted:
        parameter.grad = torch.ones_like(parameter)
    torch.testing.assert_close(ewc.add_penalty_grad_(grad_scale=2.0), ewc.penalty().detach())
    for parameter, gradient in zip(wanted, expected, strict=True):
        torch.testing.assert_close(parameter.grad, 1 + 2 * gradient, rtol=1e-6, atol=1e-12)


def test_zero_ranks():
    """A layer without ranks is its base."""
    model = adapted()
    model.fc.composer = Nothing()
    x = torch.randn(2, WIDTH).double()
    assert torch.equal(model.fc(x), F.linear(x, model.fc.weight, model.fc.bias))
    assert torch.equal(model.fc.consolidated_weight(), model.fc.weight)
    ewc = fe.EWC(model, fisher_dtype=torch.float64)
    ewc.end_task(batches(*data(8), 4), F.cross_entropy)
    plain = fe.EWC(adapted(), fisher_dtype=torch.float64)
    with torch.no_grad():
        plain.model.fc.lora_B.zero_()
    plain.end_task(batches(*data(8), 4), F.cross_entropy)
    torch.testing.assert_close(ewc.fishers["fc"], plain.fishers["fc"], rtol=1e-12, atol=0.0)
    fe.eject(model)
    assert type(model.fc) is nn.Linear and "composer" not in vars(model.fc)


def test_copies_and_files():
    """Copies and files keep the composed parameters."""
    model = stacked()
    x = data(4)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    assert {"fc.lora_past_A", "fc.lora_magnitudes"} <= model.state_dict().keys()
    assert "fc.lora_magnitudes" in dict(model.named_parameters())
