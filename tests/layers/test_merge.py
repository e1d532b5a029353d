# SPDX-License-Identifier: Apache-2.0
"""Disabling, merging, unmerging and ejecting adapters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import (
    KV,
    MLP,
    TinyViT,
    X,
    assert_same,
    fingerprint,
    injected,
    randomize_adapters_,
)
from torch import nn

import fused_ewclora as fe


def test_disabled_nests():
    """A model with its adapters disabled is the base model, and disabling nests."""
    model, base = injected(), TinyViT()
    base.load_state_dict(model.state_dict(), strict=False)
    y, y0 = model(X), base(X)
    assert not torch.allclose(y, y0, atol=1e-3)
    with fe.disabled(model):
        assert torch.equal(model(X), y0)
        with pytest.raises(KeyError), fe.disabled(model):
            raise KeyError
        assert torch.equal(model(X), y0)
    assert torch.equal(model(X), y)


def test_disabled_while_merged():
    """`disabled` takes merged adapters out and puts them back."""
    model, base = injected(), TinyViT()
    base.load_state_dict(model.state_dict(), strict=False)
    fe.merge(model)
    merged = fingerprint(model)
    with fe.disabled(model):
        assert torch.equal(model(X), base(X))
    assert_same(merged, fingerprint(model))


def test_unmerge_bitwise():
    """Unmerging restores the model bit for bit."""
    model = injected()
    before, y = fingerprint(model), model(X)
    fe.merge(model)
    torch.testing.assert_close(model(X), y)
    fe.unmerge(model)
    assert_same(before, fingerprint(model))
    assert torch.equal(model(X), y)


def test_double_merge_warns():
    """Merging twice warns and does nothing."""
    model = injected()
    with pytest.warns(UserWarning, match="not merged"):
        fe.unmerge(model)
    fe.merge(model)
    before = fingerprint(model)
    with pytest.warns(UserWarning, match="merged already"):
        fe.merge(model)
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("operation", [fe.merge, fe.eject])
def test_failed_merge_unchanged(operation: Callable[[nn.Module], None]):
    """A merge that fails leaves every layer as it was."""
    model = injected()
    with torch.no_grad():
        fe.adapters(model)["blocks.1.attn.qkv"].lora_A_k[0, 0] = float("inf")
    before = fingerprint(model)
    with pytest.raises(fe.ArgumentError, match=r"blocks\.1\.attn\.qkv: merge"):
        operation(model)
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("merged_before", [False, True])
@pytest.mark.parametrize("merge", [False, True])
def test_eject_restores(merge: bool, merged_before: bool):
    """Ejecting restores the class, the keys and `requires_grad`."""
    torch.manual_seed(0)
    model = TinyViT()
    model.blocks[0].norm1.requires_grad_(False)
    before = fingerprint(model)
    fe.inject(model, KV)
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["fc1"]))
    randomize_adapters_(model)
    sums = {name: layer.consolidated_weight() for name, layer in fe.adapters(model).items()}
    if merged_before:
        fe.merge(model)
    fe.eject(model, merge=merge)
    if merge:
        for name, value in sums.items():
            assert torch.equal(model.get_submodule(name).weight, value)
            before["values"][f"{name}.weight"] = value
    assert_same(before, fingerprint(model))


def test_no_adapters():
    """Operations on a model without adapters say so."""
    for operation in (fe.merge, fe.unmerge, fe.eject):
        with pytest.raises(fe.TargetError, match="inject"):
            operation(MLP())


def test_tied_weights():
    """Tied weights cause a warning and are never merged."""
    model = MLP(d_in=10)
    model.fc2.weight = model.fc1.weight
    with pytest.warns(UserWarning, match=r"'fc1' is also fc2.weight"):
        fe.inject(model, fe.LoRAConfig(r=2, target_modules=["fc1"]))
    before = fingerprint(model)
    for operation in (fe.merge, fe.eject):
        with pytest.raises(fe.TargetError, match=r"fc2\.weight"):
            operation(model)
    assert_same(before, fingerprint(model))
    fe.eject(model, merge=False)
    assert type(model.fc1) is nn.Linear


def test_eject_compiled():
    """Ejecting reaches through a compile wrapper."""
    model = injected()
    fe.eject(torch.compile(model, backend="eager"))
    assert not fe.adapters(model) and all(p.requires_grad for p in model.parameters())


def test_eject_replaced_head():
    """Ejecting after the head was replaced restores what is left."""
    model = injected()
    model.head = nn.Linear(8, 9, bias=False)
    fe.eject(model)
    assert all(p.requires_grad for p in model.parameters())
