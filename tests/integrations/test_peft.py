# SPDX-License-Identifier: Apache-2.0
"""PEFT's LoRA layers on the fused op: the same numbers, keys, files and methods as before."""

from __future__ import annotations

import copy
import json
import pickle
import re

import peft
import pytest
import torch
from models import MLP
from peft.tuners.lora.layer import Linear as PeftLinear
from peft_models import (
    assert_equal_runs,
    assert_same_bits,
    inputs,
    lora_config,
    pair,
    peft_model,
    randomise,
)
from replicas import Replicated
from torch import nn
from transformers.pytorch_utils import Conv1D

import fused_ewclora as fe
from fused_ewclora.integrations._peft_layers import FusedPeftLinear
from fused_ewclora.integrations.peft import accelerate_, restore_

# Both say what they think of settings that are meant here.
pytestmark = pytest.mark.filterwarnings("ignore::Warning:peft", "ignore::FutureWarning:transformers")

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


class Transposed(nn.Module):
    """GPT-2's kind of linear layer beside an `nn.Linear` without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = Conv1D(10, 6)
        self.fc2 = nn.Linear(10, 4, bias=False)
        nn.init.normal_(self.fc1.bias)

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PeftLinear)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("build", [MLP, Transposed])
def test_outputs_gradients(build, dtype):
    """Outputs and gradients are those of PEFT."""
    plain, fused = pair(build(), dtype)
    assert all(type(layer) is FusedPeftLinear for layer in layers(fused).values())
    assert {p.dtype for n, p in fused.named_parameters() if "lora_" in n} == {
        torch.float64 if dtype == torch.float64 else torch.float32  # autocast_adapter_dtype
    }
    assert_equal_runs(plain, fused, inputs(dtype))


def test_low_precision_adapters():
    """Adapters of low precision are served as they are."""
    torch.manual_seed(0)
    model = peft.get_peft_model(MLP().bfloat16(), lora_config(), autocast_adapter_dtype=False)
    randomise(model)
    fused = copy.deepcopy(model)
    assert not accelerate_(fused).summary["not_fused"]
    assert_equal_runs(model, fused, inputs(torch.bfloat16))


def test_trainable_biases():
    """Biases that train get their gradients."""
    plain, fused = pair(bias="lora_only")
    assert fused.base_model.model.fc1.base_layer.bias.requires_grad
    assert_equal_runs(plain, fused, inputs())


def test_plain_model_layers():
    """Layers that PEFT put into a plain model are taken over."""
    plain = peft.inject_adapter_in_model(lora_config(), MLP().double())
    randomise(plain)
    fused = copy.deepcopy(plain)
    assert accelerate_(fused).summary["layers"] == 2
    assert_equal_runs(plain, fused, inputs())
    y = fused(inputs())
    ewc = fe.integrations.peft.attach_ewc(fused, fisher_dtype=torch.float64)
    ewc.end_task([(inputs(), torch.arange(5) % 4)], nn.functional.cross_entropy)
    assert list(ewc.fishers) == ["fc1", "fc2"]
    torch.testing.assert_close(fused(inputs()), y, rtol=1e-13, atol=1e-13)


def test_autocast_dtype():
    """Under autocast, the output has the autocast dtype and the values of PEFT."""
    plain, fused = pair(dtype=torch.float32)
    x = inputs(torch.float32)
    exact = copy.deepcopy(plain).double()(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own, ours = plain(x), fused(x)
    assert ours.dtype == own.dtype == torch.bfloat16
    error = (own.double() - exact).abs().max()
    rounding = torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= 2 * error + rounding


def test_class_swap_preserves():
    """The class swap keeps keys, modules and `isinstance` results."""
    model = peft_model()
    keys, modules = list(model.state_dict()), list(model.modules())
    before = {name: set(vars(layer)) for name, layer in layers(model).items()}
    report = accelerate_(model)
    assert report.summary == {"layers": 2, "skipped": {}, "not_fused": {}}
    assert [row["name"] for row in report.rows] == ["fc1", "fc2"]
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert str(accelerate_(model)) == str(report)  # a second call finds the same
    assert restore_(model) == 2 and restore_(model) == 0
    assert {name: set(vars(layer)) for name, layer in layers(model).items()} == before
    assert {type(layer) for layer in layers(model).values()} == {PeftLinear}


def test_saved_bytes(tmp_path):
    """Saved files are the same, byte for byte."""
    plain, fused = pair(modules_to_save=["head"])
    for name, model in (("plain", plain), ("fused", fused)):
        model.save_pretrained(tmp_path / name)
    weights, config = "adapter_model.safetensors", "adapter_config.json"
    assert (tmp_path / "plain" / weights).read_bytes() == (tmp_path / "fused" / weights).read_bytes()
    configs = [json.loads((tmp_path / name / config).read_text()) for name in ("plain", "fused")]
    for saved_config in configs:  # PEFT writes a set in whatever order it has
        saved_config["target_modules"].sort()
    assert configs[0] == configs[1]


def test_merge_unmerge():
    """Merging and unmerging are those of PEFT."""
    plain, fused = pair()
    x = inputs()
    for model in (plain, fused):
        model.merge_adapter()
    assert fused.base_model.model.fc1.merged and torch.equal(plain(x), fused(x))
    assert "merged" in str(fe.explain(fused))
    for model in (plain, fused):
        model.unmerge_adapter()
    assert_equal_runs(plain, fused, x)
    merged, other = plain.merge_and_unload(), fused.merge_and_unload()
    assert type(other) is MLP and torch.equal(merged(x), other(x))
    assert not any(isinstance(module, PeftLinear) for module in other.modules())


def test_unmerge_after_swap(tmp_path):
    """A merged model can be taken over and unmerged."""
    model = peft_model()
    x = inputs()
    y = model(x)
    model.merge_adapter()
    accelerate_(model)
    torch.testing.assert_close(model(x), y)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), y)
    fe.export_peft(model, tmp_path)  # refused if the merged weights had been taken for the pretrained ones


def test_disabled_adapters():
    """Disabled adapters leave the base model."""
    plain, fused = pair()
    x = inputs()
    with plain.disable_adapter(), fused.disable_adapter():
        base = plain(x)
        assert torch.equal(fused(x), base)
    assert all(p.requires_grad for n, p in fused.named_parameters() if "lora_" in n)
    with fe.disabled(fused):
        assert torch.equal(fused(x), base)
    assert_equal_runs(plain, fused, x)


def test_adapter_changes():
    """Adapters can be added, switched and deleted after the swap."""
    plain, fused = pair()
    x = inputs()
    for model in (plain, fused):
        torch.manual_seed(3)
        model.add_adapter("other", lora_config(r=3, lora_alpha=1, use_rslora=True))
        randomise(model, seed=4)
    assert_equal_runs(plain, fused, x)
    for model in (plain, fused):
        model.set_adapter("other")
    assert_equal_runs(plain, fused, x)
    assert fe.explain(fused).rows[0]["r"] == "3"
    for model in (plain, fused):
        model.delete_adapter("default")
    assert_equal_runs(plain, fused, x)


def test_several_active():
    """With several active adapters, PEFT's own forward runs and the table says so."""
    plain, fused = pair()
    for model in (plain, fused):
        torch.manual_seed(3)
        model.add_adapter("other", lora_config(r=3))
        randomise(model, seed=4)
        model.base_model.set_adapter(["default", "other"])
    assert_same_bits(plain, fused, inputs())
    reason = accelerate_(fused).summary["not_fused"]["fc1"]
    assert reason == "2 adapters are active: default, other"
    assert {row["why_not_faster"] for row in fe.explain(fused, inputs()).rows} == {reason}


