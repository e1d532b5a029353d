# SPDX-License-Identifier: Apache-2.0
"""How timm's attentions unpack their projections, seen from the variables q, k and v of their forward."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

import pytest
import timm
import torch
from timm.models.coat import ConvRelPosEnc
from timm_models import VERSION
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.integrations import timm as known

D, HEADS, SIZE = 16, 2, (4, 4)
TOKENS = (2, 16, D)
IMAGE = (2, D, 4, 4)
GRID = (2, 4, 4, D)
DIM = {"dim": D, "num_heads": HEADS}

# (module, class): how to make one, the shape of its input, other arguments of forward
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[Any, ...]]] = {
    "layers.attention.Attention": ({**DIM, "qkv_bias": True}, TOKENS, ()),
    "layers.attention.AttentionRope": (DIM, TOKENS, ()),
    "layers.attention_pool.AttentionPoolLatent": ({"in_features": D, "num_heads": HEADS}, TOKENS, ()),
    "layers.attention_pool2d.AttentionPool2d": ({"in_features": D, "feat_size": 4, "head_dim": 8}, IMAGE, ()),
    "layers.attention_pool2d.RotAttentionPool2d": (
        {"in_features": D, "ref_feat_size": 4, "head_dim": 8}, IMAGE, (),
    ),
    "layers.diff_attention.DiffAttention": (DIM, TOKENS, ()),
    "models.beit.Attention": ({**DIM, "qkv_bias": True}, TOKENS, ()),
    "models.cait.TalkingHeadAttn": (DIM, TOKENS, ()),
    "models.coat.FactorAttnConvRelPosEnc": (
        {**DIM, "shared_crpe": ConvRelPosEnc(8, HEADS, {3: HEADS})}, (2, 17, D), (SIZE,),
    ),
    "models.convit.GPSA": (DIM, TOKENS, ()),
    "models.convit.MHSA": (DIM, TOKENS, ()),
    "models.csatv2.SpatialTransformerBlock": ({}, (2, 1, 7, 7), ()),
    "models.davit.ChannelAttention": (DIM, TOKENS, ()),
    "models.davit.ChannelAttentionV2": (DIM, TOKENS, ()),
    "models.davit.WindowAttention": ({**DIM, "window_size": SIZE}, TOKENS, ()),
    "models.edgenext.CrossCovarianceAttn": (DIM, TOKENS, ()),
    "models.efficientformer.Attention": ({**DIM, "key_dim": 4, "attn_ratio": 2, "resolution": 4}, TOKENS, ()),
    "models.eva.EvaAttention": ({**DIM, "qk_norm": False, "scale_norm": False}, TOKENS, ()),
    "models.fastvit.Attention": ({"dim": D, "head_dim": 8}, IMAGE, ()),
    "models.gcvit.WindowAttentionGlobal": ({**DIM, "window_size": SIZE, "use_global": False}, TOKENS, ()),
    "models.gcvit.WindowAttentionGlobal global": (
        {**DIM, "window_size": SIZE, "use_global": True}, TOKENS, (torch.ones(TOKENS),),
    ),
    "models.hiera.MaskUnitAttention": ({"dim": D, "dim_out": 2 * D, "heads": HEADS}, TOKENS, ()),
    "models.hiera.MaskUnitAttention windows": (
        {"dim": D, "dim_out": D, "heads": HEADS, "q_stride": 2, "window_size": 4, "use_mask_unit_attn": True},
        TOKENS, (),
    ),
    "models.hieradet_sam2.MultiScaleAttention": ({**DIM, "dim_out": 2 * D}, GRID, ()),
    "models.levit.Attention": ({**DIM, "key_dim": 4, "attn_ratio": 2, "resolution": 4}, TOKENS, ()),
    "models.levit.AttentionDownsample": (
        {"in_dim": D, "out_dim": D, "key_dim": 4, "num_heads": HEADS, "resolution": 4}, TOKENS, (),
    ),
    "models.levit.AttentionSubsample": (
        {"in_dim": D, "out_dim": D, "key_dim": 4, "num_heads": HEADS, "resolution": 4, "resolution_out": 2,
         "act_layer": nn.Hardswish}, TOKENS, (),
    ),
    "models.maxxvit.AttentionCl": ({"dim": D, "dim_head": 8, "head_first": True}, GRID, ()),
    "models.maxxvit.AttentionCl heads last": ({"dim": D, "dim_head": 8, "head_first": False}, GRID, ()),
    "models.metaformer.Attention": ({"dim": D, "head_dim": 8}, TOKENS, ()),
    "models.mvitv2.MultiScaleAttention": ({**DIM, "dim_out": D, "feat_size": SIZE}, (2, 17, D), (SIZE,)),
    "models.nest.Attention": (DIM, (2, 2, 8, D), ()),
    "models.pvt_v2.Attention": ({**DIM, "sr_ratio": 2}, TOKENS, (SIZE,)),
    "models.swin_transformer.WindowAttention": ({**DIM, "window_size": 4}, TOKENS, ()),
    "models.swin_transformer_v2.WindowAttention": ({**DIM, "window_size": SIZE}, TOKENS, ()),
    "models.swin_transformer_v2_cr.WindowMultiHeadAttention": ({**DIM, "window_size": SIZE}, TOKENS, ()),
    "models.tiny_vit.Attention": ({**DIM, "key_dim": 4, "attn_ratio": 2, "resolution": SIZE}, TOKENS, ()),
    "models.tnt.Attention": ({**DIM, "hidden_dim": 8}, TOKENS, ()),
    "models.twins.GlobalSubSampleAttn": ({**DIM, "sr_ratio": 2}, TOKENS, (SIZE,)),
    "models.twins.LocallyGroupedAttn": ({**DIM, "ws": 2}, TOKENS, (SIZE,)),
    "models.vision_transformer.Attention": ({**DIM, "qkv_bias": True}, TOKENS, ()),
    "models.vision_transformer.DiffParallelScalingBlock": ({**DIM, "mlp_ratio": 1.5}, TOKENS, ()),
    "models.vision_transformer.ParallelScalingBlock": ({**DIM, "mlp_ratio": 1.5}, TOKENS, ()),
    "models.vision_transformer_relpos.RelPosAttention": (DIM, TOKENS, ()),
    "models.vision_transformer_sam.Attention": (DIM, GRID, ()),
    "models.volo.Attention": (DIM, GRID, ()),
    "models.volo.ClassAttention": (DIM, TOKENS, ()),
    "models.xcit.XCA": (DIM, TOKENS, ()),
}  # fmt: skip
# Cases that older versions lack: the class, or what makes it run in fp64 or of these sizes.
SINCE = {
    "layers.attention.Attention": (1, 0, 16),
    "layers.attention.AttentionRope": (1, 0, 16),
    "layers.attention_pool.AttentionPoolLatent": (0, 9, 12),
    "layers.attention_pool2d.AttentionPool2d": (0, 9, 0),
    "layers.attention_pool2d.RotAttentionPool2d": (1, 0, 21),
    "layers.diff_attention.DiffAttention": (1, 0, 23),
    "models.convit.GPSA": (1, 0, 21),
    "models.csatv2.SpatialTransformerBlock": (1, 0, 23),
    "models.davit.ChannelAttention": (0, 9, 0),
    "models.davit.ChannelAttentionV2": (1, 0, 8),
    "models.davit.WindowAttention": (0, 9, 0),
    "models.eva.EvaAttention": (0, 9, 0),
    "models.fastvit.Attention": (0, 9, 12),
    "models.hiera.MaskUnitAttention": (1, 0, 3),
    "models.hiera.MaskUnitAttention windows": (1, 0, 3),
    "models.hieradet_sam2.MultiScaleAttention": (1, 0, 11),
    "models.levit.AttentionDownsample": (0, 9, 0),
    "models.metaformer.Attention": (0, 9, 0),
    "models.tiny_vit.Attention": (0, 9, 12),
    "models.vision_transformer.DiffParallelScalingBlock": (1, 0, 23),
    "models.vision_transformer.ParallelScalingBlock": (0, 9, 0),
    "models.vision_transformer_sam.Attention": (0, 9, 12),
}
# Cases that newer versions lack, with the first of these.
UNTIL = {
    "models.levit.AttentionSubsample": (0, 9, 0),
    "models.vision_transformer.Attention": (1, 0, 16),
}
CAN_CALL = (1, 0, 8)  # from which on no attention bypasses its projection for good
VARIABLES = {"q": ("q", "query"), "k": ("k", "key"), "v": ("v", "value"), "mlp": ("x_mlp",)}


def missing(case: str) -> bool:
    """Whether this version of timm is known to lack a case."""
    return SINCE.get(case, (0,)) > VERSION or UNTIL.get(case, (sys.maxsize,)) <= VERSION


def key_of(case: str) -> tuple[str, str]:
    module, _, name = case.partition(" ")[0].rpartition(".")
    return module, name


def make(case: str) -> tuple[nn.Module, tuple[Any, ...]]:
    module, name = key_of(case)
    options, shape, others = CASES[case]
    torch.set_num_threads(1)  # matrices this small only wait for each other's threads
    torch.manual_seed(0)
    kind = getattr(importlib.import_module(f"timm.{module}"), name)
    if VERSION < (1, 0, 20):  # some options came later
        taken = inspect.signature(kind).parameters
        options = {key: value for key, value in options.items() if key in taken}
        options |= {"act_layer": nn.Hardswish} if module == "models.levit" else {}
    attention = kind(**options).double()
    attention.eval()  # returns None where timm overrides train
    others = tuple(other.double() if isinstance(other, Tensor) else other for other in others)
    return attention, (torch.randn(shape, dtype=torch.float64), *others)


def observed(attention: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """What the variables q, k, v and x_mlp of the class's methods hold when these return."""
    codes = {method.__code__ for method in vars(type(attention)).values() if isinstance(method, FunctionType)}
    local_values: dict[str, Any] = {}

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "return" and frame.f_code in codes:
            local_values.update(frame.f_locals)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        with torch.no_grad():
            attention(*inputs)
    finally:
        sys.setprofile(before)
    return {
        segment: local_values[name].clone()
        for segment, names in VARIABLES.items()
        for name in names
        if isinstance(local_values.get(name), Tensor)
    }


