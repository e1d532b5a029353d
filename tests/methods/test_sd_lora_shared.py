# SPDX-License-Identifier: Apache-2.0
"""SD-LoRA with one magnitude per task for the whole network: one parameter, whatever is done to the model."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sd_literal import OFFICIAL, Literal, directions, run, train
from strategies import seeds
from tiny_models import KEYS, Tiny, adapted, assert_same, batches, data, snapshot
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.methods import SDLoRA
from fused_ewclora.methods._directions import Directions
from fused_ewclora.methods._freezing import freeze_shared, measure

SHARED = {"magnitudes": "shared"}


def magnitudes(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if "lora_magnitudes" in name]


def in_second_task(**options) -> SDLoRA:
    method = SDLoRA(adapted(), **{**SHARED, **options})
    run(method, range(1))
    method.begin_task(1)
    train(method, 1)
    return method


def test_gradients_add_up():
    """The gradient is the sum of those of magnitudes per adapter."""
    method = in_second_task()
    own = SDLoRA(adapted())
    run(own, range(1))
    own.begin_task(1)
    for key, now in directions(method.model).items():
        theirs = directions(own.model)[key]
        with torch.no_grad():
            for name, tensor in vars(now).items():
                getattr(theirs, name).copy_(tensor)
    own.model.head.load_state_dict(method.model.head.state_dict())
    x, y = data(8)
    for each in (method, own):
        each.model.zero_grad()
        F.cross_entropy(each.model(x), y).backward()
    ((name, shared),) = magnitudes(method.model)
    assert name == "qkv.lora_magnitudes_k" and shared.shape == (2,)
    parts = [p.grad for _, p in magnitudes(own.model)]
    assert len(parts) == len(KEYS)
    torch.testing.assert_close(shared.grad, torch.stack(parts).sum(0), rtol=1e-12, atol=1e-15)


def moved(model: nn.Module) -> nn.Module:
    return model.float().double()


def assigned(model: nn.Module) -> nn.Module:
    """All parameters are replaced."""
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    return model


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("change", [moved, assigned, copy.deepcopy, pickled])
def test_one_parameter(change):
    """Copied, moved and loaded models have one parameter of magnitudes, which all adapters use."""
    method = in_second_task()
    x, _ = data(4)
    expected = method.model(x)
    model = change(method.model)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    ((_, shared),) = magnitudes(model)
    assert len([name for name in model.state_dict() if "lora_magnitudes" in name]) == 1
    for layer in fe.adapters(model).values():
        for piece in layer.adapter_slices:
            assert Directions.of(layer, piece).lora_magnitudes is shared
    assert (shared is magnitudes(method.model)[0][1]) == (model is method.model)


@pytest.mark.parametrize("options", [SHARED, OFFICIAL], ids=["product", "factors"])
def test_export_same(options):
    """The end of a task, merging and the export change no output."""
    method = SDLoRA(adapted(), **options)
    x, _ = data(4)
    for task in range(3):
        method.begin_task(task)
        train(method, task)
        expected = method.model(x)
        method.end_task([])
        torch.testing.assert_close(method.model(x), expected, rtol=1e-12, atol=1e-12)
    fe.merge(method.model)
    torch.testing.assert_close(method.model(x), expected, rtol=1e-12, atol=1e-12)
    fe.unmerge(method.model)
    model = method.export()
    assert model.state_dict().keys() == Tiny().state_dict().keys()
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_ejected_owner_refused():
    """Layers whose magnitudes were ejected with another layer say so."""
    method = in_second_task()
    x, _ = data(4)
    fe.eject(method.model.qkv)
    with pytest.raises(fe.TargetError, match="the layer that has them has been ejected"):
        method.model(x)


def test_zero_part():
    """An adapter that did not move has no ranks of a direction, and follows its magnitude."""
    method = in_second_task()
    now = directions(method.model)
    with torch.no_grad():
        now["qkv.v"].lora_B.zero_()
    x, _ = data(4)
    expected = method.model(x)
    method.end_task([])
    torch.testing.assert_close(method.model(x), expected, rtol=1e-12, atol=1e-12)
    rows = {row["name"]: row for row in method.report().rows}
    assert [rows[key]["ranks"] for key in KEYS] == [(2, 2), (2, 0), (2, 2)]
    assert all(row["tasks"] == (0, 1) and row["alphas"] == rows[KEYS[0]]["alphas"] for row in rows.values())
    saved = io.BytesIO()
    torch.save(method.state_dict(), saved)
    saved.seek(0)
    other = SDLoRA(adapted(), **SHARED)
    other.load_state_dict(torch.load(saved, weights_only=True))
    other.model.head.load_state_dict(method.model.head.state_dict())
    assert torch.equal(other.model(x), method.model(x))


def test_no_direction():
    """A task in which nothing moved leaves no direction and no magnitude."""
    method = in_second_task()
    with torch.no_grad():
        for now in directions(method.model).values():
            now.lora_B.zero_()
    with pytest.warns(fe.EWCLoRAWarning, match="no adapter changed"):
        method.end_task([])
    assert method.report().summary == {"directions": 3, "dropped": 3}
    assert magnitudes(method.model)[0][1].shape == (2,)


def test_official_jump():
    """Where a task starts, all directions are divided by their norms and all magnitudes are 0.8."""
    method = in_second_task(**OFFICIAL)
    method.end_task([])
    method.begin_task(2)
    x, _ = data(4)
    for key, now in directions(method.model).items():
        assert (now.lora_magnitudes == 0.8).all()
        for k, part in enumerate((slice(0, 2), slice(2, 4))):
            norm = now.lora_past_A[part].norm() * now.lora_past_B[:, part].norm()
            torch.testing.assert_close(now.lora_past_scale[part, k] * norm, torch.ones(2).double(), msg=key)
    literal = Literal(method.model, **OFFICIAL)
    with torch.no_grad():
        deltas = {
            key: 0.8
            * sum(
                now.lora_past_B[:, p] @ now.lora_past_A[p]
                / (now.lora_past_B[:, p].norm() * now.lora_past_A[p].norm())
                for p in (slice(0, 2), slice(2, 4))
            )
            for key, now in directions(method.model).items()
        }  # fmt: skip
        torch.testing.assert_close(method.model(x), literal.forward(x, deltas), rtol=1e-12, atol=1e-12)


def test_states_must_agree():
    """States of other magnitudes are refused, those of earlier versions are taken."""
    method = in_second_task()
    good = method.state_dict()
    before = snapshot(method.model)
    different = {**good["tensors"], "fc.lora_magnitudes": torch.tensor([1.0, 2.0]).double()}
    with pytest.raises(fe.CheckpointError, match=r"fc.lora_magnitudes: expected the same values as of qkv.k"):
        method.load_state_dict(good | {"tensors": different})
    with pytest.raises(fe.CheckpointError, match="magnitudes: expected 'per_adapter', got 'shared'"):
        SDLoRA(adapted()).load_state_dict(good)
    own = SDLoRA(adapted())
    run(own, range(2), steps=1)
    saved = own.state_dict()
    del saved["config"]["magnitudes"]
    SDLoRA(adapted()).load_state_dict(saved)
    with pytest.raises(fe.CheckpointError, match="magnitudes: expected 'shared', got 'per_adapter'"):
        method.load_state_dict(saved)
    assert_same(snapshot(method.model), before)


def test_penalty_gradient():
    """The gradients of the penalty are those that `add_penalty_grad_` adds."""
    method = in_second_task(ewc_lambda=3.0)
    method.end_task(batches(*data(6), 4), F.cross_entropy)
    method.begin_task(2)
    train(method, 2)
    parameters = [p for name, p in method.model.named_parameters() if "lora" in name and p.requires_grad]
    expected = torch.autograd.grad(method.penalty(), parameters)
    method.model.zero_grad()
    method.ewc.add_penalty_grad_()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-12)


def dense(now: Directions, normalization: str) -> Tensor:
    adapter = now.stacked(now.lora_magnitudes, normalization, ((0, now.lora_B.shape[0]),))
    return adapter.lora_b @ torch.diag(adapter.scale.expand(adapter.lora_a.shape[0])) @ adapter.lora_a


@given(
    seeds,
    st.lists(st.tuples(st.integers(2, 5), st.integers(2, 5)), min_size=1, max_size=3),
    st.sampled_from([0.0, 5e-4, 2e-3]),
    st.sampled_from(["product", "factors"]),
)
@settings(max_examples=20)
def test_network_span(seed, shapes, share, normalization):
    """A direction is dropped where that of the whole network is in the span of earlier ones, and what is
    lost is the share of it that is not."""
    generator = torch.Generator().manual_seed(seed)
    nows = []
    for rows, columns in shapes:
        a, b = (torch.randn(n, generator=generator).double() for n in (columns, rows))
        first = Directions.first(a[None], b[:, None], 1.0)
        (frozen,) = freeze_shared([first], [measure(first, normalization)], None, 1.0)
        # The same in every adapter, and a part at a right angle to it.
        off = torch.randn(columns, generator=generator).double()
        off = off - off @ a / (a @ a) * a
        off = off * a.norm() / off.norm()
        new = a + (share / (1 - share)) ** 0.5 * off
        tensors = {"lora_A": new[None], "lora_B": b[:, None]}
        nows.append(Directions(**{**vars(frozen.directions), **tensors}))
    before = [dense(now, normalization) for now in nows]
    ended = freeze_shared(nows, [measure(now, normalization) for now in nows], 9e-4, 1.0)
    dropped = share < 9e-4
    assert all(f.kept != dropped for f in ended)
    moved = 0.0
    for frozen, old, now in zip(ended, before, nows, strict=True):
        torch.testing.assert_close(frozen.residual, share, rtol=1e-6, atol=1e-12)
        empty = Directions(**{**vars(frozen.directions), "lora_B": torch.zeros_like(now.lora_B)})
        moved += (dense(empty, normalization) - old).square().sum().item()
    length = sum((dense(now, normalization) - dense_past(now, normalization)).square().sum() for now in nows)
    torch.testing.assert_close(moved, float(share * length) if dropped else 0.0, rtol=1e-6, atol=1e-12)


def dense_past(now: Directions, normalization: str) -> Tensor:
    return dense(Directions(**{**vars(now), "lora_B": torch.zeros_like(now.lora_B)}), normalization)
