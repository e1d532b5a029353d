# SPDX-License-Identifier: Apache-2.0
"""Adapters on the convolutions of real models against plain copies with dense weights, in fp64."""

from __future__ import annotations

import pytest
import seeding
import torch
import torch.nn.functional as F
from conv_architectures import ARCHITECTURES, CLASSES, convolutions
from conv_models import dense, dense_squares
from models import randomize_adapters_
from torch import Tensor

import fused_ewclora as fe

TIGHT = {"rtol": 1e-8, "atol": 1e-10}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def data(size: int, samples: int = 3) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, 3, size, size, generator=seeding.generator(1), dtype=torch.float64)
    return x, torch.arange(samples) % CLASSES


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_convolutions_of_models(name, memory_format):
    """Outputs, gradients of every adapter through the Fisher of samples, and the model after eject."""
    architecture = ARCHITECTURES[name]
    model = architecture.make().to(memory_format=memory_format)
    names, keys = convolutions(model), list(model.state_dict())
    assert len(names) == architecture.adapted
    fe.inject(model, fe.LoRAConfig(r=2, lora_alpha=4, target_modules=names))
    randomize_adapters_(model)
    x, y = data(architecture.size)
    x = x.to(memory_format=memory_format)
    assert set(fe.verify_forward(model, x).values()) == {1}
    output = model(x)
    torch.testing.assert_close(output, dense(model)(x), **TIGHT)
    expected = dense_squares(model, [(x, y)])
    ewc = fe.EWC(model, 1.0, fisher_dtype=torch.float64)
    ewc.end_task([(x[:2], y[:2]), (x[2:], y[2:])], F.cross_entropy)
    for key, fisher in expected.items():
        torch.testing.assert_close(
            ewc.fishers[key], fisher, rtol=1e-7, atol=1e-9 * float(fisher.max()), msg=key
        )
    torch.testing.assert_close(model(x), output, **TIGHT)
    fe.eject(model)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), output, **TIGHT)


@pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if a.grouped])
def test_grouped_convolutions(name):
    """Depthwise convolutions are refused by name."""
    model = ARCHITECTURES[name].make()
    names = convolutions(model, grouped=True)
    assert len(names) == ARCHITECTURES[name].grouped
    for layer in names[:2]:
        with pytest.raises(fe.TargetError, match=rf"{layer}: it is a (depthwise|grouped) convolution"):
            fe.inject(model, fe.LoRAConfig(target_modules=[layer]))
    leaf = names[0].rpartition(".")[2]
    with pytest.raises(fe.TargetError, match=r"convolution \(groups="):
        fe.inject(model, fe.LoRAConfig(target_modules=[leaf]))


def test_mlp_of_convnext():
    """The 1 x 1 convolutions of conv_mlp=True are the linear layers of conv_mlp=False."""
    import timm

    options = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "num_classes": CLASSES}
    convs, linears = (
        timm.create_model("convnext_atto", conv_mlp=flag, **options).double().eval() for flag in (True, False)
    )
    state = {key: value.reshape(linears.state_dict()[key].shape) for key, value in convs.state_dict().items()}
    linears.load_state_dict(state)
    x, y = data(32)
    results = []
    for model in (convs, linears):
        torch.manual_seed(0)
        fe.inject(model, fe.LoRAConfig(r=2, target_modules=["mlp.fc1", "mlp.fc2"]))
        randomize_adapters_(model)
        ewc = fe.EWC(model, 1.0, fisher_dtype=torch.float64)
        ewc.end_task([(x, y)], F.cross_entropy)
        results.append((model(x), list(ewc.fishers.values())))
    torch.testing.assert_close(*results, **TIGHT)