def test_mixed_adapter_batch():
    """Batches that mix adapters run PEFT's own forward."""
    plain, fused = pair()
    names = ["default", "__base__", "other", "default", "other"]
    outputs = []
    for model in (plain, fused):
        torch.manual_seed(3)
        model.add_adapter("other", lora_config(r=3))
        randomise(model, seed=4)
        outputs.append(model.eval()(inputs(), adapter_names=names))
    assert torch.equal(*outputs)
    with pytest.raises(ValueError, match="adapter_names"):
        fused(inputs(), adapter_names=names[:2])


def test_current_scale():
    """The scale is the one that PEFT currently has."""
    plain, fused = pair()
    for model in (plain, fused):
        for layer in layers(model).values():
            layer.scale_layer(0.25)
    assert_equal_runs(plain, fused, inputs())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "variants of LoRA (default)"),
        ({"lora_bias": True, "target_modules": ["fc1"]}, "have a bias (default)"),
    ],
)
def test_other_lora_kinds(options, reason):
    """Other kinds of LoRA are left alone, with the reason."""
    plain, fused = pair(**options)
    report = accelerate_(fused)
    assert report.summary["layers"] == 0 and all(reason in why for why in report.summary["skipped"].values())
    assert re.search(r"left to PEFT: fc1: .*" + re.escape(reason), str(report))
    assert {type(layer) for layer in layers(fused).values()} == {PeftLinear}
    assert_same_bits(plain, fused, inputs())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "DoraLinearVariant"),
        ({"lora_bias": True, "target_modules": ["fc1"]}, "has a bias"),
    ],
)
def test_alternating_kinds(options, reason):
    """An adapter of another kind can alternate with a plain one."""
    plain, fused = pair()
    for model in (plain, fused):
        torch.manual_seed(3)
        model.add_adapter("other", lora_config(**options))
        randomise(model, seed=4)
        model.set_adapter("other")
    assert reason in accelerate_(fused).summary["not_fused"]["fc1"]
    assert_same_bits(plain, fused, inputs())
    for model in (plain, fused):
        model.set_adapter("default")
    assert not accelerate_(fused).summary["not_fused"]
    assert_equal_runs(plain, fused, inputs())


