# SPDX-License-Identifier: Apache-2.0
"""PEFT's LoRA convolutions on the fused op: the same values, files in both directions, and an EWC."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from conv_models import NAMES, Convs, adapted, images
from models import randomize_adapters_
from peft_models import assert_equal_runs, assert_same_bits, randomise
from safetensors.torch import load_file
from torch import nn

import fused_ewclora as fe
from fused_ewclora.integrations._peft_convs import FusedPeftConv1d, FusedPeftConv2d
from fused_ewclora.integrations.peft import accelerate_, attach_ewc, restore_

pytestmark = pytest.mark.filterwarnings("ignore::Warning:peft", "ignore:Using padding='same'")
WIDE = torch.float64
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
DILATED = "strided"


def base(dilated: bool = False) -> Convs:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Convs()
    if not dilated:
        model.strided = nn.Conv2d(8, 7, (3, 2), stride=(2, 1))
    return model.double()


def peft_model(model: nn.Module | None = None, names=NAMES, **options):
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": list(names), **options})
    made = peft.get_peft_model(base() if model is None else model, config)
    randomise(made)
    return made


def accelerated(model: nn.Module) -> nn.Module:
    fused = copy.deepcopy(model)
    report = accelerate_(fused)
    assert not report.summary["skipped"] and not report.summary["not_fused"]
    return fused


@pytest.mark.parametrize("dtype", [WIDE, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_same_values(dtype, memory_format):
    """Outputs and gradients, and all methods of PEFT."""
    plain = peft_model().to(dtype).to(memory_format=memory_format)
    if dtype == torch.bfloat16:  # as PEFT makes adapters beside a model in bf16
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    fused = accelerated(plain)
    layers = dict(fused.base_model.model.named_modules())
    assert type(layers["shared"]) is FusedPeftConv2d and type(layers["line"]) is FusedPeftConv1d
    x = images(2, dtype=dtype)[0].to(memory_format=memory_format)
    assert_equal_runs(plain, fused, x)
    assert list(fused.state_dict()) == list(plain.state_dict())
    for model in (plain, fused):
        model.add_adapter("other", peft.LoraConfig(r=4, target_modules=list(NAMES)))
        model.set_adapter("other")
    assert layers["shared"].lora_A["other"].weight.shape == (4, 6, 3, 3)
    fused.load_state_dict(plain.state_dict())
    assert_equal_runs(plain, fused, x)
    for model in (plain, fused):
        model.set_adapter("default")
        model.merge_adapter()
    assert torch.equal(plain(x), fused(x))
    for model in (plain, fused):
        model.unmerge_adapter()
    assert restore_(fused) == len(NAMES)
    assert_same_bits(plain, fused, x)


def test_left_to_peft():
    """A dilation or padding mode, which PEFT's adapter does not have, groups and DoRA."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dilated = nn.Conv2d(3, 4, 3, padding=1, dilation=2)
            self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
            self.grouped = nn.Conv2d(4, 4, 3, groups=2)
            self.fine = nn.Conv2d(4, 4, 1, dilation=2)

    names = ["dilated", "circular", "grouped", "fine"]
    model = peft_model(Net(), names)
    report = accelerate_(model)
    skipped = {name.rpartition(".")[2]: why for name, why in report.summary["skipped"].items()}
    assert list(skipped) == names[:3]
    assert "dilation (2, 2)" in skipped["dilated"] and "'circular'" in skipped["circular"]
    assert "groups=2" in skipped["grouped"]
    with pytest.raises(fe.TargetError, match="unprotected"):
        attach_ewc(model, ewc_lambda=1.0)
    variants = accelerate_(peft_model(use_dora=True)).summary["skipped"]
    assert set(variants.values()) == {"its adapters are variants of LoRA (default)"}