@pytest.mark.parametrize("case", CASES)
def test_rows_per_segment(case: str):
    """The rows of a segment make the variable it is named after and no other."""
    if missing(case):
        pytest.skip(f"timm {timm.__version__} does not have it")
    attention, inputs = make(case)
    path, _ = known._KNOWN[key_of(case)]
    path = path.replace(".linear", ".c") if VERSION < (0, 9) else path
    projection = attention.get_submodule(path)
    layout = known.layout_of(attention, path)
    assert sum(layout.sizes) == projection.out_features
    before = observed(attention, inputs)
    assert set(layout.segments) <= set(before)
    for segment in layout.segments:
        kept = projection.weight.detach().clone()
        with torch.no_grad():
            for start, stop in layout.rows(segment, projection.out_features):
                for row in range(start, stop):  # each of them must count
                    projection.weight[row] += 0.5 + torch.rand(projection.in_features)
        after = observed(attention, inputs)
        with torch.no_grad():
            projection.weight.copy_(kept)
        changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
        assert changed == [segment]
        assert bool((after[segment] != before[segment]).any(-2).all()), f"{segment}: not all of its columns"


def test_known_classes_covered():
    """Every class with a known layout is tested."""
    assert {key_of(case) for case in CASES} == set(known._KNOWN)