class Quantised(nn.Linear):
    """PEFT takes it for an `nn.Linear` although its weight is not what it multiplies by."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.round(decimals=1), self.bias)


def test_inexact_linear():
    """Base layers that are not exactly linear are left alone."""
    torch.manual_seed(0)
    model = MLP()
    model.fc1 = Quantised(6, 10)
    plain, fused = pair(model)
    report = accelerate_(fused)
    assert report.summary["skipped"] == {"fc1": "its base layer is Quantised, not nn.Linear"}
    assert_equal_runs(plain, fused, inputs())


def test_foreign_layers():
    """Layers of other classes are left alone."""

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.fc1 = nn.Embedding(7, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.fc1(self.words(x))

    _, fused = pair(Words(), target_modules=["words", "fc1"])
    report = accelerate_(fused)
    assert list(report.summary["skipped"]) == ["words"] and report.summary["layers"] == 1
    assert "peft.tuners.lora.layer.Embedding is not" in report.summary["skipped"]["words"]
    with pytest.raises(fe.TargetError, match=r"words.*unprotected"):
        fe.integrations.peft.attach_ewc(fused)


def test_inner_hooks():
    """Hooks on inner modules still run."""
    plain, fused = pair()
    seen = []
    for model in (plain, fused):
        model.base_model.model.fc1.base_layer.register_forward_hook(lambda m, a, y: seen.append(1) or 2 * y)
    expected = plain(inputs())
    assert len(seen) == 1
    torch.testing.assert_close(fused(inputs()), expected, rtol=1e-13, atol=1e-13)
    assert len(seen) == 2
    assert "hooks" in accelerate_(fused).summary["not_fused"]["fc1"]


def test_dropout_distribution():
    """Dropout has the distribution of PEFT and follows the seed."""
    width, p = 40, 0.3
    model = peft_model(nn.Sequential(nn.Linear(width, width)), r=width, target_modules=["0"], lora_dropout=p)
    accelerate_(model)
    layer = model.base_model.model[0]
    with torch.no_grad():  # y - base(x) = 1.5 / 40 * dropout(x) for x of ones
        for factor in (layer.lora_A, layer.lora_B):
            factor["default"].weight.copy_(torch.eye(width))
    x = torch.ones(500, width, dtype=torch.float64)

    def factors(seed):
        torch.manual_seed(seed)
        return (model(x) - layer.base_layer(x)) / layer.scaling["default"]

    kept = factors(1)
    assert torch.equal(kept, factors(1)) and not torch.equal(kept, factors(2))
    share = float((kept.abs() < 1e-9).double().mean())
    assert abs(share - p) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
    large = kept[kept.abs() >= 1e-9]
    torch.testing.assert_close(large, torch.full_like(large, 1 / (1 - p)))
    model.eval()
    torch.testing.assert_close(factors(1), x)


def test_dropout_mask_gradients():
    """Gradients pass through the mask that the forward pass drew."""
    _, fused = pair(lora_dropout=0.5)
    x = inputs()

    def loss(scale):
        torch.manual_seed(5)
        return fused(scale * x).square().sum()

    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (scale,))


def test_gradient_penalty():
    """A loss with gradients in it has PEFT's own gradients."""
    found = []
    for model in pair():
        x = inputs().requires_grad_()
        loss = model(x).square().sum()
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        parameters = [p for p in model.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(loss + g.square().sum(), parameters))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_sample_gradients():
    """Per-sample gradients by `torch.func` are PEFT's own."""
    found = []
    for model in pair():
        values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

        def loss(values, x, model=model):
            return torch.func.functional_call(model, values, (x[None],)).square().sum()

        found.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(values, inputs()))
    assert found[0].keys() == found[1].keys()
    for name, one in found[0].items():
        torch.testing.assert_close(one, found[1][name])