@pytest.mark.parametrize(
    "options", [{"fisher_mode": "sample"}, {"fisher_mode": "batch"}, {"merge_mode": "factors"}]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_ewc(options, memory_format, tmp_path):
    """Three tasks train as on an injected model, and each loads the checkpoint of the other."""
    live = peft_model().to(memory_format=memory_format)
    native = adapted(base(), lora_alpha=3)
    settings = {"ewc_lambda": 20.0, "fisher_dtype": WIDE, **options}
    ewcs = []
    for make, model in ((lambda m, **k: attach_ewc(m, **k), live), (fe.EWC, native)):
        ewcs.append(make(model, **settings, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        for name in NAMES:
            theirs, ours = ewcs[0].layers[name], native.get_submodule(name)
            for (_, a), (_, b) in zip(
                theirs.named_lora_parameters(), ours.named_lora_parameters(), strict=True
            ):
                b.copy_(a.flatten(1))
    for task in range(3):
        x, y = images(6, seed=task)
        values = []
        for model, ewc in zip((live, native), ewcs, strict=True):
            penalty = ewc.penalty()
            (F.cross_entropy(model(x), y) + penalty).backward()
            parameters = [p for layer in ewc.layers.values() for _, p in layer.named_lora_parameters()]
            values += [[penalty, *(p.grad.flatten(1) for p in parameters)]]
            if task:
                before = [p.grad.clone() for p in parameters]
                ewc.add_penalty_grad_()
                values[-1] += [(p.grad - old).flatten(1) for p, old in zip(parameters, before, strict=True)]
            with torch.no_grad():
                for p in parameters:
                    p -= 0.05 * p.grad
                    p.grad = None
            ewc.end_task([(x[:4], y[:4]), (x[4:], y[4:])], F.cross_entropy)
        torch.testing.assert_close(*values, rtol=1e-8, atol=1e-11)
        for name in NAMES:
            torch.testing.assert_close(ewcs[0].fishers[name], ewcs[1].fishers[name], rtol=1e-8, atol=1e-14)
            weights = [ewc.layers[name].weight for ewc in ewcs]
            torch.testing.assert_close(*weights, **TIGHT)
    x, _ = images()
    for number, (source, target) in enumerate(((0, 1), (1, 0))):
        folder = tmp_path / str(number)
        models = [live, native]
        randomize = randomise if source == 0 else randomize_adapters_
        randomize(models[source])
        fe.save_pretrained(folder, models[source], ewcs[source])
        fe.load_pretrained(folder, models[target], ewcs[target])
        torch.testing.assert_close(live(x), native(x), **TIGHT)


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_export(tmp_path, alpha):
    """PEFT loads a folder of export_peft, and of save_pretrained before the first task."""
    plain = base()
    model = adapted(copy.deepcopy(plain).to(memory_format=torch.channels_last), lora_alpha=alpha)
    x, _ = images()
    fe.export_peft(model, tmp_path / "export")
    fe.save_pretrained(tmp_path / "save", model)
    for folder in ("export", "save"):
        tensors = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert tensors["base_model.model.shared.lora_A.weight"].shape == (2, 6, 3, 3)
        assert tensors["base_model.model.line.lora_B.weight"].shape == (4, 2, 1)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / folder)
        torch.testing.assert_close(loaded(x), model(x), **TIGHT)
        torch.testing.assert_close(loaded.merge_and_unload()(x), model(x), **TIGHT)
    other = adapted(copy.deepcopy(plain), lora_alpha=alpha)
    fe.load_pretrained(tmp_path / "save", other)
    torch.testing.assert_close(other(x), model(x), **TIGHT)


def test_import(tmp_path):
    """A folder of PEFT becomes adapters of ours."""
    plain = base()
    model = peft_model(copy.deepcopy(plain), use_rslora=True)
    model.save_pretrained(tmp_path)
    ours = copy.deepcopy(plain)
    fe.import_peft(tmp_path, ours)
    x, _ = images()
    torch.testing.assert_close(ours(x), model(x), **TIGHT)
    assert list(fe.adapters(ours)) == list(NAMES)


@pytest.mark.parametrize("name", ["LoRA", "EWCLoRA", "SDLoRA", "CoDyRA", "InfLoRA", "OLoRA"])
def test_methods_refused(name):
    """No method takes convolutions of PEFT, and each says so before anything changes."""
    model = accelerated(peft_model())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    options = {"ewc_lambda": 1.0} if name == "EWCLoRA" else {}
    with pytest.raises(fe.TargetError, match=r"stem: .*(convolutions of PEFT|another library)"):
        getattr(fe.methods, name)(model, **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_not_representable(tmp_path):
    """A dilation is refused in both directions, with the name of the layer."""
    model = adapted(base(dilated=True))
    with pytest.raises(fe.NotExactlyRepresentable, match=rf"{DILATED}: .*dilation"):
        fe.export_peft(model, tmp_path / "out")
    fe.save_pretrained(tmp_path / "own", model)  # in the layout that PEFT does not load
    with pytest.raises(KeyError, match="FUSED_EWCLORA"):
        peft.PeftModel.from_pretrained(base(dilated=True), tmp_path / "own")
    peft_model(base(), [DILATED]).save_pretrained(tmp_path / "in")
    with pytest.raises(fe.NotExactlyRepresentable, match=rf"{DILATED}: .*dilation"):
        fe.import_peft(tmp_path / "in", base(dilated=True))
