# SPDX-License-Identifier: Apache-2.0
"""Adapters on linear maps that are no layers: parameters, and slices of parameters, of other modules."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import randomize_adapters_
from part_models import E, Maps, Model, data, layers, loss, pair, register
from replicas import Replicated
from torch import nn

import fused_ewclora as fe
from fused_ewclora.layers.slices import fingerprint


@pytest.fixture(autouse=True)
def rules(monkeypatch):
    register(monkeypatch)


def test_tasks_equal_layers():
    """Outputs, gradients, Fishers, penalty and weights over three tasks equal those of linear layers."""
    models = pair()
    ewcs = [fe.EWC(m, ewc_lambda=10.0, generator=torch.Generator().manual_seed(0)) for m in models]
    for task in range(3):
        x, y = data(task)
        values = []
        for model, ewc in zip(models, ewcs, strict=True):
            total = loss(model(x), y) + ewc.penalty()
            total.backward()
            grads = [p.grad for layer in layers(model) for _, p in layer.named_lora_parameters()]
            values.append([total, *grads])
            with torch.no_grad():
                for layer in layers(model):
                    for _, p in layer.named_lora_parameters():
                        p -= 0.1 * p.grad
                        p.grad = None
            ewc.estimate_fisher([(x, y)], loss)
            ewc.consolidate()
        torch.testing.assert_close(*values, rtol=1e-9, atol=1e-12)
        ours, theirs = (sorted((tuple(f.shape), f.sum()) for f in ewc.fishers.values()) for ewc in ewcs)
        torch.testing.assert_close([s for _, s in ours], [s for _, s in theirs], rtol=1e-9, atol=0)
        for layer, other in zip(layers(models[0]), layers(models[1]), strict=True):
            torch.testing.assert_close(layer.base_weight, other.base_weight, rtol=1e-12, atol=1e-12)


def test_keys_and_eject():
    """The keys of the base model stay, and eject leaves the model as it was, adapters folded in."""
    model, dense = pair()
    keys = set(Model().state_dict())
    adapted = {key for key in model.state_dict() if ".lora_" in key}
    assert set(model.state_dict()) - adapted == keys
    x, _ = data(0)
    expected = dense(x)
    fe.eject(model)
    assert type(model.maps) is Maps and set(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_merge_and_copies():
    """merge, unmerge, disabled, deepcopy and pickle do with parts what they do with layers."""
    model, dense = pair()
    x, _ = data(0)
    y = model(x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with fe.disabled(model), fe.disabled(dense):
        torch.testing.assert_close(model(x), dense(x), rtol=1e-12, atol=1e-12)
    fe.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    fe.unmerge(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
        fe.merge(other)
        part = other.maps.proj
        assert part.owner is other.maps and part.weight is other.maps.down
        assert torch.equal(model(x), y)


def test_checkpoints(tmp_path):
    """A checkpoint restores weights, Fishers and adapters of parts."""
    model, _ = pair()
    ewc = fe.EWC(model, ewc_lambda=1.0)
    ewc.end_task([data(0)], loss)
    randomize_adapters_(model)
    fe.save_pretrained(tmp_path, model, ewc)
    other, _ = pair()
    new = fe.EWC(other, ewc_lambda=1.0)
    fe.load_pretrained(tmp_path, other, new)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())
    assert all(torch.equal(f, ewc.fishers[key]) for key, f in new.fishers.items())


def test_base_state_loads():
    """A state_dict of the base model is the new base of the parts; into merged parts it is refused."""
    model, _ = pair()
    other = Model().double()
    model.load_state_dict(other.state_dict(), strict=False)
    assert model.maps.proj.origin_fingerprint == fingerprint(other.maps.down.t())
    fe.merge(model)
    merged = model.maps.down.clone()
    with pytest.raises(RuntimeError, match=r"maps.down: the adapters are merged into this weight"):
        model.load_state_dict(other.state_dict(), strict=False)
    assert torch.equal(model.maps.down, merged)
    assert len(model.maps._load_state_dict_pre_hooks) == 2 + E
    fe.eject(model)
    assert not model.maps._load_state_dict_pre_hooks


def test_selection():
    """The owner's name selects all parts, a part's its own; "all-linear" those that a rule says."""

    def names(**config) -> list[str]:
        model = Model()
        fe.inject(model, fe.LoRAConfig(r=2, **config))
        return list(fe.adapters(model))

    assert len(names(target_modules=["maps"])) == 2 + E
    assert names(target_modules=["expert_1"]) == ["maps.expert_1"]
    assert names(target_modules="all-linear") == ["maps.kv", "maps.proj", "head"]
    assert len(names(target_modules=["maps"], exclude_modules=["kv"])) == 1 + E


def test_data_parallel():
    """Parts run in replicas, with the gradients of the model alone."""
    model, _ = pair()
    x, y = data(0)
    grads = []
    for run in (model, Replicated(model)):
        model.zero_grad()
        loss(run(x), y).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert grads[0]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_unfit_parts():
    """What cannot be adapted is refused by name, before anything changes."""
    config = fe.LoRAConfig(r=2, target_modules=["proj"])
    model = Model()
    model.maps.forward = model.maps.forward
    with pytest.raises(fe.TargetError, match=r"maps.proj: the forward of its Maps has been replaced"):
        fe.inject(model, config)
    model = Model()
    model.maps.down = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(fe.TargetError, match=r"maps.proj: its down has shape \[3, 3\], not \[12, 6\]"):
        fe.inject(model, config)
    model = Model()
    fe.inject(model, config)
    with pytest.raises(fe.TargetError, match=r"maps.proj: has adapters already"):
        fe.inject(model, config)


def test_tied_parts():
    """A weight that is shared with another parameter is never merged."""
    model = Model()
    model.maps.other = model.maps.down
    with pytest.warns(fe.EWCLoRAWarning, match=r"weight of 'maps.proj' is also maps.other"):
        fe.inject(model, fe.LoRAConfig(r=2, target_modules=["proj"]))
    with pytest.raises(fe.TargetError, match=r"maps.other"):
        fe.merge(model)


def test_ewc_after_eject():
    """An EWC of ejected parts says so."""
    model, _ = pair()
    ewc = fe.EWC(model, ewc_lambda=1.0)
    ewc.end_task([data(0)], loss)
    fe.eject(model)
    with pytest.raises(fe.TargetError, match="make a new EWC"):
        ewc.penalty()
