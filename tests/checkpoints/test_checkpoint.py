# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what comes back, what PEFT may read, and what happens to files that were cut, changed or half
written."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from tiny_models import (
    Tiny,
    adapted,
    assert_same,
    batches,
    controller,
    data,
    layers,
    randomise,
    snapshot,
    train,
    two_tasks,
    whole,
)
from torch import nn

from fused_ewclora.checkpoints import files
from fused_ewclora.checkpoints.checkpoint import load_pretrained, save_pretrained
from fused_ewclora.config import LoRAConfig
from fused_ewclora.errors import ArgumentError, CheckpointError
from fused_ewclora.ewc.controller import EWC
from fused_ewclora.layers.inject import inject, merge

NAMES = (files.MANIFEST, files.ADAPTER, files.ADAPTER_CONFIG, files.STATE)


def whole_layer_model(seed: int = 0) -> Tiny:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = Tiny().double()
    inject(model, LoRAConfig(r=2, lora_alpha=3.0, target_modules=["qkv", "fc"]))
    model.head.requires_grad_(True)
    return model


@pytest.mark.parametrize("merge_mode", ["delta", "factors"])
@pytest.mark.parametrize("moment", ["in a task", "after consolidation", "between estimate and consolidation"])
def test_resume_bitwise(tmp_path, merge_mode, moment):
    """A resumed run equals the uninterrupted one bit for bit."""
    model, ewc = two_tasks(merge_mode=merge_mode)
    if moment != "after consolidation":
        train(model, ewc, 2)
    if moment == "between estimate and consolidation":
        ewc.estimate_fisher([data(5)], F.cross_entropy)
    save_pretrained(tmp_path, model, ewc)
    resumed = adapted()
    resumed_ewc = controller(resumed, merge_mode=merge_mode)
    load_pretrained(tmp_path, resumed, resumed_ewc)
    assert_same(whole(model, ewc), whole(resumed, resumed_ewc))
    assert resumed_ewc.history == ewc.history
    for trained, controller_of_trained in ((model, ewc), (resumed, resumed_ewc)):
        torch.manual_seed(3)
        train(trained, controller_of_trained, 3)
        controller_of_trained.end_task(batches(*data(9, seed=3), 4), F.cross_entropy)
        train(trained, controller_of_trained, 4)
    assert_same(whole(model, ewc), whole(resumed, resumed_ewc))


def test_load_keeps_tensors(tmp_path):
    """A load into a used controller keeps its tensors."""
    model, ewc = two_tasks()
    save_pretrained(tmp_path, model, ewc)
    saved, fishers = whole(model, ewc), ewc.fishers
    train(model, ewc, 5)
    ewc.end_task([data(5, seed=5)], F.cross_entropy)
    load_pretrained(tmp_path, model, ewc)
    assert all(ewc.fishers[key] is fisher for key, fisher in fishers.items())
    assert_same(saved, whole(model, ewc))


def test_without_ewc(tmp_path):
    """Without an EWC controller, the function of the model comes back."""
    model, ewc = two_tasks()
    train(model, ewc, 2)
    save_pretrained(tmp_path, model)
    resumed = adapted()
    load_pretrained(tmp_path, resumed)
    assert_same(snapshot(model), snapshot(resumed))
    with pytest.raises(CheckpointError, match="without an EWC"):
        load_pretrained(tmp_path, resumed, controller(resumed))


def test_stale_files_removed(tmp_path):
    """An earlier checkpoint of more files leaves none behind."""
    model, ewc = two_tasks()
    (tmp_path / "notes.txt").write_text("mine")
    save_pretrained(tmp_path, model, ewc)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*NAMES, "notes.txt"])
    fresh = whole_layer_model()
    save_pretrained(tmp_path, fresh)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*NAMES[:3], "notes.txt"])
    load_pretrained(tmp_path, whole_layer_model())


