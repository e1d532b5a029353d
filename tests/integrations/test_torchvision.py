# SPDX-License-Identifier: Apache-2.0
"""torchvision's attentions: known layouts, and Swin windows that call their layers."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from dense_fisher import dense_fisher
from models import randomize_adapters_
from torch import Tensor, nn
from torchvision.models import ConvNeXt, MaxVit, SwinTransformer, VisionTransformer
from torchvision.models import swin_transformer as swin
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.video import swin_transformer as video_swin
from torchvision.models.video.mvit import MSBlockConfig, MultiscaleAttention, MViT

import fused_ewclora as fe
from fused_ewclora.integrations import torchvision as known

D, HEADS = 8, 2
# The patch embedding of videos is an nn.Conv3d.
BOTH = fe.LoRAConfig(r=2, target_modules=["qkv", "proj"], exclude_modules=["patch_embed.proj"])
IMAGES, VIDEO = (2, 8, 12, D), (2, 4, 4, 6, D)

# class, window, shift, shape of the input
WINDOWS: dict[str, tuple[type[nn.Module], list[int], list[int], tuple[int, ...]]] = {
    "plain": (swin.ShiftedWindowAttention, [4, 4], [0, 0], IMAGES),
    "shifted": (swin.ShiftedWindowAttention, [4, 4], [2, 2], IMAGES),
    "padded": (swin.ShiftedWindowAttention, [3, 5], [1, 2], (2, 7, 8, D)),
    "one window high": (swin.ShiftedWindowAttention, [4, 4], [2, 2], (2, 3, 8, D)),
    "one window": (swin.ShiftedWindowAttention, [4, 4], [2, 2], (2, 4, 4, D)),
    "cosine": (swin.ShiftedWindowAttentionV2, [4, 4], [0, 0], IMAGES),
    "cosine shifted": (swin.ShiftedWindowAttentionV2, [4, 4], [2, 2], (1, 8, 12, D)),
    "cosine padded": (swin.ShiftedWindowAttentionV2, [4, 4], [2, 2], (1, 8, 9, D)),
    "video": (video_swin.ShiftedWindowAttention3d, [2, 2, 3], [0, 0, 0], VIDEO),
    "video shifted": (video_swin.ShiftedWindowAttention3d, [2, 2, 3], [1, 1, 1], (2, 4, 5, 6, D)),
    "video short": (video_swin.ShiftedWindowAttention3d, [8, 2, 3], [4, 1, 1], VIDEO),
}


def attention_of(case: str, **options: Any) -> tuple[nn.Module, Tensor]:
    kind, window, shift, shape = WINDOWS[case]
    torch.manual_seed(0)
    attention = kind(D, window, shift, HEADS, **options).double()
    with torch.no_grad():  # torchvision zeroes the bias of k at its use
        for parameter in attention.parameters():
            parameter.normal_(std=0.5)
    return attention, torch.randn(shape, dtype=torch.float64)


def backward(attention: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of all parameters, with the same dropout every time."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = attention(x)
    parameters = [p for n, p in attention.named_parameters() if "lora" not in n]
    grads = torch.autograd.grad(y.square().sum(), [x, *parameters])
    return [y, *grads]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", WINDOWS)
def test_same_function(case: str, bias: bool, training: bool):
    """An attention that calls its layers computes what torchvision's does, with gradients and dropout."""
    options = {"qkv_bias": bias, "proj_bias": bias, "attention_dropout": 0.3, "dropout": 0.2}
    attention, x = attention_of(case, **options)
    attention.train(training)
    expected = backward(attention, x)
    settings = known.bypass_settings(attention, "qkv")
    assert settings
    attention.__class__ = settings["__class__"]
    # The cosine of a padded token, which is 0 / 0, has gradients of 1e12, and their differences are rounding.
    compared = 1 if case == "cosine padded" else len(expected)
    for actual, wanted in zip(backward(attention, x)[:compared], expected[:compared], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def small_swin(block: Callable[..., nn.Module] | None = None) -> nn.Module:
    torch.manual_seed(0)
    options = {"block": block, "downsample_layer": swin.PatchMergingV2} if block is not None else {}
    return SwinTransformer(
        [4, 4], D, [2], [HEADS], [4, 4], num_classes=3, stochastic_depth_prob=0.0, **options
    )


def small_video() -> nn.Module:
    torch.manual_seed(0)
    return video_swin.SwinTransformer3d([2, 4, 4], D, [2], [HEADS], [2, 2, 2], num_classes=3)


def small_maxvit() -> nn.Module:
    torch.manual_seed(0)
    return MaxVit((32, 32), 8, 4, [8], [1], 4, 0.0, num_classes=3)


def small_convnext() -> nn.Module:
    torch.manual_seed(0)
    return ConvNeXt([CNBlockConfig(8, None, 2)], layer_scale=0.5, num_classes=3)


def small_mvit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_heads": 2, "kernel_q": [1, 3, 3], "kernel_kv": [1, 3, 3]}
    steps = [([1, 1, 1], [1, 2, 2]), ([1, 2, 2], [1, 1, 1])]
    blocks = [
        MSBlockConfig(input_channels=8, output_channels=8, stride_q=q, stride_kv=kv, **sizes)
        for q, kv in steps
    ]
    return MViT((16, 16), 4, blocks, True, True, True, True, attention_dropout=0.0, num_classes=3)


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(16, 8, 2, 2, D, 16, num_classes=3)


SWINS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "swin": (small_swin, (3, 3, 32, 32)),
    "swin v2": (lambda: small_swin(swin.SwinTransformerBlockV2), (3, 3, 32, 32)),
    "video swin": (small_video, (3, 3, 4, 16, 16)),
}
# Every linear layer but the head.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    **{name: (*of, "head") for name, of in SWINS.items()},
    "maxvit": (small_maxvit, (3, 3, 32, 32), "classifier.5"),
    "convnext": (small_convnext, (3, 3, 16, 16), "classifier.2"),
    "mvit": (small_mvit, (3, 3, 4, 16, 16), "head.1"),
    "vit": (small_vit, (3, 3, 16, 16), "heads.head"),
}


