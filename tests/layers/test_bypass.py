# SPDX-License-Identifier: Apache-2.0
"""Parents that use a weight without calling its layer: rules set attributes on them during injection."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import BypassAttention
from torch import nn

import fused_ewclora as fe
from fused_ewclora.layers import bypass

CONFIG = fe.LoRAConfig(r=2, target_modules=["qkv"])


@pytest.fixture
def rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bypass, "_call_rules", [])

    @fe.register_call
    def separate(parent: nn.Module, child: str) -> dict[str, bool] | None:
        known = isinstance(parent, BypassAttention) and child == "qkv" and not parent.qkv_bias_separate
        return {"qkv_bias_separate": True} if known else None


def two() -> nn.ModuleDict:
    return nn.ModuleDict({"first": BypassAttention(8), "second": BypassAttention(8)})


def settings(model: nn.Module) -> list[bool]:
    return [attention.qkv_bias_separate for attention in model.values()]


@pytest.mark.usefixtures("rule")
def test_settings_held_reported():
    """Settings hold while adapters are in, and are reported."""
    model = two()
    model["second"].qkv_bias_separate = True  # as somebody wanted it
    report = fe.inject(model, CONFIG)
    assert settings(model) == [True, True]
    assert report.summary["bypass_fixes"] == {"first": {"qkv_bias_separate": True}}
    assert "set on first: qkv_bias_separate = True, or qkv would never be called" in str(report)
    fe.eject(model)
    assert settings(model) == [False, True]


@pytest.mark.usefixtures("rule")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_restore_settings(copied):
    """Copies of a model know which settings to put back."""
    model = two()
    fe.inject(model, CONFIG)
    other = copied(model)
    fe.eject(other)
    assert settings(other) == [False, False] and settings(model) == [True, True]
    assert all(key in ("first", "second") for key, _ in other.named_children())


@pytest.mark.usefixtures("rule")
def test_second_injection():
    """A second injection keeps the settings that the first one found."""
    model = two()
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["first.qkv"]))
    assert settings(model) == [True, False]
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["second.qkv", "proj"]))
    assert settings(model) == [True, True]
    fe.eject(model, merge=False)
    assert settings(model) == [False, False]


@pytest.mark.usefixtures("rule")
def test_eject_forgets_settings():
    """What somebody sets after an eject is not put back by the next one."""
    model = two()
    fe.inject(model, CONFIG)
    fe.eject(model, merge=False)
    model["first"].qkv_bias_separate = True
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["proj"]))
    fe.eject(model, merge=False)
    assert settings(model) == [True, False]


@pytest.mark.usefixtures("rule")
def test_shared_layer_parents():
    """Every parent of a shared layer is set."""
    model = two()
    model["second"].qkv = model["first"].qkv
    fe.inject(model, CONFIG)
    assert settings(model) == [True, True]


@pytest.mark.usefixtures("rule")
def test_failed_injection(monkeypatch: pytest.MonkeyPatch):
    """A failing injection sets nothing."""
    model = two()

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(fe.LoRALinear, "reset_adapters", fails)
    with pytest.raises(torch.OutOfMemoryError):
        fe.inject(model, CONFIG)
    assert settings(model) == [False, False] and not fe.adapters(model)


def test_missing_attribute(monkeypatch):
    """A missing attribute is an error before anything changes."""
    rules = [lambda parent, child: {"no_such": 1} if child == "qkv" else None]
    monkeypatch.setattr(bypass, "_call_rules", rules)
    model = two()
    with pytest.raises(fe.TargetError, match=r"first\.qkv: .*no attribute no_such") as error:
        fe.inject(model, CONFIG)
    assert "exclude_modules=['first.qkv']" in str(error.value)
    assert not fe.adapters(model)
