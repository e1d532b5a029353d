# SPDX-License-Identifier: Apache-2.0
"""PEFT's LoRA layers on quantised weights: fused, with an EWC, and back."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from dense_fisher import dense_fisher
from peft_models import randomise
from quantised_models import BITSANDBYTES, TARGETS, batch, dense, model_of

import fused_ewclora as fe
from fused_ewclora.checkpoints.files import write_files
from fused_ewclora.integrations._transformers_checkpoint import _contents, _take_over
from fused_ewclora.integrations.peft import accelerate_, attach_ewc, restore_

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::Warning:peft"),
    pytest.mark.filterwarnings("ignore:.*quantising again"),
]
KINDS = ("nf4", "fp4 nested", "int8", "Int8Tensor", "Float8Tensor")
every_kind = pytest.mark.parametrize("kind", KINDS)


def peft_model(kind: str, **options):
    """With lora_B that is not zero."""
    model = model_of(kind)
    # As transformers tells PEFT.
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = "4" in kind and kind in BITSANDBYTES, kind == "int8"
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **options)
    made = peft.get_peft_model(model, config)
    randomise(made)
    return made


def results(model, x, y):
    inputs = x.clone().requires_grad_()
    model.zero_grad()
    out = model(inputs)
    F.cross_entropy(out, y).backward()
    return [out.detach(), inputs.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@every_kind
def test_same_as_peft(kind):
    """Outputs and gradients are PEFT's, keys and isinstance too, and restore_ gives the classes back."""
    plain = peft_model(kind)
    fused = copy.deepcopy(plain)
    report = accelerate_(fused)
    assert report.summary["layers"] == 2 and not report.summary["not_fused"]
    assert list(fused.state_dict()) == list(plain.state_dict())
    kinds = [type(module) for module in plain.modules()]
    assert all(
        isinstance(layer, type(other)) for layer, other in zip(fused.modules(), plain.modules(), strict=True)
    )
    x, y = batch(0)
    for ours, theirs in zip(results(fused, x, y), results(plain, x, y), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    with fe.disabled(fused), plain.disable_adapter():
        torch.testing.assert_close(fused(x), plain(x))
    assert restore_(fused) == 2
    assert [type(module) for module in fused.modules()] == kinds


@every_kind
@pytest.mark.parametrize("mode", ["residual", "requantise"])
def test_ewc_over_peft(kind, mode, tmp_path):
    """Fisher and consolidation are those of the dense model, and checkpoints restore every bit."""
    model = peft_model(kind)
    fresh = copy.deepcopy(model)
    ewc = attach_ewc(model, quantised_merge=mode, ewc_lambda=1.0)
    x, y = batch(1)
    inner = model.base_model.model
    inner.head.requires_grad_(False)
    plain = dense_of(inner, ewc.layers)
    samples = [(x[i : i + 1].double(), y[i : i + 1]) for i in range(len(y))]
    exact = dense_fisher(plain, TARGETS, samples, lambda m, s: F.cross_entropy(m(s[0]), s[1]))
    model.train()
    with ewc.accumulate_fisher():
        F.cross_entropy(model(x), y).backward()
    before = model(x)
    ewc.consolidate()
    for name in TARGETS:
        bound = 1e-4 * float(exact[name].max())
        torch.testing.assert_close(ewc.fishers[name].double(), exact[name], rtol=1e-3, atol=bound)
    if mode == "residual":
        torch.testing.assert_close(model(x), before, rtol=0, atol=0.02)
        torch.testing.assert_close(plain(x.double()).float(), model(x), rtol=0, atol=0.02)
        with fe.disabled(model):
            torch.testing.assert_close(model(x), before, rtol=0, atol=0.02)
    fe.save_pretrained(tmp_path, model, ewc)
    other = attach_ewc(fresh, quantised_merge=mode, ewc_lambda=1.0)
    fe.load_pretrained(tmp_path, fresh, other)
    assert torch.equal(fresh.train()(x), model(x))


@torch.no_grad()
def dense_of(inner, layers):
    """`dense` finds the layers by the names of the plain model."""

    class Renamed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = inner.head
            for name, layer in layers.items():
                self.add_module(name, layer)

    return dense(Renamed())


@pytest.mark.parametrize("mode", ["residual", "requantise"])
def test_trainers_checkpoints(mode, tmp_path):
    """The EWC's part of a Trainer checkpoint holds the weights that consolidation has changed."""
    model = peft_model("nf4 nested")
    fresh = copy.deepcopy(model)
    ewc = attach_ewc(model, quantised_merge=mode, ewc_lambda=1.0)
    ewc.end_task([batch(0)], F.cross_entropy)
    write_files(tmp_path, *_contents(ewc))
    other = attach_ewc(fresh, quantised_merge=mode, ewc_lambda=1.0)
    _take_over(other, tmp_path)
    for one, layer in zip(ewc.layers.values(), other.layers.values(), strict=True):
        assert one.weight_fingerprint() == layer.weight_fingerprint() and layer.consolidated_tasks == 1


def test_nothing_chosen():
    """attach_ewc without quantised_merge trains, and consolidation is refused with the choices."""
    model = peft_model("nf4")
    ewc = attach_ewc(model, ewc_lambda=1.0)
    with pytest.raises(fe.TargetError, match=r"fc1: its weight is quantised.*attach_ewc.*residual"):
        ewc.end_task([batch(0)], F.cross_entropy)
    with pytest.raises(fe.ArgumentError, match=r"quantised_merge"):
        attach_ewc(peft_model("nf4"), quantised_merge="round")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_residual_is_not_lost(kind):
    """What would drop a residual is refused; once it may be rounded, unloading puts it into the weights."""
    model = peft_model(kind)
    ewc = attach_ewc(model, quantised_merge="residual", ewc_lambda=1.0)
    ewc.end_task([batch(0)], F.cross_entropy)
    x, _ = batch(1)
    before = model(x)
    for call in (model.merge_adapter, model.unload, model.merge_and_unload, lambda: restore_(model)):
        with pytest.raises(fe.TargetError, match=r"residual of earlier tasks"):
            call()
        assert torch.equal(model(x), before)
    layers = fe.adapters(model)
    rounded = {
        name: layer.quantisation.numbers(
            layer.storage, torch.float32, layer.quantisation.quantised(layer.storage, layer.base_weight)
        )
        for name, layer in layers.items()
    }
    for layer in layers.values():
        layer.quantised_merge = "requantise"
    unloaded = model.unload()
    assert type(unloaded.fc1) is type(model_of(kind).fc1)
    eye = torch.eye(unloaded.fc2.in_features)
    found = unloaded.train().fc2(eye).T
    torch.testing.assert_close(found, rounded["base_model.model.fc2"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_peft_merges(kind):
    """Merging and unmerging are PEFT's own, with PEFT's results."""
    plain = peft_model(kind)
    fused = copy.deepcopy(plain)
    accelerate_(fused)
    x, _ = batch(0)
    for model in (plain, fused):
        model.train().merge_adapter()
    assert torch.equal(fused(x), plain(x))
    fused.unmerge_adapter()
    plain.unmerge_adapter()
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-6)


def test_other_calls_run_on_peft():
    """Two active adapters run PEFT's forward, a residual included."""
    model = peft_model("nf4")
    ewc = attach_ewc(model, quantised_merge="residual", ewc_lambda=1.0)
    ewc.end_task([batch(0)], F.cross_entropy)
    x, _ = batch(1)
    before = model.train()(x)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=TARGETS))
    for layer in fe.adapters(model).values():
        layer.bound = None
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)


def test_other_bases_stay():
    """A layer that cannot be fused stays PEFT's, with the reason."""
    model = peft_model("nf4")
    model.base_model.model.fc1.base_layer.weight.quant_state.packing_format_for_cpu = True
    report = accelerate_(model)
    assert "packed its weight" in report.summary["skipped"]["fc1"] and report.summary["layers"] == 1