CLASS = re.compile(
    r"^class (?P<name>\w+)"
    r"|self\.(?:qk|in_proj|\w*kv\w*) *= *(?P<packed>nn\.Linear|Linear|ln_layer)\(",  # ln_layer: LeViT
    re.MULTILINE,
)


def packed_linears(path: Path) -> Iterator[str]:
    """Classes of a file that assign a linear layer to what is called like a packed projection."""
    name = ""
    for match in CLASS.finditer(path.read_text()):
        if match["packed"]:
            yield name
        name = match["name"] or name


def test_packed_classes_known():
    """No timm class with a packed projection is unknown."""
    root = Path(timm.__file__).parent
    classes = {
        (f"{folder}.{path.stem}", name)
        for folder in ("layers", "models")
        for path in (root / folder).glob("*.py")
        for name in packed_linears(path)
    }
    assert classes <= set(known._KNOWN)
    assert set(known._KNOWN) - classes <= {key_of(case) for case in CASES if missing(case)}


@pytest.mark.parametrize("case", [case for case in CASES if key_of(case) in known._BYPASSING])
def test_bypass_fixed(case: str):
    """A fixed attention computes the same and calls its projection."""
    if missing(case) or VERSION < CAN_CALL:
        pytest.skip(f"timm {timm.__version__} cannot call it")
    attention, inputs = make(case)
    with torch.no_grad():
        attention.q_bias.normal_()
        attention.v_bias.normal_()
        expected = attention(*inputs)
    calls: list[nn.Module] = []
    attention.qkv.register_forward_hook(lambda layer, *_: calls.append(layer))
    with torch.no_grad():
        attention(*inputs)
        assert not calls, "timm calls it by itself now: the rule is not needed"
        settings = known.bypass_settings(attention, "qkv")
        assert settings
        for attribute, value in settings.items():
            setattr(attention, attribute, value)
        actual = attention(*inputs)
    assert calls == [attention.qkv]
    # One more rounding of qkv, in fp64, through an attention of 16 tokens.
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert known.bypass_settings(attention, "qkv") is None, "the attribute is set already"