def test_extra_state_restored(tmp_path):
    """Running statistics and other trained parameters come back."""

    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        inject(model, LoRAConfig(r=2, target_modules=["0"]))
        model[1].requires_grad_(True)
        return model

    model = build()
    with torch.no_grad():
        model[1].weight.uniform_()
    model(torch.randn(8, 4))
    save_pretrained(tmp_path, model)
    resumed = build()
    load_pretrained(tmp_path, resumed)
    assert_same(snapshot(model), snapshot(resumed))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model."])
def test_wrapper_prefixes(tmp_path, prefix):
    """A model inside a wrapper saves what the bare model loads, and the other way round."""

    def wrapped(model):
        outer = nn.Module()
        for part in reversed(prefix.rstrip(".").split(".")):
            outer = nn.Module()
            outer.add_module(part, model)
            model = outer
        return outer

    model, ewc = two_tasks()
    outer = wrapped(model)
    save_pretrained(tmp_path / "a", outer, EWC(outer))
    bare = adapted()
    load_pretrained(tmp_path / "a", bare, EWC(bare))
    assert_same(snapshot(model), snapshot(bare))
    save_pretrained(tmp_path / "b", model, ewc)
    inner = adapted()
    load_pretrained(tmp_path / "b", wrapped(inner))
    assert_same(snapshot(model), snapshot(inner))


def test_prefixes_in_files(tmp_path):
    """Prefixes inside the files are stripped."""
    model = whole_layer_model()
    randomise(model)
    save_pretrained(tmp_path, model)
    tensors = safetensors.torch.load_file(tmp_path / files.ADAPTER)
    content = {
        files.ADAPTER: safetensors.torch.save({f"module._orig_mod.{k}": v for k, v in tensors.items()})
    }
    content[files.ADAPTER_CONFIG] = (tmp_path / files.ADAPTER_CONFIG).read_bytes()
    config = json.loads((tmp_path / files.MANIFEST).read_text())
    files.write_files(tmp_path, content, {k: v for k, v in config.items() if k not in ("files", "checksum")})
    resumed = whole_layer_model()
    load_pretrained(tmp_path, resumed)
    assert_same(snapshot(model), snapshot(resumed))


def peft_forward(folder: Path, base: Tiny, x):
    """What PEFT computes from its files: W x + (lora_alpha / r) B A x, and modules_to_save replaced."""
    config = json.loads((folder / files.ADAPTER_CONFIG).read_text())
    tensors = safetensors.torch.load_file(folder / files.ADAPTER)
    assert config["peft_type"] == "LORA"
    with torch.no_grad():
        for name in config["target_modules"]:
            a, b = (tensors.pop(f"base_model.model.{name}.lora_{letter}.weight") for letter in "AB")
            scaling = config["alpha_pattern"].get(name, config["lora_alpha"]) / config["rank_pattern"].get(
                name, config["r"]
            )
            assert a.shape[0] == config["rank_pattern"].get(name, config["r"])
            base.get_submodule(name).weight += scaling * b @ a
        for name in config["modules_to_save"] or []:
            module = base.get_submodule(name)
            module.load_state_dict(
                {key: tensors.pop(f"base_model.model.{name}.{key}") for key in module.state_dict()}
            )
    assert not tensors
    return base(x)


@pytest.mark.parametrize("pattern", [None, {"fc": 3}])
def test_stock_peft_files(tmp_path, pattern):
    """Whole-layer adapters are stock PEFT files."""
    torch.manual_seed(0)
    model = Tiny().double()
    base = copy.deepcopy(model)
    inject(model, LoRAConfig(r=2, lora_alpha=3.0, target_modules=["qkv", "fc"], rank_pattern=pattern))
    model.head.requires_grad_(True)
    randomise(model)
    with torch.no_grad():
        model.head.weight.mul_(1.5)
    save_pretrained(tmp_path, model)
    x, _ = data(4)
    torch.testing.assert_close(peft_forward(tmp_path, base, x), model(x), rtol=1e-12, atol=1e-13)
    resumed = Tiny().double()
    resumed.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k})
    inject(resumed, LoRAConfig(r=2, lora_alpha=3.0, target_modules=["qkv", "fc"], rank_pattern=pattern))
    load_pretrained(tmp_path, resumed)
    assert_same(snapshot(model), snapshot(resumed))