def made(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    """The model with parameters large enough that every one of them shows, and its input."""
    model = make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, torch.randn(shape, dtype=torch.float64)


@pytest.fixture(params=SWINS)
def plain(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    return made(*SWINS[request.param])


def test_adapters_apply(plain: tuple[nn.Module, Tensor]):
    """Adapters of qkv and proj apply and train; eject restores the classes."""
    model, x = plain
    kinds = [type(module) for module in model.modules()]
    keys, before = list(model.state_dict()), model(x).detach()
    report = fe.inject(model, BOTH)
    assert "or qkv, proj would never be called" in str(report)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    randomize_adapters_(model)
    model(x).sum().backward()
    assert all(
        p.grad is not None for layer in fe.adapters(model).values() for _, p in layer.named_lora_parameters()
    )
    applied = model(x).detach()
    assert not torch.allclose(applied, before)
    fe.verify_forward(model, x)
    fe.merge(model)
    torch.testing.assert_close(model(x), applied, rtol=1e-10, atol=1e-10)
    fe.unmerge(model)
    fe.eject(model)
    assert [type(module) for module in model.modules()] == kinds and list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), applied, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", MODELS)
def test_whole_models(case: str):
    """Over three tasks outputs and gradients are those of a dense model, and the Fisher is exact."""
    make, shape, head = MODELS[case]
    model, x = made(make, shape)
    dense, y = copy.deepcopy(model), torch.tensor([0, 1, 2])
    # Small networks that make biases of positions see no samples.
    report = fe.inject(
        model,
        fe.LoRAConfig(
            2,
            target_modules="all-linear",
            exclude_modules=["cpb_mlp.0", "cpb_mlp.2"] if case == "swin v2" else None,
        ),
    )
    layers = fe.adapters(model)
    places = {name: layer.weight_name(name) for name, layer in layers.items()}
    skipped = report.summary["skipped"]
    assert skipped.pop(head) == "output head"
    assert all(why.startswith("convolutions") for why in skipped.values())
    ewc = fe.EWC(model, ewc_lambda=1.0, fisher_dtype=torch.float64)
    samples = [(x[i : i + 1], y[i : i + 1]) for i in range(3)]
    for task in range(3):
        randomize_adapters_(model)
        with torch.no_grad():
            for name, layer in layers.items():
                dense.get_parameter(places[name]).copy_(layer.consolidated_weight())
        torch.testing.assert_close(model(x), dense(x), rtol=1e-9, atol=1e-12)
        weights = [dense.get_parameter(places[name]).requires_grad_() for name in layers]
        grads = torch.autograd.grad(F.cross_entropy(dense(x), y), weights)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for (name, layer), grad in zip(layers.items(), grads, strict=True):
            ((_, a, b),) = layer.adapter_parameters()
            for ours, exact in ((a.grad, b.detach().T @ grad), (b.grad, grad @ a.detach().T)):
                assert float((ours - exact).norm()) <= 1e-9 * float(exact.norm()) + 1e-13, (name, task)
        before = {name: fisher.clone() for name, fisher in ewc.fishers.items()}
        expected = dense_fisher(dense, places, samples, cross_entropy)
        ewc.end_task([(x, y)], F.cross_entropy)
        for name, fisher in ewc.fishers.items():
            total = expected[name] + before.get(name, 0.0)
            assert float((fisher - total).norm()) <= 1e-9 * float(total.norm()) + 1e-18, (name, task)


HEADS_OF = {
    "resnet18": ["fc"], "alexnet": ["classifier.6"], "densenet121": ["classifier"],
    "mobilenet_v3_small": ["classifier.3"], "efficientnet_b0": ["classifier.1"],
    "squeezenet1_1": ["classifier.1"], "shufflenet_v2_x0_5": ["fc"], "s3d": ["classifier.1"],
    "googlenet": ["aux1.fc2", "aux2.fc2", "fc"], "inception_v3": ["AuxLogits.fc", "fc"],
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS_OF)
def test_heads(name: str):
    """The last layer of every kind of classifier is its head."""
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, **options)
    found = set(known.heads(model))
    assert sorted(name for name, module in model.named_modules() if module in found) == HEADS_OF[name]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied: Callable[[nn.Module], nn.Module]):
    """Copies keep the classes and know which ones to restore."""
    model = small_swin().eval()
    fe.inject(model, BOTH)
    randomize_adapters_(model)
    other, x = copied(model), torch.randn(1, 3, 32, 32)
    assert torch.equal(other(x), model(x))
    fe.eject(other)
    kinds = {type(m) for m in other.modules() if isinstance(m, swin.ShiftedWindowAttention)}
    assert kinds == {swin.ShiftedWindowAttention}


