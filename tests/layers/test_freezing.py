# SPDX-License-Identifier: Apache-2.0
"""What injection freezes, what it leaves to the user, and which heads its table names."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import ALL, KV, MLP, TinyViT, X, randomize_adapters_
from torch import nn

import fused_ewclora as fe

FC1, FC2 = (fe.LoRAConfig(r=2, target_modules=[name]) for name in ("fc1", "fc2"))


def required(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@given(st.sets(st.sampled_from(["head.weight", "head.bias", "fc1.bias", "fc2.weight", "fc1.lora_A"])))
def test_second_injection(changed: set[str]):
    """A second injection changes no requires_grad outside of its own layers."""
    model = MLP()
    fe.inject(model, FC1)
    for name in changed:
        parameter = model.get_parameter(name)
        parameter.requires_grad_(not parameter.requires_grad)
    before = {name: value for name, value in required(model).items() if not name.startswith("fc2.")}
    fe.inject(model, FC2)
    after = required(model)
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {"fc2.weight", "fc2.lora_A", "fc2.lora_B"}
    assert not after["fc2.weight"] and after["fc2.lora_A"] and after["fc2.lora_B"]


def test_injection_into_part():
    """An injection into a part of a frozen model, or into a whole whose part was frozen, freezes nothing."""
    model = TinyViT()
    fe.inject(model, KV)
    model.blocks[0].norm1.requires_grad_(True)
    fe.inject(model.blocks[0], FC1)
    assert model.blocks[0].norm1.weight.requires_grad
    other = TinyViT()
    fe.inject(other.blocks[0], FC1)
    assert not other.blocks[0].norm1.weight.requires_grad and other.head.weight.requires_grad
    fe.inject(other, KV)
    assert other.head.weight.requires_grad


def test_eject_forgets():
    """After eject everything requires gradients again, and the next injection is a first one."""
    model = MLP()
    for _ in range(2):
        fe.inject(model, FC1)
        fe.inject(copy.deepcopy(model), FC2)
        assert not model.head.weight.requires_grad
        fe.eject(model)
        assert all(required(model).values())


def test_frozen_heads():
    """The table names the heads that are frozen, with the line that thaws them."""
    model = MLP()
    report = fe.inject(model, FC1)
    assert report.summary["frozen_heads"] == ["head"]
    assert "frozen heads: head; to train them: model.head.requires_grad_(True)" in str(report)
    model.head.requires_grad_(True)
    assert fe.inject(model, FC2).summary["frozen_heads"] == []
    unknown = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    report = fe.inject(unknown, fe.LoRAConfig(r=1, target_modules=["0"]))
    assert "model.get_submodule('1.1').requires_grad_(True)" in str(report)  # the last linear layer
    adapted_head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert fe.inject(adapted_head, ALL).summary["frozen_heads"] == []


def test_users_frozen_head():
    """A head that was frozen before injection, or is an embedding too, is not named."""
    model = MLP()
    model.head.requires_grad_(False)
    assert fe.inject(model, FC1).summary["frozen_heads"] == []
    tied = MLP()
    tied.embedding = nn.Embedding(4, 10)
    tied.embedding.weight = tied.head.weight
    assert fe.inject(tied, FC1).summary["frozen_heads"] == []


def test_modules_to_save():
    """modules_to_save are trainable, match ends of names as in PEFT, and are not adapted."""
    model = TinyViT()
    model.head.requires_grad_(False)
    config = fe.LoRAConfig(
        r=2, target_modules="all-linear", modules_to_save=["head", "1.norm2", "classifier"]
    )
    report = fe.inject(model, config)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trainable == {"head.weight", "head.bias", "blocks.1.norm2.weight", "blocks.1.norm2.bias"}
    assert report.summary["modules_to_save"] == ["blocks.1.norm2", "head"]
    assert report.summary["skipped"]["head"] == "in modules_to_save" and not report.summary["frozen_heads"]
    assert "modules_to_save that match nothing: classifier" in str(report)
    assert (
        fe.inject(MLP(), fe.LoRAConfig(target_modules=["fc1", "head"], modules_to_save=["head"])).summary[
            "layers"
        ]
        == 1
    )


def test_modules_to_save_refused():
    """Names that match nothing, or modules that have adapters, raise before anything changes."""
    model = MLP()
    with pytest.raises(fe.TargetError, match=r"modules_to_save: no module's name ends with.*fc1, fc2, head"):
        fe.inject(model, fe.LoRAConfig(target_modules=["fc1"], modules_to_save=["score"]))
    assert not fe.adapters(model) and all(required(model).values())
    fe.inject(model, FC1)
    with pytest.raises(fe.TargetError, match=r"modules_to_save: fc1: expected modules without adapters"):
        fe.inject(model, fe.LoRAConfig(target_modules=["fc2"], modules_to_save=["fc1"]))
    with pytest.raises(fe.DtypeError, match="modules_to_save: expected a sequence of names"):
        fe.LoRAConfig(modules_to_save="head")


def test_modules_to_save_saved(tmp_path: Path):
    """A checkpoint holds them, in PEFT's own format."""
    config = fe.LoRAConfig(r=2, target_modules=["fc1"], modules_to_save=["head"])
    torch.manual_seed(0)
    base = TinyViT()
    model, other = copy.deepcopy(base), copy.deepcopy(base)
    for each in (model, other):
        fe.inject(each, config)
    randomize_adapters_(model)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    fe.save_pretrained(tmp_path / "a", model)
    assert '"modules_to_save": [\n  "head"\n ]' in (tmp_path / "a" / "adapter_config.json").read_text()
    fe.load_pretrained(tmp_path / "a", other)
    assert torch.equal(other(X), model(X))