def unlike_peft():
    partly = whole_layer_model()
    partly.head.bias.requires_grad_(False)
    consolidated = whole_layer_model()
    EWC(consolidated).end_task([data(4)], F.cross_entropy)
    return {"slices": adapted(), "partly trained": partly, "consolidated": consolidated}


@pytest.mark.parametrize("case", ["slices", "partly trained", "consolidated"])
def test_peft_rejects_unsupported(tmp_path, case):
    """PEFT refuses what it cannot represent."""
    save_pretrained(tmp_path, unlike_peft()[case])
    config = json.loads((tmp_path / files.ADAPTER_CONFIG).read_text())
    assert config["peft_type"] == "FUSED_EWCLORA" and config["reason"]
    assert not any(
        key.startswith("base_model.model.") for key in safetensors.torch.load_file(tmp_path / files.ADAPTER)
    )


REFUSALS = [
    ("no folder", lambda p: shutil.rmtree(p), "found none"),
    ("no manifest", lambda p: (p / files.MANIFEST).unlink(), "ewc_config.json: missing.*import_peft"),
    ("no adapter", lambda p: (p / files.ADAPTER).unlink(), "adapter_model.safetensors: missing"),
    ("no state", lambda p: (p / files.STATE).unlink(), "ewc_state.safetensors: missing"),
    ("cut", lambda p: os.truncate(p / files.STATE, 500), "ewc_state.safetensors: its hash"),
    ("empty", lambda p: os.truncate(p / files.ADAPTER, 0), "adapter_model.safetensors: its hash"),
    ("not JSON", lambda p: (p / files.MANIFEST).write_text("{"), "expected JSON"),
    ("deep JSON", lambda p: (p / files.MANIFEST).write_text("[" * 100000), "expected JSON"),
    ("other JSON", lambda p: (p / files.MANIFEST).write_text('{"files": {"../other": ""}}'), "manifest"),
    ("a list", lambda p: (p / files.MANIFEST).write_text("[]"), "manifest"),
    ("edited", lambda p: _edit(p, '"samples": 9', '"samples": 8'), "checksum"),
    ("a folder", lambda p: _folder(p / files.STATE), "cannot be read"),
]  # fmt: skip


def _edit(folder: Path, old: str, new: str) -> None:
    text = (folder / files.MANIFEST).read_text()
    assert old in text
    (folder / files.MANIFEST).write_text(text.replace(old, new))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def assert_refused(folder, message, model=None, ewc=None, error=CheckpointError):
    model = adapted() if model is None else model
    ewc = controller(model) if ewc is None else ewc
    before = whole(model, ewc)
    with pytest.raises(error, match=message):
        load_pretrained(folder, model, ewc)
    assert_same(before, whole(model, ewc))
    assert ewc.tasks == 0 and all(layer.consolidated_tasks == 0 for layer in layers(model))


@pytest.mark.parametrize(
    ("damage", "message"), [case[1:] for case in REFUSALS], ids=[case[0] for case in REFUSALS]
)
def test_damaged_refused(tmp_path, damage, message):
    """Errors about damaged checkpoints name the file, and nothing is changed."""
    save_pretrained(tmp_path, *two_tasks())
    damage(tmp_path)
    assert_refused(tmp_path, message)


def rewritten(folder: Path, name: str, change) -> None:
    """The checkpoint with other tensors or another manifest and right hashes: a foreign one, not a damaged
    one."""
    content = {n: (folder / n).read_bytes() for n in NAMES[1:]}
    config = {
        k: v for k, v in json.loads((folder / NAMES[0]).read_text()).items() if k not in ("files", "checksum")
    }
    if name == files.MANIFEST:
        change(config)
    else:
        tensors = safetensors.torch.load(content[name])
        change(tensors)
        content[name] = safetensors.torch.save(tensors)
    files.write_files(folder, content, config)


