# SPDX-License-Identifier: Apache-2.0
"""The layouts of the packed projections in the models of transformers.

Every entry was taken from the forward of the model (transformers 5.23; those that 4.57 and 5.0 have are the
same). A test verifies it by changing the rows of one segment and comparing the operands of the attention. A
class that is not listed has no known layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..config import QKVLayout
from ..layers.matching import register_layout
from ..report import Report
from ._packed import packed_projections

Rule = Callable[[Any], QKVLayout | None]  # takes the module that owns the projection
QKV, KV = ("q", "k", "v"), ("k", "v")


def _thirds(parent: Any) -> QKVLayout:
    return QKVLayout(QKV)


def _gate_up(parent: Any) -> QKVLayout:
    return QKVLayout(("gate", "up"))


def _up_gate(parent: Any) -> QKVLayout:
    return QKVLayout(("up", "gate"))


def _by_head(heads: str) -> Rule:
    """[heads][q, k, v][head_dim]; `heads` is the attribute of the parent or its config with their number."""

    def rule(parent: Any) -> QKVLayout:
        count = getattr(parent, heads, None) or getattr(parent.config, heads)
        return QKVLayout(QKV, None, count)

    return rule


def _grouped(parent: Any) -> QKVLayout:
    """q | k | v with fewer heads for k and v than for q."""
    heads, size = parent.config.num_attention_heads, parent.head_dim
    kv = parent.num_key_value_heads * size
    return QKVLayout(QKV, (heads * size, kv, kv))


def _gpt2(parent: Any) -> QKVLayout:
    """q | k | v, or k | v in cross-attention."""
    return QKVLayout(KV if parent.is_cross_attention else QKV)


def _imagegpt(parent: Any) -> QKVLayout:
    return QKVLayout(KV if hasattr(parent, "q_attn") else QKV)


def _gpt_bigcode(parent: Any) -> QKVLayout | None:
    """One k and v for all heads, or [heads][q, k, v]. Cross-attention fails in transformers itself."""
    if parent.is_cross_attention:
        return None
    if parent.multi_query:
        return QKVLayout(QKV, (parent.embed_dim, parent.kv_dim, parent.kv_dim))
    return QKVLayout(QKV, None, parent.num_heads)


def _falcon(parent: Any) -> QKVLayout:
    """[k/v heads][their q heads, k, v] (new decoder), one k and v for all heads, or [heads][q, k, v]."""
    size = parent.head_dim
    if parent.new_decoder_architecture:
        kv = parent.num_kv_heads * size
        return QKVLayout(QKV, (parent.num_heads * size, kv, kv), parent.num_kv_heads)
    if parent.multi_query:
        return QKVLayout(QKV, (parent.num_heads * size, size, size))
    return QKVLayout(QKV, None, parent.num_heads)


def _codegen(parent: Any) -> QKVLayout:
    """Four blocks (one per core that it was trained on), each q | v | k, with values before keys."""
    return QKVLayout(("q", "v", "k"), None, 4)


# "<folder in transformers.models>.<class of the parent>.<name of the projection>"
PACKED: Mapping[str, Rule] = {
    "bark.BarkSelfAttention.att_proj": _thirds,
    "blip.BlipAttention.qkv": _thirds,
    "blip_2.Blip2Attention.qkv": _thirds,
    "bloom.BloomAttention.query_key_value": _by_head("num_heads"),
    "codegen.CodeGenAttention.qkv_proj": _codegen,
    "dbrx.DbrxAttention.Wqkv": lambda parent: QKVLayout(
        QKV, (parent.hidden_size, *(2 * [parent.num_key_value_heads * parent.head_dim]))
    ),
    "deberta.DisentangledSelfAttention.in_proj": _by_head("num_attention_heads"),
    "decision_transformer.DecisionTransformerGPT2Attention.c_attn": _gpt2,
    "deepseek_ocr2.DeepseekOcr2SamVisionAttention.qkv": _thirds,
    "dia.DiaMLP.gate_up_proj": _gate_up,
    "ernie4_5_vl_moe.Ernie4_5_VLMoeVisionAttention.qkv": _thirds,
    "falcon.FalconAttention.query_key_value": _falcon,
    "florence2.Florence2VisionChannelAttention.qkv": _thirds,
    "florence2.Florence2VisionWindowAttention.qkv": _thirds,
    "glm.GlmMLP.gate_up_proj": _gate_up,
    "glm4.Glm4MLP.gate_up_proj": _gate_up,
    "glm4v.Glm4vTextMLP.gate_up_proj": _gate_up,
    "glm4v.Glm4vVisionAttention.qkv": _thirds,
    "glm4v_moe.Glm4vMoeVisionAttention.qkv": _thirds,
    "glm_image.GlmImageTextMLP.gate_up_proj": _gate_up,
    "glm_image.GlmImageVisionAttention.qkv": _thirds,
    "glm_ocr.GlmOcrTextMLP.gate_up_proj": _gate_up,
    "glm_ocr.GlmOcrVisionAttention.qkv": _thirds,
    "got_ocr2.GotOcr2VisionAttention.qkv": _thirds,
    "gpt2.GPT2Attention.c_attn": _gpt2,
    "gpt_bigcode.GPTBigCodeAttention.c_attn": _gpt_bigcode,
    "gpt_neox.GPTNeoXAttention.query_key_value": _by_head("num_attention_heads"),
    "gpt_neox_japanese.GPTNeoXJapaneseAttention.query_key_value": _by_head("num_attention_heads"),
    "hiera.HieraMaskUnitAttention.qkv": _thirds,
    "imagegpt.ImageGPTAttention.c_attn": _imagegpt,
    "instructblip.InstructBlipAttention.qkv": _thirds,
    "instructblipvideo.InstructBlipVideoAttention.qkv": _thirds,
    "layoutlmv2.LayoutLMv2SelfAttention.qkv_linear": _thirds,
    "mgp_str.MgpstrAttention.qkv": _thirds,
    "modernbert.ModernBertAttention.Wqkv": _thirds,
    "mpt.MptAttention.Wqkv": _thirds,
    "openai.Attention.c_attn": _thirds,
    "persimmon.PersimmonAttention.query_key_value": _by_head("num_heads"),
    "phi3.Phi3Attention.qkv_proj": _grouped,
    "phi3.Phi3MLP.gate_up_proj": _gate_up,
    "phi4_multimodal.Phi4MultimodalAttention.qkv_proj": _grouped,
    "phi4_multimodal.Phi4MultimodalAudioMLP.gate_up_proj": _up_gate,
    "phi4_multimodal.Phi4MultimodalMLP.gate_up_proj": _gate_up,
    "qwen2_5_vl.Qwen2_5_VLVisionAttention.qkv": _thirds,
    "qwen2_vl.VisionAttention.qkv": _thirds,
    "qwen3_5.Qwen3_5VisionAttention.qkv": _thirds,
    "qwen3_5_moe.Qwen3_5MoeVisionAttention.qkv": _thirds,
    "qwen3_omni_moe.Qwen3OmniMoeVisionAttention.qkv": _thirds,
    "qwen3_vl.Qwen3VLVisionAttention.qkv": _thirds,
    "qwen3_vl_moe.Qwen3VLMoeVisionAttention.qkv": _thirds,
    "sam.SamVisionAttention.qkv": _thirds,
    "sam.SamVisionSdpaAttention.qkv": _thirds,
    "sam2.Sam2MultiScaleAttention.qkv": _thirds,
    "sam_hq.SamHQVisionAttention.qkv": _thirds,
    "seggpt.SegGptAttention.qkv": _thirds,
    "timesformer.TimesformerSelfAttention.qkv": _thirds,
    "vitdet.VitDetAttention.qkv": _thirds,
}


def entry(parent: nn.Module, child: str) -> str | None:
    """The key of a projection in `PACKED`, or None; a subclass may unpack differently and is unknown."""
    module, kind = type(parent).__module__, type(parent).__name__
    if not module.startswith("transformers.models."):
        return None
    key = f"{module.split('.')[2]}.{kind}.{child}"
    return key if key in PACKED else None


@register_layout
def layout_of(parent: nn.Module, child: str) -> QKVLayout | None:
    """The layout of `parent.child`, or None when it is not known."""
    key = entry(parent, child)
    return None if key is None else PACKED[key](parent)


def targets(model: nn.Module) -> Report:
    """A table of the packed projections of a transformers model whose layout is known. Nothing is changed.

    Args:
        model: a model of transformers, or one that contains its modules.

    Returns:
        A report; `QKVLayout(row["segments"], row["sizes"], row["interleave"])` is the layout of a row of its
        `rows`, which `inject` uses, so that `slices` work without a `layout`.

    Examples:
        >>> import transformers
        >>> gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2))
        >>> print(fe.integrations.transformers.targets(gpt2))
        packed projections (transformers)
          name                         parent         segments  sizes        interleave  notes
          transformer.h.0.attn.c_attn  GPT2Attention  q k v     768 768 768  -           -
          transformer.h.1.attn.c_attn  GPT2Attention  q k v     768 768 768  -           -
        >>> report = fe.inject(gpt2, fe.LoRAConfig(target_modules=["c_attn"], slices=("q", "v")))
        >>> report.summary["layers"]
        2
    """
    return packed_projections("transformers", model, _sized)


def _sized(parent: nn.Module, child: str) -> QKVLayout | None:
    layout = layout_of(parent, child)
    if layout is None:
        return None
    projection: Any = parent.get_submodule(child)
    rows = projection.out_features if hasattr(projection, "out_features") else projection.nf  # Conv1D
    return QKVLayout(layout.segments, layout.sizes_of(rows), layout.interleave)
