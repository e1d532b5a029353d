# SPDX-License-Identifier: Apache-2.0
"""The layers that injection adapts, the model afterwards, and refused configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import (
    ALL,
    KV,
    MLP,
    THIRDS,
    Attention,
    InterleavedAttention,
    TinyViT,
    X,
    assert_same,
    fingerprint,
    injected,
)
from torch import nn

import fused_ewclora as fe


@given(
    st.sampled_from([Attention, InterleavedAttention]),
    st.sampled_from([None, ("k",), ("v", "q")]),
    st.integers(1, 5),
)
def test_output_unchanged(attention: type[Attention], slices: Any, r: int):
    """Injection leaves the output as it was."""
    model = TinyViT(attention=attention).double()
    x = X.double()
    y = model(x)
    layout = (
        None
        if slices is None
        else fe.QKVLayout(("q", "k", "v"), interleave=2 if attention is InterleavedAttention else None)
    )
    fe.inject(
        model,
        fe.LoRAConfig(
            r=r,
            target_modules=["qkv", "attn.proj"] if slices is None else ["qkv"],
            slices=slices,
            layout=layout,
        ),
    )
    torch.testing.assert_close(
        model(x), y, rtol=1e-12, atol=1e-12
    )  # 1e4 * eps: sums of at most 16 terms, depth 2


@pytest.mark.parametrize("attention", [Attention, InterleavedAttention])
def test_only_requested_segments(attention: type[Attention]):
    """Only the requested segments are adapted."""
    heads = 2 if attention is InterleavedAttention else None
    config = fe.LoRAConfig(
        r=3, target_modules=["qkv"], slices=("v",), layout=fe.QKVLayout(("q", "k", "v"), interleave=heads)
    )
    model = injected(config, attention)
    attn = model.blocks[0].attn
    with fe.disabled(model):
        q0, k0, v0 = attn.project(X)
    q, k, v = attn.project(X)
    torch.testing.assert_close((q, k), (q0, k0))
    assert not torch.allclose(v, v0, atol=1e-3)


def test_base_keys_frozen():
    """The base keys stay, and everything but the adapters is frozen."""
    base = TinyViT()
    model = injected()
    added = set(model.state_dict()) - set(base.state_dict())
    assert set(base.state_dict()) < set(model.state_dict())
    assert added == {f"blocks.{i}.attn.qkv.lora_{m}_{s}" for i in (0, 1) for m in "AB" for s in "kv"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == added
    result = model.load_state_dict(base.state_dict(), strict=False)
    assert set(result.missing_keys) == added and not result.unexpected_keys


def test_report_table():
    """The report is a table with its rows as data."""
    model = TinyViT()
    report = fe.inject(model, KV)
    assert [row["name"] for row in report.rows] == [
        f"blocks.{i}.attn.qkv [{s}]" for i in (0, 1) for s in "kv"
    ]
    assert report.rows[0]["rows"] == "8:16"
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(row["adapter_params"] for row in report.rows) == trainable == report.summary["trainable"]
    text = str(report)
    assert "blocks.0-1.attn.qkv [k]" in text and "trainable" in text
    assert report.to_dict()["summary"]["layers"] == 2


def test_all_linear_excludes_head():
    """Targeting `all-linear` leaves out the head where the model names it."""
    model = TinyViT()
    report = fe.inject(model, ALL)
    skipped = report.summary["skipped"]
    assert skipped.pop("head") == "output head" and list(skipped) == ["patch_embed.proj"]
    assert {name.rpartition(".")[2] for name in fe.adapters(model)} == {"qkv", "proj", "fc1", "fc2"}
    language_model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    language_model.get_output_embeddings = lambda: language_model[1]
    fe.inject(language_model, ALL)
    assert list(fe.adapters(language_model)) == ["0"]
    plain = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    fe.inject(plain, ALL)
    assert list(fe.adapters(plain)) == ["0", "1"]


def test_other_classes_reported():
    """Names that match layers of other classes are reported."""
    model = TinyViT()
    model.act = nn.GELU()
    report = fe.inject(model, fe.LoRAConfig(target_modules=["proj", "act", "nothing"]))
    assert report.summary["skipped"] == {"act": "GELU is not nn.Linear"}
    assert report.summary["unmatched"] == ["nothing"]
    assert "skipped: act" in str(report) and "nothing" in str(report)


def test_rank_alpha_patterns():
    """Rank and alpha patterns decide for each layer."""
    model = TinyViT()
    fe.inject(
        model,
        fe.LoRAConfig(
            r=4,
            lora_alpha=8,
            target_modules=["fc1", "fc2"],
            rank_pattern={r"0\.fc1": 2},
            alpha_pattern={"fc2": 1},
        ),
    )
    ranks_and_scales = {
        name: (layer.r, layer.adapter_slices[0].scaling) for name, layer in fe.adapters(model).items()
    }
    assert ranks_and_scales == {
        "blocks.0.fc1": (2, 4.0),
        "blocks.0.fc2": (4, 0.25),
        "blocks.1.fc1": (4, 2.0),
        "blocks.1.fc2": (4, 0.25),
    }


def test_second_call():
    """A second call adapts other layers and keeps the first ones trainable."""
    model = injected()
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["fc1"]))
    assert len(fe.adapters(model)) == 4
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_shared_module_once():
    """A shared module is adapted once."""
    model = MLP(d_in=10)
    model.fc2 = model.fc1
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["fc2"]))
    assert list(fe.adapters(model)) == ["fc1"]
    fe.eject(model)
    assert type(model.fc1) is nn.Linear and model.fc2 is model.fc1


def test_layout_rules(monkeypatch: pytest.MonkeyPatch):
    """Layout rules serve layers without a declared layout."""
    monkeypatch.setattr("fused_ewclora.layers.matching._layout_rules", [])

    @fe.register_layout
    def rule(parent: nn.Module, child: str) -> fe.QKVLayout | None:
        return THIRDS if isinstance(parent, Attention) and child == "qkv" else None

    fe.inject(model := TinyViT(), fe.LoRAConfig(target_modules=["qkv"], slices=("k",)))
    assert fe.adapters(model)["blocks.0.attn.qkv"].adapter_slices[0].rows == ((8, 16),)
    with pytest.raises(fe.LayoutError, match=r"(?s)blocks.0.fc1.*leave slices out"):
        fe.inject(TinyViT(), fe.LoRAConfig(target_modules=["fc1"], slices=("k",)))


def with_replaced_forward(model: nn.Module) -> None:
    model.fc1.forward = lambda x: x  # type: ignore[method-assign, union-attr]


def with_weight_norm(model: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.fc1)  # type: ignore[arg-type]


class OwnLinear(nn.Linear):
    """A subclass, whose forward may do something else."""


def with_subclass(model: nn.Module) -> None:
    model.fc1 = OwnLinear(6, 10)


def with_adapter(model: nn.Module) -> None:
    fe.inject(model, fe.LoRAConfig(target_modules=["fc1"]))


@pytest.mark.parametrize(
    ("prepare", "config", "error", "word"),
    [
        (None, fe.LoRAConfig(), fe.TargetError, r"got None; nn.Linear layers of the model: fc1, fc2, head"),
        (None, fe.LoRAConfig(target_modules=["fcl"]), fe.TargetError, "did you mean 'fc2' or 'fc1'"),
        (
            None,
            fe.LoRAConfig(target_modules="fc"),
            fe.TargetError,
            "or convolution matches 'fc'",
        ),
        (
            None,
            fe.LoRAConfig(target_modules=["fc1"], exclude_modules="fc1"),
            fe.TargetError,
            "exclude_modules",
        ),
        (None, fe.LoRAConfig(target_modules=["fc1"], slices=("k",)), fe.LayoutError, "fc1: slices"),
        (
            None,
            fe.LoRAConfig(target_modules=["fc2", "fc1"], slices=("k",), layout=THIRDS),
            fe.LayoutError,
            "3 segments",
        ),
        (
            with_adapter,
            fe.LoRAConfig(target_modules=["fc2", "fc1"]),
            fe.TargetError,
            "fc1: has adapters already",
        ),
        (with_adapter, ALL, fe.TargetError, "fc1: has adapters already"),
        (with_subclass, fe.LoRAConfig(target_modules=["fc2", "fc1"]), fe.TargetError, "fc1: OwnLinear"),
        (with_weight_norm, fe.LoRAConfig(target_modules=["fc2", "fc1"]), fe.TargetError, "fc1: "),
        (
            with_replaced_forward,
            fe.LoRAConfig(target_modules=["fc2", "fc1"]),
            fe.TargetError,
            "forward has been replaced",
        ),
    ],
)
def test_refused_injections_change_nothing(
    prepare: Callable[[nn.Module], None] | None, config: fe.LoRAConfig, error: type[Exception], word: str
):
    model = MLP()
    if prepare is not None:
        prepare(model)
    before = fingerprint(model)
    with pytest.raises(error, match=word):
        fe.inject(model, config)
    assert_same(before, fingerprint(model))


def test_failure_rolled_back(monkeypatch: pytest.MonkeyPatch):
    """A failure in the middle undoes the beginning."""
    model = MLP()
    before = fingerprint(model)
    reset, calls = fe.LoRALinear.reset_adapters, []

    def fail_on_the_second(self: fe.LoRALinear, generator: Any = None) -> None:
        calls.append(self)
        if len(calls) == 2:
            raise MemoryError
        reset(self, generator)

    monkeypatch.setattr(fe.LoRALinear, "reset_adapters", fail_on_the_second)
    with pytest.raises(MemoryError):
        fe.inject(model, ALL)
    assert_same(before, fingerprint(model))