def test_fisher_exact(plain: tuple[nn.Module, Tensor]):
    """The Fisher of every layer is that of one sample at a time."""
    model, x = plain
    original, y = copy.deepcopy(model), torch.tensor([0, 1, 2])
    fe.inject(model, BOTH)
    ewc = fe.EWC(model, ewc_lambda=1.0, fisher_mode="sample")
    ewc.end_task([(x, y)], F.cross_entropy)
    samples = [(x[i : i + 1], y[i : i + 1]) for i in range(3)]
    expected = dense_fisher(original, list(fe.adapters(model)), samples, cross_entropy)
    for name, fisher in ewc.fishers.items():
        assert float((fisher - expected[name]).norm() / expected[name].norm()) < 1e-5, name


def cross_entropy(model: nn.Module, sample: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(sample[0]), sample[1])


def test_vit_projections():
    """The projections of the Vision Transformer's attentions are adapted, and their Fisher is exact."""
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=D, mlp_dim=16, num_classes=4
    )
    nn.init.normal_(model.heads.head.weight, std=0.3)
    original = copy.deepcopy(model.eval())
    fe.inject(model, fe.LoRAConfig(r=2, target_modules="all-linear"))
    places = {name: layer.weight_name(name) for name, layer in fe.adapters(model).items()}
    for projection in ("in_proj", "out_proj"):
        assert sum(name.endswith(f"self_attention.{projection}") for name in places) == 2
    x, y = torch.randn(3, 3, 16, 16), torch.tensor([0, 1, 2])
    ewc = fe.EWC(model, ewc_lambda=1.0, fisher_mode="sample")
    ewc.end_task([(x, y)], F.cross_entropy)
    samples = [(x[i : i + 1].double(), y[i : i + 1]) for i in range(3)]
    expected = dense_fisher(original, places, samples, cross_entropy)
    for name, fisher in ewc.fishers.items():
        assert float((fisher - expected[name]).norm() / expected[name].norm()) < 1e-4, name


def test_subclass_refused():
    """A subclass that inherits the forward is refused by name, or skipped by "all-linear"."""

    class Mine(swin.ShiftedWindowAttention):
        pass

    model = nn.ModuleDict({"attn": Mine(D, [4, 4], [0, 0], HEADS), "fc": nn.Linear(D, D)})
    with pytest.raises(
        fe.TargetError, match=r"attn\.qkv: Mine inherits the forward of ShiftedWindowAttention"
    ):
        fe.inject(model, BOTH)
    report = fe.inject(model, fe.LoRAConfig(r=2, target_modules="all-linear"))
    assert [row["name"] for row in report.rows] == ["fc"] and "attn.qkv" in report.summary["skipped"]