def test_bypass_refused():
    """An attention that nothing makes call its projection is refused by name."""
    attention = importlib.import_module("timm.models.beit").Attention(D, HEADS, qkv_bias=True)
    vars(attention).pop("qkv_bias_separate", None)  # as before timm 1.0.8
    model = nn.ModuleDict({"attn": attention, "fc": nn.Linear(D, D)})
    assert known.bypass_settings(attention, "qkv") is None
    with pytest.raises(fe.TargetError, match=r"attn\.qkv: Attention of this version of timm uses its weight"):
        fe.inject(model, fe.LoRAConfig(r=2, target_modules=["qkv"]))
    report = fe.inject(model, fe.LoRAConfig(r=2, target_modules=["proj", "fc"]))
    assert [row["name"] for row in report.rows] == ["attn.proj", "fc"]


def test_no_biases():
    """An attention without biases needs no fix."""
    attention = importlib.import_module("timm.models.beit").Attention(D, HEADS, qkv_bias=False)
    assert known.bypass_settings(attention, "qkv") is None


VIT_ATTENTION = importlib.import_module("timm.models.vision_transformer").Attention


def test_custom_forward_unknown():
    """An attention with a forward of its own has no known layout."""
    base = VIT_ATTENTION

    class Same(base):
        pass

    class Other(base):
        def forward(self, x: Tensor) -> Tensor:
            v, k, q = self.qkv(x).chunk(3, -1)
            return self.proj(q * k * v)

    assert known.layout_of(Same(D, HEADS), "qkv") == fe.QKVLayout(("q", "k", "v"), (D, D, D))
    assert known.layout_of(Other(D, HEADS), "qkv") is None
    patched = base(D, HEADS)
    patched.forward = patched.forward
    assert known.layout_of(patched, "qkv") is None
    assert known.layout_of(base(D, HEADS), "proj") is None


def test_unknown_parent_slices():
    """Slices of a layer in an unknown parent need a layout."""

    class Other(VIT_ATTENTION):
        def forward(self, x: Tensor) -> Tensor:
            return self.proj(self.qkv(x)[..., :D])

    model = nn.ModuleDict({"attn": Other(D, HEADS)})
    with pytest.raises(fe.LayoutError, match=r"attn\.qkv: slices: expected a layout"):
        fe.inject(model, fe.LoRAConfig(r=2, target_modules=["qkv"], slices=("k", "v")))
