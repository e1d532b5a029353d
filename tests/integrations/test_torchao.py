# SPDX-License-Identifier: Apache-2.0
"""What is particular to torchao: weights that are subclasses of tensors in an ordinary `nn.Linear`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchao.quantization as ao
from quantised_models import MLP, TARGETS, batch, dense, model_of, trained
from torch import nn

import fused_ewclora as fe
from fused_ewclora.integrations.torchao import LoRATorchAOLinear

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def quantised(config, dtype: torch.dtype = torch.float32) -> MLP:
    model = MLP(dtype=dtype)
    ao.quantize_(model, config, filter_fn=lambda module, name: name in TARGETS)
    return model


def test_exact_in_fp64():
    """torchao has float8 weights of fp64 numbers: outputs, gradients and residuals are then exact to fp64."""
    model = quantised(ao.Float8WeightOnlyConfig(), torch.float64)
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=TARGETS, quantised_merge="residual"))
    trained(model, 1)
    assert model.fc1.lora_A.dtype == torch.float64
    plain = dense(model)
    x, y = batch(0, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
    F.cross_entropy(model(x), y).backward()
    F.cross_entropy(plain(x), y).backward()
    for name, layer in fe.adapters(model).items():
        g = plain.get_submodule(name).weight.grad
        torch.testing.assert_close(layer.lora_A.grad, layer.lora_B.T @ g, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(layer.lora_B.grad, g @ layer.lora_A.T, rtol=1e-9, atol=1e-12)


def test_saves_no_numbers():
    """Between forward and backward no layer holds its dequantised weight."""
    model = model_of("Int8Tensor")
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=TARGETS))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(batch(0)[0].requires_grad_())
    shapes = {tuple(layer.weight.shape) for layer in fe.adapters(model).values()}
    large = [t for t in saved if tuple(t.shape) in shapes or tuple(reversed(t.shape)) in shapes]
    assert all(isinstance(t, ao.Int8Tensor) for t in large) and len(large) == 2


def test_quantised_inputs_are_refused():
    """torchao computes no gradient of inputs that it quantises."""
    model = quantised(ao.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(fe.TargetError, match="fc1: its Int8Tensor quantises inputs as well"):
        fe.inject(model, fe.LoRAConfig(r=2, target_modules=TARGETS))
    assert type(model.fc1) is nn.Linear


def test_unknown_subclasses_are_refused():
    """A weight of an unknown subclass of tensors is refused by name."""
    model = MLP()
    weight = ao.Int8Tensor.from_hp(model.fc1.weight.detach(), granularity=ao.PerRow())

    class Other(ao.Int8Tensor):
        pass

    other = Other(weight.qdata, weight.scale, weight.block_size, weight.dtype)
    model.fc1.weight = nn.Parameter(other, requires_grad=False)
    with pytest.raises(
        fe.TargetError, match="fc1: its weight is Other, which is not one that can be adapted"
    ):
        fe.inject(model, fe.LoRAConfig(r=2, target_modules=["fc1"]))


def test_mixed_with_plain_layers():
    """Quantised and ordinary layers of one model are adapted side by side."""
    model = quantised(ao.Int8WeightOnlyConfig())
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=[*TARGETS, "head"], quantised_merge="residual"))
    assert type(model.fc1) is LoRATorchAOLinear and type(model.head) is fe.LoRALinear
    trained(model, 1)
    x, _ = batch(0)
    before = model(x)
    fe.EWC(model, 1.0).end_task([batch(0)], F.cross_entropy)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0.01)
