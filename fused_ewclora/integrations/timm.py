# SPDX-License-Identifier: Apache-2.0
"""timm: the layouts of the packed projections of its attention classes, and the classes that bypass them.

A class is identified by where its forward method is defined. A subclass with its own forward is therefore
unknown, as is an instance whose forward has been replaced. Nothing here imports timm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..config import QKVLayout
from ..layers.bypass import register_call, register_refusal
from ..layers.matching import register_layout
from ..report import Report
from ._packed import packed_projections

Unpack = Callable[[Any, int], QKVLayout]  # (the attention, rows of the projection) -> layout


def _equal(*segments: str) -> Unpack:
    """Contiguous segments of equal size."""
    return lambda attention, rows: QKVLayout(segments, (rows // len(segments),) * len(segments))


_QKV, _KV, _QK = _equal("q", "k", "v"), _equal("k", "v"), _equal("q", "k")


def _gc_vit(attention: Any, rows: int) -> QKVLayout:
    """Blocks with a global query project only k and v."""
    return (_KV if attention.use_global else _QKV)(attention, rows)


def _maxvit(attention: Any, rows: int) -> QKVLayout:
    by_head = getattr(attention, "head_first", True)  # timm 0.6 has no other
    return QKVLayout(("q", "k", "v"), (rows // 3,) * 3, interleave=attention.num_heads if by_head else None)


def _by_head(*segments: str) -> Unpack:
    """[heads][segments], with `key_dim` rows per head for q and k and `val_dim` rows for v."""

    def layout(attention: Any, rows: int) -> QKVLayout:
        heads = attention.num_heads
        widths = {"q": attention.key_dim, "k": attention.key_dim, "v": attention.val_dim}
        return QKVLayout(segments, tuple(heads * widths[name] for name in segments), interleave=heads)

    return layout


def _parallel(block: Any, rows: int) -> QKVLayout:
    """The rows of the first layer of the MLP come before q, k and v."""
    return QKVLayout(("mlp", "q", "k", "v"), tuple(block.in_split))


# (module below timm, class): (path of the projection below the class, its layout). Convolutions that project
# q, k and v are not linear layers and are not listed.
_KNOWN: dict[tuple[str, str], tuple[str, Unpack]] = {
    ("layers.attention", "Attention"): ("qkv", _QKV),  # ViT, DeiT, NaFlexViT, ...
    ("layers.attention", "AttentionRope"): ("qkv", _QKV),
    ("layers.attention_pool", "AttentionPoolLatent"): ("kv", _KV),
    ("layers.attention_pool2d", "AttentionPool2d"): ("qkv", _QKV),
    ("layers.attention_pool2d", "RotAttentionPool2d"): ("qkv", _QKV),
    ("layers.diff_attention", "DiffAttention"): ("qkv", _QKV),
    ("models.beit", "Attention"): ("qkv", _QKV),
    ("models.cait", "TalkingHeadAttn"): ("qkv", _QKV),
    ("models.coat", "FactorAttnConvRelPosEnc"): ("qkv", _QKV),
    ("models.convit", "GPSA"): ("qk", _QK),
    ("models.convit", "MHSA"): ("qkv", _QKV),
    ("models.csatv2", "SpatialTransformerBlock"): ("qkv", _QKV),
    ("models.davit", "ChannelAttention"): ("qkv", _QKV),
    ("models.davit", "ChannelAttentionV2"): ("qkv", _QKV),
    ("models.davit", "WindowAttention"): ("qkv", _QKV),
    ("models.edgenext", "CrossCovarianceAttn"): ("qkv", _QKV),
    ("models.efficientformer", "Attention"): ("qkv", _by_head("q", "k", "v")),
    ("models.eva", "EvaAttention"): ("qkv", _QKV),
    ("models.fastvit", "Attention"): ("qkv", _QKV),
    ("models.gcvit", "WindowAttentionGlobal"): ("qkv", _gc_vit),
    ("models.hiera", "MaskUnitAttention"): ("qkv", _QKV),
    ("models.hieradet_sam2", "MultiScaleAttention"): ("qkv", _QKV),
    ("models.levit", "Attention"): ("qkv.linear", _by_head("q", "k", "v")),
    ("models.levit", "AttentionDownsample"): ("kv.linear", _by_head("k", "v")),
    ("models.levit", "AttentionSubsample"): ("kv.linear", _by_head("k", "v")),  # timm 0.6
    ("models.maxxvit", "AttentionCl"): ("qkv", _maxvit),
    ("models.metaformer", "Attention"): ("qkv", _QKV),
    ("models.mvitv2", "MultiScaleAttention"): ("qkv", _QKV),
    ("models.nest", "Attention"): ("qkv", _QKV),
    ("models.pvt_v2", "Attention"): ("kv", _KV),
    ("models.swin_transformer", "WindowAttention"): ("qkv", _QKV),
    ("models.swin_transformer_v2", "WindowAttention"): ("qkv", _QKV),
    ("models.swin_transformer_v2_cr", "WindowMultiHeadAttention"): ("qkv", _QKV),
    ("models.tiny_vit", "Attention"): ("qkv", _by_head("q", "k", "v")),
    ("models.tnt", "Attention"): ("qk", _QK),
    ("models.twins", "GlobalSubSampleAttn"): ("kv", _KV),
    ("models.twins", "LocallyGroupedAttn"): ("qkv", _QKV),
    ("models.vision_transformer", "Attention"): ("qkv", _QKV),  # timm before 1.0.16
    ("models.vision_transformer", "DiffParallelScalingBlock"): ("in_proj", _parallel),
    ("models.vision_transformer", "ParallelScalingBlock"): ("in_proj", _parallel),
    ("models.vision_transformer_relpos", "RelPosAttention"): ("qkv", _QKV),
    ("models.vision_transformer_sam", "Attention"): ("qkv", _QKV),
    ("models.volo", "Attention"): ("qkv", _QKV),
    ("models.volo", "ClassAttention"): ("kv", _KV),
    ("models.xcit", "XCA"): ("qkv", _QKV),
}

# These compute F.linear(x, qkv.weight, biases of q, k and v) unless qkv_bias_separate is set.
_BYPASSING = {
    ("models.beit", "Attention"),
    ("models.eva", "EvaAttention"),
    ("models.swin_transformer_v2", "WindowAttention"),
}


def _defined_in(parent: nn.Module) -> tuple[str, str] | None:
    """(module below timm, class) whose forward method `parent` runs, or None."""
    if "forward" in vars(parent):
        return None
    owner = next(cls for cls in type(parent).__mro__ if "forward" in vars(cls))
    package, _, module = owner.__module__.partition(".")
    module = module.replace("models.layers.", "layers.")  # where timm 0.6 has them
    return (module, owner.__qualname__) if package == "timm" else None


@register_layout
def layout_of(parent: nn.Module, child: str) -> QKVLayout | None:
    """The layout of a packed projection of a timm attention; a rule of `register_layout`.

    Args:
        parent: a module, such as an attention of timm.
        child: the dotted name of the projection below it.

    Returns:
        The layout; None where `child` is no packed projection that is known, or no `nn.Linear`.

    Examples:
        >>> import timm
        >>> attention = timm.create_model("vit_tiny_patch16_224").blocks[0].attn
        >>> fe.integrations.timm.layout_of(attention, "qkv").sizes
        (192, 192, 192)
    """
    known = _KNOWN.get(_defined_in(parent) or ("", ""))
    if known is None or child not in (known[0], known[0].replace(".linear", ".c")):  # .c is that of timm 0.6
        return None
    projection = parent.get_submodule(child)
    return known[1](parent, projection.out_features) if isinstance(projection, nn.Linear) else None


@register_call
def bypass_settings(parent: nn.Module, child: str) -> Mapping[str, Any] | None:
    """The attributes that make a timm attention call its packed projection; a rule of `register_call`.

    Args:
        parent: a module, such as an attention of timm.
        child: the name of the projection below it.

    Returns:
        The attributes and their values; None where the parent calls the projection already, or nothing makes
        it do so.

    Examples:
        >>> import timm
        >>> attention = timm.create_model("beitv2_base_patch16_224").blocks[0].attn
        >>> fe.integrations.timm.bypass_settings(attention, "qkv")
        {'qkv_bias_separate': True}
    """
    if child != "qkv" or not _bypasses(parent):
        return None
    return {"qkv_bias_separate": True} if hasattr(parent, "qkv_bias_separate") else None


def _bypasses(parent: nn.Module) -> bool:
    bypassing = _defined_in(parent) in _BYPASSING and getattr(parent, "q_bias", None) is not None
    return bypassing and not getattr(parent, "qkv_bias_separate", False)


@register_refusal
def bypassed_for_good(parent: nn.Module, child: str) -> str | None:
    """Why a packed projection of timm before 1.0.8 is not adaptable: nothing makes the attention call it.

    Args:
        parent: a module, such as an attention of timm.
        child: the name of the projection below it.

    Returns:
        The reason, or None where the projection is adaptable.

    Examples:
        >>> import timm
        >>> attention = timm.create_model("vit_tiny_patch16_224").blocks[0].attn
        >>> fe.integrations.timm.bypassed_for_good(attention, "qkv") is None
        True
    """
    if child != "qkv" or not _bypasses(parent) or hasattr(parent, "qkv_bias_separate"):
        return None
    return (
        f"{type(parent).__name__} of this version of timm uses its weight without calling it; from timm "
        "1.0.8 on it can be set to call it"
    )


def targets(model: nn.Module) -> Report:
    """A table of the packed projections of a timm model whose layout is known. Nothing is changed.

    Args:
        model: a model of timm, or one that contains its modules.

    Returns:
        A report; `QKVLayout(row["segments"], row["sizes"], row["interleave"])` is the layout of a row of its
        `rows`, and `row["notes"]` says which attribute `inject` sets on a parent that would bypass
        the layer.

    Examples:
        >>> import timm
        >>> report = fe.integrations.timm.targets(timm.create_model("beitv2_base_patch16_224"))
        >>> first = report.rows[0]
        >>> first["name"], first["segments"], first["notes"]
        ('blocks.0.attn.qkv', ('q', 'k', 'v'), 'uses qkv.weight, calls qkv with qkv_bias_separate = True')
    """
    return packed_projections("timm", model, layout_of, bypass_settings)