def test_copies_stay_fused():
    """Copies and pickles stay fused."""
    _, fused = pair()
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert {type(layer) for layer in layers(other).values()} == {FusedPeftLinear}
        assert torch.equal(other(inputs()), fused(inputs()))


def test_compile_one_graph():
    """A fused model compiles into one graph."""
    _, fused = pair()
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs()), fused(inputs()))


def test_no_lora_layers():
    """Models without PEFT layers are refused."""
    with pytest.raises(fe.TargetError, match="found none"):
        accelerate_(MLP())


def test_eject_restores_layers():
    """Ejecting gives the layers back to PEFT."""
    plain, fused = pair()
    fe.eject(fused, merge=False)
    assert {type(layer) for layer in layers(fused).values()} == {PeftLinear}
    assert_same_bits(plain, fused, inputs())


@pytest.mark.parametrize("build", [MLP, Transposed])
def test_data_parallel(build, monkeypatch: pytest.MonkeyPatch):
    """Replicas of `nn.DataParallel` run on the fused op, with the gradients of the model alone."""
    _, model = pair(build())
    forward = PeftLinear.forward
    monkeypatch.setattr(PeftLinear, "forward", lambda *args, **kwargs: pytest.fail("PEFT's own forward ran"))
    parallel, x = Replicated(model), inputs()
    grads = []
    for run in (model, parallel):
        model.zero_grad()
        run(x).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
    assert {layer.forward_calls for layer in layers(model).values()} == {3}
    monkeypatch.setattr(PeftLinear, "forward", forward)
    ewc = fe.integrations.peft.attach_ewc(parallel)
    assert list(ewc.layers) == ["fc1", "fc2"]


def test_gaussian_in_wrapper():
    """The initialisation of the configuration is found in a wrapped model."""
    model = peft_model(init_lora_weights="gaussian")
    ewc = fe.integrations.peft.attach_ewc(Replicated(model))
    assert all(layer.gaussian for layer in ewc.layers.values())