def test_own_forward_trusted():
    """A subclass with a forward of its own is left as it is."""

    class Mine(swin.ShiftedWindowAttention):
        def forward(self, x: Tensor) -> Tensor:
            return self.proj(self.qkv(x)[..., :D])

    model = nn.ModuleDict({"attn": Mine(D, [4, 4], [0, 0], HEADS)})
    fe.inject(model, BOTH)
    assert type(model["attn"]) is Mine and known.layout_of(model["attn"], "qkv") is None


def test_compiled_whole():
    """torch.compile sees one graph."""
    attention, x = attention_of("shifted")
    fe.inject(attention, BOTH)
    randomize_adapters_(attention)
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), attention(x))


def packed() -> dict[str, tuple[nn.Module, tuple[Any, ...], Callable[..., Any]]]:
    """Module, its inputs, and the function whose variables q, k and v are observed."""
    torch.manual_seed(0)
    cases: dict[str, tuple[nn.Module, tuple[Any, ...], Callable[..., Any]]] = {}
    for name, function in {
        "plain": swin.shifted_window_attention,
        "cosine": swin.shifted_window_attention,
        "video": video_swin.shifted_window_attention_3d,
    }.items():
        attention, x = attention_of(name)
        cases[name] = (attention, (x,), function)
    windows = RelativePositionalMultiHeadAttention(D, D // HEADS, 16).double()
    cases["maxvit"] = (windows, (torch.randn(2, 3, 16, D).double(),), type(windows).forward)
    scales = MultiscaleAttention(
        [2, 4, 4],
        D,
        D,
        HEADS,
        [],
        [],
        [],
        [],
        residual_pool=False,
        residual_with_cls_embed=False,
        rel_pos_embed=False,
    ).double()
    cases["mvit"] = (scales, (torch.randn(2, 33, D).double(), (2, 4, 4)), MultiscaleAttention.forward)
    return cases


@pytest.mark.parametrize("case", ["plain", "cosine", "video", "maxvit", "mvit"])
def test_rows_per_segment(case: str):
    """The rows of a segment make the variable it is named after and no other."""
    attention, inputs, function = packed()[case]
    path = known._PACKED[type(attention)]
    projection, layout = attention.get_submodule(path), known.layout_of(attention, path)
    assert layout is not None
    before = observed(attention, inputs, function)
    for segment in layout.segments:
        kept = projection.weight.detach().clone()
        with torch.no_grad():
            for start, stop in layout.rows(segment, projection.out_features):
                projection.weight[start:stop] += 1.0
        after = observed(attention, inputs, function)
        with torch.no_grad():
            projection.weight.copy_(kept)
        assert [name for name in before if not torch.equal(after[name], before[name])] == [segment]


def observed(
    attention: nn.Module, inputs: tuple[Any, ...], function: Callable[..., Any]
) -> dict[str, Tensor]:
    """What the variables q, k and v hold when the function returns."""
    found: dict[str, Tensor] = {}

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "return" and frame.f_code is function.__code__:
            found.update({name: frame.f_locals[name].clone() for name in ("q", "k", "v")})

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        with torch.no_grad():
            attention(*inputs)
    finally:
        sys.setprofile(before)
    return found


def test_all_kinds_tested():
    """Every class with a known layout is tested."""
    plain = {kind for kind in known._PACKED if kind.__module__.startswith("torchvision")}
    assert plain == {type(module) for module, _, _ in packed().values()}


def test_targets():
    """The table has the layouts and says what is bypassed; slices work without a layout."""
    report = fe.integrations.torchvision.targets(small_swin())
    assert [row["segments"] for row in report.rows] == [("q", "k", "v")] * 2
    assert "calls qkv with __class__ = CallingWindowAttention" in report.rows[0]["notes"]
    maxvit = MaxVit((32, 32), 8, 4, [8], [1], 4, 0.0, num_classes=2)
    rows = fe.integrations.torchvision.targets(maxvit).rows
    assert rows and all(row["name"].endswith("to_qkv") and row["notes"] is None for row in rows)
    rows = fe.integrations.torchvision.targets(small_vit()).rows
    assert [row["name"] for row in rows] == [
        f"encoder.layers.encoder_layer_{i}.self_attention.in_proj" for i in range(2)
    ]
    assert rows[0]["segments"] == ("q", "k", "v") and rows[0]["sizes"] == (D,) * 3
    model = small_swin()
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["proj"]))
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["qkv"], slices=("k", "v")))
    fe.verify_forward(model, torch.randn(1, 3, 32, 32))
