# SPDX-License-Identifier: Apache-2.0
"""Adapters in timm's models against plain copies of these models with W + B A in place of W, in fp64."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from timm_models import CLASSES, MODELS, Tiny, adapted, dense, randomise
from torch import Tensor, nn

import fused_ewclora as fe

EVERY = pytest.mark.parametrize("tiny", MODELS.values(), ids=MODELS)
BYPASSED = pytest.mark.parametrize(
    "tiny", [t for t in MODELS.values() if t.bypassed], ids=[n for n, t in MODELS.items() if t.bypassed]
)
# Sums of up to 48 fp64 products through two blocks: some 1e-15, which norms of small variance may amplify.
EXACT = {"rtol": 1e-10, "atol": 1e-11}


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Of all parameters that require them, by name."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = F.cross_entropy(model(x), y)
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def labels(x: Tensor) -> Tensor:
    return torch.arange(len(x)) % CLASSES


@EVERY
def test_inject_eject_unchanged(tiny: Tiny):
    """Injection changes no output and no base key, and ejection changes nothing at all."""
    model, x = tiny.make(), tiny.images()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    classes = {name: type(module) for name, module in model.named_modules()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        expected = model(x)
        report = fe.inject(model, tiny.config())
        torch.testing.assert_close(model(x), expected, **EXACT)
        fe.check_bypass(model)
        state = model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in base.items())
        assert all("lora_" in key for key in state.keys() - base.keys())
        assert bool(report.summary["bypass_fixes"]) is tiny.bypassed
        fe.eject(model, merge=False)
        assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == list(base)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


@EVERY
def test_only_slice_rows_change(tiny: Tiny):
    """Only the rows of the slices change."""
    model = tiny.make()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    layouts = {row["name"]: row for row in fe.integrations.timm.targets(model).rows}
    fe.inject(model, tiny.config())
    names = list(fe.adapters(model))
    randomise(model)
    fe.eject(model)
    for key, value in model.state_dict().items():
        name, _, leaf = key.rpartition(".")
        changed = (value != base[key]).flatten(1).any(1) if value.ndim > 1 else value != base[key]
        if name not in names or leaf != "weight":
            assert not changed.any(), key
        elif tiny.slices is None:
            assert changed.all(), key
        else:
            row = layouts[name]
            which = [segment in tiny.slices for segment in row["segments"]]
            assert changed.tolist() == [w for w, n in zip(which, row["sizes"], strict=True) for _ in range(n)]


@EVERY
def test_matches_dense_model(tiny: Tiny):
    """Outputs and gradients are those of the dense model."""
    model, x = adapted(tiny), tiny.images()
    other, y = dense(model), labels(x)
    torch.testing.assert_close(model(x), other(x), **EXACT)
    exact = gradients(other, x, y)
    actual = gradients(model, x, y)
    assert any("head" in name for name in actual)
    for name, layer in fe.adapters(model).items():
        weight = exact[f"{name}.weight"]
        for piece, lora_a, lora_b in layer.adapter_parameters():
            rows = torch.cat([weight[start:stop] for start, stop in piece.rows])
            assert float(rows.norm()) > 1e-6, f"{name}: nothing to compare"
            torch.testing.assert_close(actual[f"{name}.{piece.a_name}"], lora_b.t() @ rows, **EXACT)
            torch.testing.assert_close(actual[f"{name}.{piece.b_name}"], rows @ lora_a.t(), **EXACT)


@EVERY
def test_fisher_single_images(tiny: Tiny):
    """Windows, class tokens and pooled keys: rows of one image must stay together."""
    model, x = adapted(tiny), tiny.images(2)
    other, y = dense(model), labels(x)
    ewc = fe.EWC(model, fisher_dtype=torch.float64)
    with ewc.accumulate_fisher() as fisher_pass:
        fisher_pass.batch_size = len(y)  # windows are folded into the leading dimension
        F.cross_entropy(model(x), y).backward()
    layers = {
        f"{name}{'.' if piece.name else ''}{piece.name}": (name, piece.rows)
        for name, layer in fe.adapters(model).items()
        for piece in layer.adapter_slices
    }
    ewc.consolidate()
    assert set(ewc.fishers) == set(layers)
    single = [gradients(other, image[None], label[None]) for image, label in zip(x, y, strict=True)]
    for key, (name, ranges) in layers.items():
        mean = sum(g[f"{name}.weight"].square() for g in single) / len(single)
        exact = torch.cat([mean[start:stop] for start, stop in ranges])
        assert float(exact.max()) > 1e-12
        torch.testing.assert_close(ewc.fishers[key], exact, rtol=1e-9, atol=1e-12 * float(exact.max()))


@BYPASSED
def test_bypass_reported(tiny: Tiny):
    """A bypass is fixed reported and restored."""
    model, x = tiny.make(), tiny.images()
    report = fe.inject(model, tiny.config())
    parents = {name.rpartition(".")[0] for name in fe.adapters(model)}
    assert report.summary["bypass_fixes"] == {name: {"qkv_bias_separate": True} for name in parents}
    assert "qkv_bias_separate = True" in str(report)
    assert fe.verify_forward(model, x).keys() == set(fe.adapters(model))
    copied = dense(model)  # through a deepcopy, which must have the old values
    fe.eject(model)
    for ejected in (model, copied):
        assert not any(ejected.get_submodule(name).qkv_bias_separate for name in parents)
        assert fe.integrations.timm.targets(ejected).summary["bypassed"]


def test_separate_biases_kept():
    """A model built with separate biases keeps them separate."""
    model = MODELS["beit"].make()
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    report = fe.inject(model, MODELS["beit"].config())
    assert report.summary["bypass_fixes"] == {}
    fe.eject(model)
    assert all(block.attn.qkv_bias_separate for block in model.blocks)


def test_other_parents_unchanged():
    """Only parents of adapted layers are changed."""
    model = MODELS["beit"].make()
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["blocks.1.attn.qkv", "fc1"]))
    assert [block.attn.qkv_bias_separate for block in model.blocks] == [False, True]
    fe.eject(model)
    assert [block.attn.qkv_bias_separate for block in model.blocks] == [False, False]


def test_bypass_refused():
    """A bypass without the attribute is refused before anything changes."""
    model = MODELS["beit"].make()
    del model.blocks[1].attn.qkv_bias_separate
    with pytest.raises(fe.TargetError, match=r"blocks\.1\.attn\.qkv: .*exclude_modules") as error:
        fe.inject(model, MODELS["beit"].config())
    assert "from timm 1.0.8 on it can be set to call it" in str(error.value)
    assert not fe.adapters(model) and not model.blocks[0].attn.qkv_bias_separate


def test_levit_inner_linear():
    """LeViT is adapted by the name of the linear layer inside."""
    model = timm.create_model(
        "levit_128s",
        img_size=64,
        embed_dim=(16, 16),
        key_dim=4,
        depth=(1, 1),
        num_heads=(2, 2),
        num_classes=4,
    )
    config = fe.LoRAConfig(r=2, target_modules=["qkv.linear", "kv.linear"], slices=("v",))
    fe.inject(model, config)
    rows = {name: layer.adapter_slices[0].rows for name, layer in fe.adapters(model).items()}
    assert rows["stages.0.blocks.0.attn.qkv.linear"] == ((8, 16), (24, 32))
    assert any(name.endswith("kv.linear") and "downsample" in name for name in rows)


def test_distilled_heads_excluded():
    """Targeting `all-linear` leaves out both heads of a distilled model."""
    model = MODELS["deit"].make()
    report = fe.inject(model, fe.LoRAConfig(r=2, target_modules="all-linear"))
    skipped = report.summary["skipped"]
    assert {skipped.pop(head) for head in ("head", "head_dist")} == {"output head"}
    assert list(skipped) == ["patch_embed.proj"]
    assert len(fe.adapters(model)) == 2 * 4


def test_window_sample_counts():
    """SwinV2 with all layers that see images; its position networks see none, and are refused by name."""
    tiny = MODELS["swinv2"]
    x, names = tiny.images(3), {"layers.0.blocks.0.attn.qkv", "layers.1.blocks.0.mlp.fc2"}
    everything = fe.LoRAConfig(r=2, target_modules="all-linear")
    images = fe.LoRAConfig(r=2, target_modules="all-linear", exclude_modules=["cpb_mlp.0", "cpb_mlp.2"])
    for config in (everything, images):
        model = tiny.make()
        fe.inject(model, config)
        randomise(model)
        ewc = fe.EWC(model, fisher_dtype=torch.float64)
        if config is everything:
            with pytest.raises(fe.FisherError, match=r"cpb_mlp\.0: .*\[1, 7, 7, 2\] for 3 samples"):
                ewc.end_task([(x, labels(x))], F.cross_entropy)
        else:
            ewc.end_task([(x, labels(x))], F.cross_entropy)
            assert names <= set(ewc.fishers) and not any("cpb_mlp" in key for key in ewc.fishers)
