# SPDX-License-Identifier: Apache-2.0
"""PEFT's configurations and models where those of this library are expected."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from models import MLP
from torch import nn

import fused_ewclora as fe


def test_config_taken():
    """A peft.LoraConfig adapts the same layers with the same ranks and scales as PEFT itself."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.25, target_modules=["fc1", "fc2"], modules_to_save=["head"],
        rank_pattern={"fc2": 2}, alpha_pattern={"^fc1": 3},
    )  # fmt: skip
    model = MLP()
    fe.inject(model, config)
    theirs = peft.get_peft_model(MLP(), config).base_model.model
    for name, layer in fe.adapters(model).items():
        other = theirs.get_submodule(name)
        assert layer.r == other.r["default"] and layer.lora_dropout == 0.25
        assert layer.adapter_slices[0].scaling == other.scaling["default"]
    assert model.head.weight.requires_grad and set(fe.adapters(model)) == {"fc1", "fc2"}


@pytest.mark.parametrize("targets", ["all-linear", r"fc\d", {"fc1", "fc2"}])
def test_targets_taken(targets: Any):
    """All forms of target_modules are taken."""
    model = MLP()
    fe.inject(model, peft.LoraConfig(target_modules=targets))
    assert set(fe.adapters(model)) == {"fc1", "fc2"}


def test_task_heads():
    """The head that PEFT trains for a task type is trained here."""
    model = MLP()
    model.score = model.head
    del model.head
    model.get_classifier = lambda: model.score
    fe.inject(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["fc1"]))
    assert model.score.weight.requires_grad and not model.fc2.weight.requires_grad


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True}, {"use_rslora": True}, {"bias": "all"}, {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False}, {"layers_to_transform": [1]}, {"lora_bias": True},
        {"inference_mode": True},
    ],
)  # fmt: skip
def test_config_refused(options: dict[str, Any]):
    """Settings that would give something else are refused by name, and the way out is named."""
    model = MLP()
    with pytest.raises(
        fe.NotExactlyRepresentable, match=rf"{next(iter(options))}=.*accelerate_\(peft_model\)"
    ):
        fe.inject(model, peft.LoraConfig(target_modules=["fc1"], **options))
    assert not fe.adapters(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("config", [{"r": 8}, None, peft.IA3Config(), peft.AdaLoraConfig(total_step=1)])
def test_other_configs(config: Any):
    """Anything else is refused as a type."""
    with pytest.raises(fe.DtypeError, match="config: expected a LoRAConfig, got"):
        fe.inject(MLP(), config)


def test_peft_model_named():
    """A model that PEFT has adapted is told the functions for it, wrapped or not, and stays as it is."""
    config = peft.LoraConfig(target_modules=["fc1"])
    model = peft.get_peft_model(MLP(), config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    for each in (model, model.base_model.model):
        with pytest.raises(fe.TargetError, match=r"accelerate_\(peft_model\).*attach_ewc"):
            fe.inject(each, fe.LoRAConfig(target_modules=["fc2"]))
        for call in (
            lambda part=each: fe.EWC(part),
            lambda part=each: fe.merge(part),
            lambda part=each: fe.reset_optimizer_state_(optimizer, part),
            lambda part=each: fe.methods.LoRA(part),
        ):
            with pytest.raises(fe.EWCLoRAError, match=r"attach_ewc\(peft_model, ewc_lambda=\.\.\.\)"):
                call()
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    ewc = fe.integrations.peft.attach_ewc(model)
    assert ewc.ewc_lambda is None and list(ewc.layers) == ["fc1"]


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_wrapped_base_layer(wrap: Any):
    """A base weight of PEFT that something else computes after attach_ewc is refused by name."""
    model = peft.get_peft_model(MLP(), peft.LoraConfig(target_modules=["fc1"]))
    ewc = fe.integrations.peft.attach_ewc(model)
    wrap(model.base_model.model.fc1.base_layer)
    for call in (lambda: fe.merge(model), ewc.consolidate):
        with pytest.raises(fe.TargetError, match=r"fc1: its weight is .*undo it with"):
            call()