FOREIGN = [
    (files.MANIFEST, lambda c: c.update(format=99), "format"),
    (files.MANIFEST, lambda c: c.update(layers=[]), "table of layers"),
    (files.MANIFEST, lambda c: c["layers"].pop("fc"), "fc: adapted in the model only"),
    (files.MANIFEST, lambda c: c["layers"].update(other={}), "other: adapted in the checkpoint only"),
    (files.MANIFEST, lambda c: c["layers"]["fc"]["adapters"][0].update(r=5), "fc: adapters"),
    (files.MANIFEST, lambda c: c["layers"]["fc"].update(fingerprint="0" * 16), "fc.weight.*other base"),
    (files.MANIFEST, lambda c: c["layers"]["fc"].pop("consolidated_tasks"), "consolidated tasks"),
    (files.MANIFEST, lambda c: c["ewc"].update(fisher_mode="batch"), "fisher_mode"),
    (files.MANIFEST, lambda c: c.update(ewc=[1]), "state"),
    (files.ADAPTER, lambda t: t.pop("fc.lora_A"), "fc.lora_A is missing"),
    (files.ADAPTER, lambda t: t.update(extra=torch.ones(2)), "no extra"),
    (files.ADAPTER, lambda t: t.update({"fc.lora_A": torch.ones(2, 2).double()}), r"fc.lora_A: .*\[2, 2\]"),
    (files.ADAPTER, lambda t: t.update({"fc.lora_A": t["fc.lora_A"].float()}), "float32"),
    (files.STATE, lambda t: t.pop("fisher.fc"), "missing.*fc"),
    (files.STATE, lambda t: t["fisher.fc"].fill_(float("nan")), "finite"),
    (files.STATE, lambda t: t.pop("merged_rows.qkv.k"), "rows of qkv.k are missing"),
    (files.STATE, lambda t: t.update({"merged_rows.other": torch.ones(2)}), "no adapter other"),
    (files.STATE, lambda t: t.update({"merged_rows.fc": torch.ones(2, 2)}), "rows of fc"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), FOREIGN)
def test_foreign_refused(tmp_path, name, change, message):
    """Errors about foreign checkpoints name what does not fit, and nothing is changed."""
    save_pretrained(tmp_path, *two_tasks())
    rewritten(tmp_path, name, change)
    assert_refused(tmp_path, message)


def test_different_model_refused(tmp_path):
    """Other base weights, ranks and models are refused."""
    save_pretrained(tmp_path, *two_tasks())
    assert_refused(tmp_path, "other base weights", adapted(seed=1))
    assert_refused(tmp_path, "qkv: adapters", adapted(r=3))
    assert_refused(tmp_path, "scaling", adapted(lora_alpha=4.0))
    assert_refused(tmp_path, "adapters", whole_layer_model())
    single = adapted(dtype=torch.float32)
    assert_refused(tmp_path, "dtype", single, EWC(single))
    model = adapted()
    assert_refused(tmp_path, "layers are others", model, controller(adapted()), error=ArgumentError)


def test_before_consolidation(tmp_path):
    """A checkpoint from before consolidation needs a fresh model."""
    model = adapted()
    ewc = controller(model)
    save_pretrained(tmp_path, model, ewc)
    ewc.end_task([data(4)], F.cross_entropy)
    before = whole(model, ewc)
    with pytest.raises(CheckpointError, match="fresh"):
        load_pretrained(tmp_path, model, ewc)
    assert_same(before, whole(model, ewc))


def test_merged_refused(tmp_path):
    """Merged models are neither saved nor loaded."""
    model = adapted()
    save_pretrained(tmp_path, model)
    merge(model)
    for call in (save_pretrained, load_pretrained):
        with pytest.raises(CheckpointError, match="unmerge"):
            call(tmp_path, model)
