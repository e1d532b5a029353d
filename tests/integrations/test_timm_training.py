# SPDX-License-Identifier: Apache-2.0
"""What training code around a timm model does, with adapters in it: heads, checkpoints, EMA, optimizers."""

from __future__ import annotations

import copy

import pytest
import timm
import timm.layers
import timm.optim
import timm.utils
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from timm_models import CLASSES, MODELS, adapted, randomise
from torch import Tensor, nn

import fused_ewclora as fe


def needs(owner: object, name: str) -> pytest.MarkDecorator:
    """Of a test of something that came to timm after the first version that is supported."""
    return pytest.mark.skipif(not hasattr(owner, name), reason=f"timm {timm.__version__} has no {name}")


SOME = pytest.mark.parametrize("name", ["vit", "beit", "swin"])


def batch(name: str, count: int = 3) -> tuple[Tensor, Tensor]:
    return MODELS[name].images(count), torch.arange(count) % CLASSES


def lora_gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(5)  # drop path
    F.cross_entropy(model(x), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if "lora_" in name}


def fisher_of(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    ewc = fe.EWC(model, fisher_dtype=torch.float64)
    with ewc.accumulate_fisher() as fisher_pass:
        fisher_pass.batch_size = len(y)
        torch.manual_seed(5)
        F.cross_entropy(model(x), y).backward()
    ewc.consolidate()
    return ewc.fishers


@SOME
def test_new_classifier(name: str):
    """A new classifier trains, and ejection leaves it alone."""
    model = adapted(MODELS[name])
    model.reset_classifier(7)
    model.double()
    x, y = batch(name)
    assert model(x).shape == (3, 7)
    gradients = lora_gradients(model, x, y)
    head = model.get_classifier()
    assert all(bool(g.any()) for g in gradients.values())
    assert all(p.requires_grad and bool(p.grad.any()) for p in head.parameters())
    fe.eject(model)
    assert model.get_classifier() is head and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "reentrant"),  # timm's BEiT hands keywords to checkpoint, which the reentrant one refuses
    [("vit", False), ("vit", True), ("beit", False), ("swin", False), ("swin", True)],
)
@needs(timm.layers, "use_reentrant_ckpt")
def test_gradient_checkpointing(name: str, reentrant: bool):
    """Gradient checkpointing changes neither the gradients nor the Fisher."""
    plain, x_y = adapted(MODELS[name]), batch(name)
    model = copy.deepcopy(plain)
    model.set_grad_checkpointing()
    before = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(reentrant)
    try:
        for each in (plain, model):
            each.train()
            each.patch_embed.proj.weight.requires_grad_(True)  # reentrant needs inputs with gradients
        expected, actual = lora_gradients(plain, *x_y), lora_gradients(model, *x_y)
        assert expected.keys() == actual.keys() and len(expected) >= 4
        calls = [sum(layer.forward_calls for layer in fe.adapters(m).values()) for m in (plain, model)]
        assert calls[1] == 2 * calls[0], "every layer runs again in the backward pass"
        assert all(torch.equal(expected[key], actual[key]) for key in expected)
        expected, actual = fisher_of(plain, *x_y), fisher_of(model, *x_y)
        assert all(torch.equal(expected[key], actual[key]) and expected[key].any() for key in expected)
    finally:
        timm.layers.set_reentrant_ckpt(before)


@SOME
def test_plain_checkpoint_loads(name: str):
    """A checkpoint of the plain model loads before and after injection."""
    tiny = MODELS[name]
    other = tiny.make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        expected = other(tiny.images())
    checkpoint = other.state_dict()
    before, after = tiny.make(), tiny.make()
    before.load_state_dict(checkpoint)
    fe.inject(before, tiny.config())
    fe.inject(after, tiny.config())
    missing, unexpected = after.load_state_dict(checkpoint, strict=False)
    assert not unexpected
    assert {key for key, _ in after.named_parameters() if "lora_" in key} == set(missing)
    for model in (before, after):
        with torch.no_grad():
            torch.testing.assert_close(model(tiny.images()), expected, rtol=1e-10, atol=1e-11)
    randomise(before)
    after.load_state_dict(before.state_dict())  # strict: adapters as well
    assert torch.equal(before(tiny.images()), after(tiny.images()))


