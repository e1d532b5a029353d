# SPDX-License-Identifier: Apache-2.0
"""open_clip and OpenAI's CLIP: both towers, and the attention that pools the features of their ResNets."""

from __future__ import annotations

import copy
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from models import assert_same, explicit_delta, fingerprint, randomize_adapters_
from open_clip.modified_resnet import AttentionPool2d
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.integrations.open_clip import CallingAttentionPool2d

TEXT = {"context_length": 6, "vocab_size": 20, "width": 8, "heads": 2, "layers": 2}
TOWERS = {
    "vit": {"layers": 2, "width": 8, "head_width": 4, "patch_size": 8, "image_size": 16},
    "pooled": {
        "layers": 1, "width": 8, "head_width": 4, "patch_size": 8, "image_size": 16,
        "attentional_pool": True, "attn_pooler_queries": 3, "attn_pooler_heads": 2,
    },
    "resnet": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "image_size": 32},
}  # fmt: skip
KV = fe.LoRAConfig(r=2, target_modules=["attn"], slices=("k", "v"))


def clip(tower: str = "vit") -> open_clip.CLIP:
    torch.manual_seed(0)
    model = open_clip.CLIP(8, dict(TOWERS[tower]), TEXT).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logit" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def images(tower: str = "vit", count: int = 4) -> Tensor:
    size = TOWERS[tower]["image_size"]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


TOKENS = torch.randint(1, 20, (3, 6), generator=torch.Generator().manual_seed(2))


def dense(model: nn.Module, plain: nn.Module) -> nn.Module:
    """`plain` with W + B diag(s) A, which require gradients."""
    other = copy.deepcopy(plain).requires_grad_(False)
    for name, layer in fe.adapters(model).items():
        weight = other.get_parameter(layer.weight_name(name))
        weight.data += explicit_delta(layer)
        weight.requires_grad_(True)
    return other


@pytest.mark.parametrize(
    ("tower", "config"),
    [
        ("vit", KV),
        ("vit", fe.LoRAConfig(r=2, target_modules="all-linear")),
        ("pooled", KV),
        ("resnet", fe.LoRAConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "c_proj"])),
    ],
)
def test_towers(tower: str, config: fe.LoRAConfig):
    """Features of images and texts are those of the dense copy, and so are they after a merge and eject."""
    model = clip(tower)
    plain = copy.deepcopy(model)
    fe.inject(model, config)
    randomize_adapters_(model)
    other = dense(model, plain)
    x = images(tower)
    expected = other.encode_image(x).detach(), other.encode_text(TOKENS).detach()

    def same() -> None:
        found = model.encode_image(x), model.encode_text(TOKENS)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    same()
    with torch.no_grad():
        same()
    fe.verify_forward(model, (x, TOKENS))
    fe.eject(model)
    same()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())


class Prompted(nn.Module):
    """Scores of images by the texts of their classes."""

    def __init__(self, model: open_clip.CLIP) -> None:
        super().__init__()
        self.visual, self.scale = model.visual, 5.0
        with torch.no_grad():
            self.register_buffer("classes", model.encode_text(TOKENS, normalize=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.normalize(self.visual(x), dim=-1) @ self.classes.T


@pytest.mark.parametrize(
    ("tower", "options"),
    [
        ("vit", {"target_modules": ["attn"], "slices": ("k", "v")}),
        ("vit", {"target_modules": "all-linear"}),
        ("pooled", {"target_modules": r"visual.*attn"}),
        ("resnet", {"target_modules": ["q_proj", "v_proj", "c_proj"]}),
    ],
)
def test_fisher(tower: str, options: dict[str, Any]):
    """The Fisher per sample of a classifier by class prompts is that of autograd, over two tasks."""
    model = Prompted(clip(tower)).eval()
    plain = copy.deepcopy(model)
    fe.inject(model, fe.LoRAConfig(r=2, **options))
    ewc = fe.EWC(model, ewc_lambda=1.0, fisher_dtype=torch.float64)
    x, y = images(tower), torch.tensor([0, 1, 2, 1])
    total: dict[str, Tensor] = {}
    for task in range(2):
        randomize_adapters_(model, seed=task)
        plain = dense(model, plain)
        names = {name: layer.weight_name(name) for name, layer in fe.adapters(model).items()}
        for sample, label in zip(x, y, strict=True):
            loss = F.cross_entropy(plain(sample[None]), label[None])
            grads = torch.autograd.grad(loss, [plain.get_parameter(n) for n in names.values()])
            for name, grad in zip(names, grads, strict=True):
                total[name] = total.get(name, 0.0) + grad.square() / len(x)
        ewc.end_task([(x, y)], F.cross_entropy)
    for name, layer in fe.adapters(model).items():
        for piece in layer.adapter_slices:
            found = ewc.fishers[f"{name}.{piece.name}".rstrip(".")]
            expected = torch.cat([total[name][a:b] for a, b in piece.rows])
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9 * float(expected.max()))


class Theirs(AttentionPool2d):
    """As in OpenAI's package."""


Theirs.__module__, Theirs.__qualname__ = "clip.model", "AttentionPool2d"


class Fork(AttentionPool2d):
    """Returns every place, as forks of the class do."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).permute(2, 0, 1)
        y, _ = F.multi_head_attention_forward(
            x, x, x, x.shape[-1], self.num_heads, None,
            torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]), None, None, False, 0.0,
            self.c_proj.weight, self.c_proj.bias, use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight, need_weights=False,
        )  # fmt: skip
        return y


class Inherited(AttentionPool2d):
    """Has the forward of the library, by another name."""


@pytest.mark.parametrize("kind", [AttentionPool2d, Theirs])
def test_pool_called(kind: type[nn.Module]):
    """The pooling attention calls its four layers and computes the same."""
    torch.manual_seed(0)
    pool = kind(2, 8, 2, 5).double()
    x = torch.randn(3, 8, 2, 2, dtype=torch.float64)
    expected = pool(x)
    report = fe.inject(pool, fe.LoRAConfig(r=2, target_modules="all-linear"))
    assert type(pool) is CallingAttentionPool2d and len(report.rows) == 4
    torch.testing.assert_close(pool(x), expected, rtol=1e-12, atol=1e-12)
    fe.eject(pool, merge=False)
    assert type(pool) is kind


@pytest.mark.parametrize("kind", [Fork, Inherited])
def test_pool_refused(kind: type[nn.Module]):
    """Copies of the pooling attention, which may compute something else, are refused by name."""
    pool = nn.ModuleDict({"pool": kind(2, 8, 2), "fc": nn.Linear(8, 8)})
    before = fingerprint(pool)
    word = rf"pool\.v_proj: {kind.__name__} passes its weight to multi_head_attention_forward without calling"
    with pytest.raises(fe.TargetError, match=word):
        fe.inject(pool, fe.LoRAConfig(r=2, target_modules=["v_proj"]))
    assert_same(before, fingerprint(pool))
    fe.inject(pool, fe.LoRAConfig(r=2, target_modules="all-linear"))
    assert [*fe.adapters(pool)] == ["fc"]


def test_scripted_neighbour():
    """A scripted part of a model is passed over, whichever libraries are loaded."""
    model = nn.ModuleDict({"scripted": torch.jit.script(nn.Linear(4, 4)), "clip": clip()})
    report = fe.inject(model, KV)
    assert len(report.rows) == 8