@SOME
@needs(timm.utils, "ModelEmaV3")
def test_ema_covers_adapters(name: str):
    """The moving average covers the adapters and computes by itself."""
    model, (x, _) = adapted(MODELS[name]), batch(name)
    ema = timm.utils.ModelEmaV3(model, decay=0.75)
    assert torch.equal(ema(x), model(x))
    start = {key: value.clone() for key, value in model.state_dict().items()}
    randomise(model)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, start[key])}
    assert changed and all("lora_B" in key for key in changed)
    ema.update(model)
    for key, value in ema.module.state_dict().items():
        if value.is_floating_point():  # lerp rounds once or twice
            exact = 0.75 * start[key] + 0.25 * model.state_dict()[key]
            torch.testing.assert_close(value, exact, rtol=1e-14, atol=1e-15)
    average = copy.deepcopy(ema.module)
    fe.eject(average)
    torch.testing.assert_close(ema(x), average(x), rtol=1e-10, atol=1e-11)
    assert set(fe.adapters(model)), "the model itself keeps its adapters"


@needs(timm.utils, "ModelEmaV3")
def test_ema_restarts():
    """consolidate moves the adapters into the weights: an average across it would mix two bases."""
    model, (x, y) = adapted(MODELS["vit"]), batch("vit")
    ema = timm.utils.ModelEmaV3(model)
    ewc = fe.EWC(model, fisher_dtype=torch.float64)
    ewc.end_task([(x, y)], F.cross_entropy)
    ema.set(model)
    assert torch.equal(ema(x), model(x))


@needs(timm.optim, "param_groups_weight_decay")
def test_parameter_groups():
    """Parameter groups hold each trainable parameter once."""
    model = adapted(MODELS["vit"])
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    decayed = timm.optim.param_groups_weight_decay(model, 0.1)
    layered = timm.optim.param_groups_layer_decay(model, 0.1, layer_decay=0.5)
    for groups in (decayed, layered):
        held = [id(p) for group in groups for p in group["params"]]
        assert sorted(held) == sorted(trainable)
    rates = {
        trainable[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in layered
        for p in group["params"]
    }
    # 0.5 per layer above: embedding, two blocks, head.
    assert rates["blocks.0.attn.qkv.lora_A_k"] == (0.25, 0.1)
    assert rates["blocks.1.attn.qkv.lora_B_v"] == (0.5, 0.1)
    # timm 1.0.20 has no patterns.
    old = tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 21)
    spare = [name for name in trainable.values() if "lora_" in name] if old else ("*.lora_*",)
    spared = timm.optim.param_groups_weight_decay(model, 0.1, no_weight_decay_list=spare)
    decays = {trainable[id(p)]: group["weight_decay"] for group in spared for p in group["params"]}
    assert {decay for name, decay in decays.items() if "lora_" in name} == {0.0}
    assert decays["head.weight"] == 0.1


def test_optimizer_two_tasks():
    """A timm optimizer trains two tasks."""
    model, (x, y) = adapted(MODELS["beit"]), batch("beit", 4)
    ewc = fe.EWC(model, ewc_lambda=1.0, fisher_dtype=torch.float64)
    for _ in range(2):
        optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=0.01, weight_decay=0.01)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y) + ewc.penalty()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        ewc.end_task([(x, y)], F.cross_entropy)
    assert ewc.tasks == 2


@SOME
@needs(SwinTransformer, "forward_intermediates")
def test_features_match_merged(name: str):
    """Features are those of the merged model."""
    model, (x, _) = adapted(MODELS[name]), batch(name)
    other = copy.deepcopy(model)
    fe.eject(other)
    exact = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(model.forward_features(x), other.forward_features(x), **exact)
    ours, theirs = (m.forward_intermediates(x, intermediates_only=True) for m in (model, other))
    assert len(ours) == len(theirs) > 0
    for feature, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(feature, expected, **exact)


@pytest.mark.parametrize("name", ["vit", "beit"])
@needs(SwinTransformer, "forward_intermediates")
def test_features_only_model(name: str):
    """A features-only model takes adapters."""
    tiny = MODELS[name]
    torch.manual_seed(0)
    tiny.skip_if_refused()
    model = timm.create_model(tiny.name, features_only=True, out_indices=(0, 1), **tiny.options).double()
    model.eval()
    with torch.no_grad():
        before = model(tiny.images())[-1]
        fe.inject(model, tiny.config())
        torch.testing.assert_close(model(tiny.images())[-1], before, rtol=1e-10, atol=1e-11)
        fe.check_bypass(model)
        randomise(model)
        assert not torch.allclose(model(tiny.images())[-1], before)
    assert all(layer.adapter_slices[0].rows == ((16, 32),) for layer in fe.adapters(model).values())
