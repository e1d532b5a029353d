# SPDX-License-Identifier: Apache-2.0
"""Packed projections of transformers: every known layout against what the model does with the rows."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_ewclora as fe
from fused_ewclora.integrations._transformers_layouts import PACKED, layout_of

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
WIDTH, HEADS, KV_HEADS, SIZE = 32, 4, 2, 8
SMALL = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "attn_implementation": "eager"}
GROUPED = {**SMALL, "num_key_value_heads": KV_HEADS, "intermediate_size": 24, "pad_token_id": 0}
GPT2 = {"n_embd": WIDTH, "n_head": HEADS, "attn_implementation": "eager"}
OLD_NAMES = ("layer_id", "block_idx")  # of layer_idx: ModernBERT and DBRX in older versions
VISION_SIZES = {"hidden_size": WIDTH, "num_heads": HEADS, "attn_implementation": "eager"}
VISION = {"embed_dim": WIDTH, "num_heads": HEADS, "attn_implementation": "eager"}


def tokens(count: int = 6) -> Tensor:
    return torch.randn(2, count, WIDTH)


def image() -> Tensor:
    return torch.randn(1, 4, 4, WIDTH)


def rotary(count: int = 6, size: int = SIZE) -> tuple[Tensor, Tensor]:
    angles = torch.randn(1, count, size)
    return angles.cos(), angles.sin()


def plain(module: nn.Module) -> Callable[[], Any]:
    x = tokens()
    return lambda: module(x)


def pictured(module: nn.Module) -> Callable[[], Any]:
    x = image()
    return lambda: module(x)


def masked(module: nn.Module) -> Callable[[], Any]:
    x, mask = tokens(), torch.zeros(2, 1, 6, 6)
    return lambda: module(x, attention_mask=mask)


def rotated(module: nn.Module) -> Callable[[], Any]:
    x, angles = tokens(), rotary()
    return lambda: module(x, position_embeddings=angles, attention_mask=None)


def rotated_of_old(module: nn.Module) -> Callable[[], Any]:
    """With what ModernBERT and DBRX of older versions want, which newer ones leave alone."""
    x, angles, mask = tokens(), rotary(), torch.zeros(2, 1, 6, 6)
    old = {"sliding_window_mask": mask, "position_ids": torch.arange(6)[None]}
    return lambda: module(x, position_embeddings=angles, attention_mask=mask, **old)


def packed_images(module: nn.Module) -> Callable[[], Any]:
    x, (cos, sin), ends = torch.randn(6, WIDTH), rotary(), torch.tensor([0, 6], dtype=torch.int32)
    return lambda: module(x, cu_seqlens=ends, position_embeddings=(cos[0], sin[0]))


def bloom(module: nn.Module) -> Callable[[], Any]:
    x, alibi, mask = tokens(), torch.zeros(2 * HEADS, 1, 6), torch.zeros(2, 1, 6, 6)
    return lambda: module(x, x, alibi=alibi, attention_mask=mask)


def falcon(module: nn.Module) -> Callable[[], Any]:
    x, angles, mask = tokens(), rotary(), torch.zeros(2, 1, 6, 6)
    return lambda: module(x, alibi=None, attention_mask=mask, position_embeddings=angles)


def codegen(module: nn.Module) -> Callable[[], Any]:
    x, positions = tokens(), torch.arange(6)[None]
    return lambda: module(x, position_ids=positions)


def mpt(module: nn.Module) -> Callable[[], Any]:
    x, bias = tokens(), torch.zeros(HEADS, 1, 6)
    return lambda: module(x, position_bias=bias)


def japanese(module: nn.Module) -> Callable[[], Any]:
    x, (cos, sin), mask = tokens(), rotary(), torch.zeros(2, 1, 6, 6)
    return lambda: module(x, mask, None, position_embeddings=(cos, sin))


def persimmon(module: nn.Module) -> Callable[[], Any]:
    x, angles = tokens(), rotary(size=module.rotary_ndims)
    return lambda: module(x, position_embeddings=angles)


def deberta(module: nn.Module) -> Callable[[], Any]:
    x, mask = tokens(), torch.ones(2, 1, 6, 6, dtype=torch.bool)
    return lambda: module(x, mask)


def across(module: nn.Module) -> Callable[[], Any]:
    x, states = tokens(), tokens(5)
    return lambda: module(x, encoder_hidden_states=states)


# (entry, configuration class, its arguments, further arguments of the parent's class, how to call it)
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any], Callable[[Any], Callable[[], Any]]]] = [
    ("bark.BarkSelfAttention.att_proj", "bark.BarkSemanticConfig",
     {"hidden_size": WIDTH, "num_heads": HEADS, "block_size": 8}, {"is_causal": True, "layer_idx": 0}, plain),
    ("blip.BlipAttention.qkv", "blip.BlipVisionConfig", SMALL, {}, plain),
    ("blip_2.Blip2Attention.qkv", "blip_2.Blip2VisionConfig", SMALL, {}, plain),
    ("bloom.BloomAttention.query_key_value", "bloom.BloomConfig",
     {"hidden_size": WIDTH, "n_head": HEADS}, {"layer_idx": 0}, bloom),
    ("codegen.CodeGenAttention.qkv_proj", "codegen.CodeGenConfig",
     {"n_embd": WIDTH, "n_head": HEADS, "rotary_dim": 4, "n_positions": 8}, {"layer_idx": 0}, codegen),
    ("dbrx.DbrxAttention.Wqkv", "dbrx.DbrxConfig",
     {"d_model": WIDTH, "n_heads": HEADS, "attn_implementation": "eager",
      "attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 1e4, "clip_qkv": 1e3}},
     {"layer_idx": 0}, rotated_of_old),
    ("deberta.DisentangledSelfAttention.in_proj", "deberta.DebertaConfig", SMALL, {}, deberta),
    ("decision_transformer.DecisionTransformerGPT2Attention.c_attn",
     "decision_transformer.DecisionTransformerConfig", {"hidden_size": WIDTH, "n_head": HEADS,
     "attn_implementation": "eager"}, {"layer_idx": 0}, plain),
    ("falcon.FalconAttention.query_key_value", "falcon.FalconConfig",
     {**SMALL, "num_kv_heads": KV_HEADS, "new_decoder_architecture": True}, {"layer_idx": 0}, falcon),
    ("falcon.FalconAttention.query_key_value", "falcon.FalconConfig",
     {**SMALL, "multi_query": True}, {"layer_idx": 0}, falcon),
    ("falcon.FalconAttention.query_key_value", "falcon.FalconConfig",
     {**SMALL, "multi_query": False}, {"layer_idx": 0}, falcon),
    ("florence2.Florence2VisionChannelAttention.qkv", "florence2.Florence2VisionConfig",
     {"embed_dim": (WIDTH,), "num_groups": (HEADS,), "attn_implementation": "eager"},
     {"stage_idx": 0}, plain),
    ("florence2.Florence2VisionWindowAttention.qkv", "florence2.Florence2VisionConfig",
     {"embed_dim": (WIDTH,), "num_heads": (HEADS,), "window_size": 4, "attn_implementation": "eager"},
     {"stage_idx": 0}, pictured),
    ("glm4v.Glm4vVisionAttention.qkv", "glm4v.Glm4vVisionConfig",
     {"hidden_size": WIDTH, "num_heads": HEADS, "attn_implementation": "eager"}, {}, packed_images),
    ("got_ocr2.GotOcr2VisionAttention.qkv", "got_ocr2.GotOcr2VisionConfig",
     {**SMALL, "use_rel_pos": False}, {"window_size": 4}, pictured),
    ("gpt2.GPT2Attention.c_attn", "gpt2.GPT2Config", GPT2, {"layer_idx": 0}, plain),
    ("gpt2.GPT2Attention.c_attn", "gpt2.GPT2Config", GPT2, {"is_cross_attention": True}, across),
    ("gpt_bigcode.GPTBigCodeAttention.c_attn", "gpt_bigcode.GPTBigCodeConfig",
     {**GPT2, "multi_query": False}, {"layer_idx": 0}, plain),
    ("gpt_bigcode.GPTBigCodeAttention.c_attn", "gpt_bigcode.GPTBigCodeConfig",
     {**GPT2, "multi_query": True}, {"layer_idx": 0}, plain),
    ("gpt_neox.GPTNeoXAttention.query_key_value", "gpt_neox.GPTNeoXConfig",
     SMALL, {"layer_idx": 0}, rotated),
    ("gpt_neox_japanese.GPTNeoXJapaneseAttention.query_key_value", "gpt_neox_japanese.GPTNeoXJapaneseConfig",
     SMALL, {"layer_idx": 0}, japanese),
    ("hiera.HieraMaskUnitAttention.qkv", "", {},
     {"hidden_size": WIDTH, "hidden_size_output": WIDTH, "num_heads": HEADS}, plain),
    ("imagegpt.ImageGPTAttention.c_attn", "imagegpt.ImageGPTConfig", GPT2, {"layer_idx": 0}, plain),
    ("imagegpt.ImageGPTAttention.c_attn", "imagegpt.ImageGPTConfig",
     GPT2, {"is_cross_attention": True, "layer_idx": 0}, across),
    ("instructblip.InstructBlipAttention.qkv", "instructblip.InstructBlipVisionConfig", SMALL, {}, plain),
    ("mgp_str.MgpstrAttention.qkv", "mgp_str.MgpstrConfig", SMALL, {}, plain),
    ("modernbert.ModernBertAttention.Wqkv", "modernbert.ModernBertConfig",
     {**SMALL, "num_hidden_layers": 1}, {"layer_idx": 0}, rotated_of_old),
    ("mpt.MptAttention.Wqkv", "mpt.MptConfig", {"d_model": WIDTH, "n_heads": HEADS}, {"layer_idx": 0}, mpt),
    ("openai.Attention.c_attn", "openai.OpenAIGPTConfig", GPT2,
     {"nx": WIDTH, "n_positions": 8, "scale": True}, plain),
    ("persimmon.PersimmonAttention.query_key_value", "persimmon.PersimmonConfig",
     {**SMALL, "qk_layernorm": False}, {"layer_idx": 0}, persimmon),
    ("phi3.Phi3Attention.qkv_proj", "phi3.Phi3Config", GROUPED, {"layer_idx": 0}, rotated),
    ("phi4_multimodal.Phi4MultimodalAttention.qkv_proj", "phi4_multimodal.Phi4MultimodalConfig",
     GROUPED, {"layer_idx": 0}, rotated),
    ("qwen2_5_vl.Qwen2_5_VLVisionAttention.qkv", "qwen2_5_vl.Qwen2_5_VLVisionConfig",
     {"hidden_size": WIDTH, "num_heads": HEADS, "attn_implementation": "eager"}, {}, packed_images),
    ("qwen2_vl.VisionAttention.qkv", "qwen2_vl.Qwen2VLVisionConfig", VISION, {}, packed_images),
    ("qwen3_vl.Qwen3VLVisionAttention.qkv", "qwen3_vl.Qwen3VLVisionConfig",
     {"hidden_size": WIDTH, "num_heads": HEADS, "attn_implementation": "eager"}, {}, packed_images),
    ("sam.SamVisionAttention.qkv", "sam.SamVisionConfig",
     {**SMALL, "use_rel_pos": False}, {"window_size": 4}, pictured),
    ("sam.SamVisionSdpaAttention.qkv", "sam.SamVisionConfig",
     {**SMALL, "use_rel_pos": False}, {"window_size": 4}, pictured),
    ("sam2.Sam2MultiScaleAttention.qkv", "sam2.Sam2HieraDetConfig", {"attn_implementation": "eager"},
     {"dim": WIDTH, "dim_out": WIDTH, "num_attention_heads": HEADS}, pictured),
    ("seggpt.SegGptAttention.qkv", "seggpt.SegGptConfig",
     {**SMALL, "use_relative_position_embeddings": False}, {}, pictured),
    ("timesformer.TimesformerSelfAttention.qkv", "timesformer.TimesformerConfig", SMALL, {}, plain),
    ("vitdet.VitDetAttention.qkv", "vitdet.VitDetConfig",
     {**SMALL, "use_relative_position_embeddings": False}, {}, pictured),
    *(
        (f"{attention}.qkv", config, VISION_SIZES, {}, packed_images)
        for attention, config in (
            ("ernie4_5_vl_moe.Ernie4_5_VLMoeVisionAttention", "ernie4_5_vl_moe.Ernie4_5_VLMoeVisionConfig"),
            ("glm4v_moe.Glm4vMoeVisionAttention", "glm4v_moe.Glm4vMoeVisionConfig"),
            ("glm_image.GlmImageVisionAttention", "glm_image.GlmImageVisionConfig"),
            ("glm_ocr.GlmOcrVisionAttention", "glm_ocr.GlmOcrVisionConfig"),
            ("qwen3_5.Qwen3_5VisionAttention", "qwen3_5.Qwen3_5VisionConfig"),
            ("qwen3_5_moe.Qwen3_5MoeVisionAttention", "qwen3_5_moe.Qwen3_5MoeVisionConfig"),
            ("qwen3_omni_moe.Qwen3OmniMoeVisionAttention", "qwen3_omni_moe.Qwen3OmniMoeVisionEncoderConfig"),
            ("qwen3_vl_moe.Qwen3VLMoeVisionAttention", "qwen3_vl_moe.Qwen3VLMoeVisionConfig"),
        )
    ),
    ("deepseek_ocr2.DeepseekOcr2SamVisionAttention.qkv", "deepseek_ocr2.DeepseekOcr2SamVisionConfig",
     {**SMALL, "use_rel_pos": False}, {"window_size": 4}, pictured),
    ("sam_hq.SamHQVisionAttention.qkv", "sam_hq.SamHQVisionConfig",
     {**SMALL, "use_rel_pos": False}, {"window_size": 4}, pictured),
    ("instructblipvideo.InstructBlipVideoAttention.qkv", "instructblipvideo.InstructBlipVideoVisionConfig",
     SMALL, {}, plain),
    ("layoutlmv2.LayoutLMv2SelfAttention.qkv_linear", "layoutlmv2.LayoutLMv2Config",
     {**SMALL, "fast_qkv": True, "has_relative_attention_bias": False, "has_spatial_attention_bias": False},
     {}, masked),
    # gate and up
    ("glm4v.Glm4vTextMLP.gate_up_proj", "glm4v.Glm4vTextConfig", GROUPED, {}, plain),
    ("glm_image.GlmImageTextMLP.gate_up_proj", "glm_image.GlmImageTextConfig", GROUPED, {}, plain),
    ("glm_ocr.GlmOcrTextMLP.gate_up_proj", "glm_ocr.GlmOcrTextConfig", GROUPED, {}, plain),
    ("dia.DiaMLP.gate_up_proj", "dia.DiaEncoderConfig", {**SMALL, "intermediate_size": 24}, {}, plain),
    ("glm.GlmMLP.gate_up_proj", "glm.GlmConfig", GROUPED, {}, plain),
    ("glm4.Glm4MLP.gate_up_proj", "glm4.Glm4Config", GROUPED, {}, plain),
    ("phi3.Phi3MLP.gate_up_proj", "phi3.Phi3Config", GROUPED, {}, plain),
    ("phi4_multimodal.Phi4MultimodalMLP.gate_up_proj", "phi4_multimodal.Phi4MultimodalConfig",
     GROUPED, {}, plain),
    ("phi4_multimodal.Phi4MultimodalAudioMLP.gate_up_proj", "phi4_multimodal.Phi4MultimodalAudioConfig",
     {"hidden_size": WIDTH, "intermediate_size": 24}, {}, plain),
]  # fmt: skip


def made(entry: str, config: str, settings: dict[str, Any], arguments: dict[str, Any]) -> nn.Module:
    """The module that owns the projection, as the model would make it."""
    model, kind, _ = entry.split(".")
    if VERSION < (5, 23) and importlib.util.find_spec(f"transformers.models.{model}") is None:
        pytest.skip(f"transformers {transformers.__version__} has no {model}")
    modeling = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    first = {}
    if config:
        folder, name = config.split(".")
        configurations = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
        first["config"] = getattr(configurations, name)(**settings)
    torch.manual_seed(0)
    owner = getattr(modeling, kind)
    names = inspect.signature(owner).parameters
    old = next((name for name in OLD_NAMES if name in names), "layer_idx")
    arguments = {old if name == "layer_idx" else name: value for name, value in arguments.items()}
    return owner(**first, **arguments).eval()


class Operands(TorchDispatchMode):
    """The operands of batched products, among them those of attention, and of elementwise products."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[Tensor, Tensor]] = []
        self.factors: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("bmm", "baddbmm"):
            self.products.append(tuple(t.clone() for t in args[-2:]))
        elif name.startswith("_scaled_dot_product"):
            q, k, v = (t.clone() for t in args[:3])
            self.products += [(q, k), (q, v)]
        elif name == "mul" and isinstance(args[1], Tensor) and args[0].shape == args[1].shape:
            self.factors.append(tuple(t.clone() for t in args))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def attention_operands(parent: nn.Module, call: Callable[[], Any]) -> dict[str, Tensor]:
    """q and k of the last batched product but one, v of the last; rotary embeddings may have some before."""
    with Operands() as seen:
        call()
    assert len(seen.products) >= 2
    (q, k), (_, v) = seen.products[-2:]
    return {"q": q, "k": k, "v": v}


@torch.no_grad()
def gated_operands(parent: nn.Module, call: Callable[[], Any]) -> dict[str, Tensor]:
    """What the activation is applied to, and the factor beside its result."""
    seen: list[Tensor] = []
    activation = next(m for n, m in parent.named_children() if n in ("activation_fn", "act_fn"))
    hook = activation.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    with Operands() as operations:
        call()
    hook.remove()
    gate, activated = (tensor.clone() for tensor in seen)
    (factors,) = [pair for pair in operations.factors if any(torch.equal(f, activated) for f in pair)]
    (up,) = [factor for factor in factors if not torch.equal(factor, activated)]
    return {"gate": gate, "up": up}


@pytest.mark.parametrize("case", CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_rows_per_segment(case):
    """The rows of a segment change what the segment is named after and nothing else."""
    entry, config, settings, arguments, calling = case
    child = entry.rpartition(".")[2]
    parent = made(entry, config, settings, arguments)
    layout = layout_of(parent, child)
    projection = parent.get_submodule(child)
    weight = projection.weight.detach()
    weight = weight.t() if isinstance(projection, transformers.pytorch_utils.Conv1D) else weight
    observe = gated_operands if "gate" in layout.segments else attention_operands
    with torch.no_grad():
        weight.normal_()  # far from the zeros that some biases start with
    call = calling(parent)
    before, kept = observe(parent, call), weight.clone()
    owned = torch.zeros(weight.shape[0])
    for segment in layout.segments:
        for start, stop in layout.rows(segment, weight.shape[0]):
            owned[start:stop] += 1
            weight[start:stop] += torch.rand(stop - start, WIDTH)
        after = observe(parent, call)
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert changed == {segment}
        weight.copy_(kept)
    assert bool((owned == 1).all()), "every row belongs to one segment"


def test_known_layouts_covered():
    """Every known layout is tested."""
    assert {case[0] for case in CASES} == set(PACKED)


def neox(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        **{**SMALL, "vocab_size": 20, "num_hidden_layers": layers, "intermediate_size": 24}
    )
    return transformers.GPTNeoXForCausalLM(config).eval()


def test_targets_report_table():
    """Targets are reported as data and print as a table."""
    report = fe.integrations.transformers.targets(neox())
    assert [row["name"] for row in report.rows] == [
        f"gpt_neox.layers.{i}.attention.query_key_value" for i in range(2)
    ]
    assert report.rows[0] == {
        "name": "gpt_neox.layers.0.attention.query_key_value", "parent": "GPTNeoXAttention",
        "segments": ("q", "k", "v"), "sizes": (WIDTH,) * 3, "interleave": HEADS, "notes": None,
    }  # fmt: skip
    assert "query_key_value" in str(report)


def test_targets_after_injection():
    """The targets of an adapted model are those of the plain one."""
    model = neox()
    before = fe.integrations.transformers.targets(model)
    fe.inject(model, fe.LoRAConfig(target_modules=["query_key_value"]))
    assert fe.integrations.transformers.targets(model).rows == before.rows


def test_conv1d_target_columns():
    """The targets of a `Conv1D` are its columns."""
    torch.manual_seed(0)
    model = transformers.GPT2Model(transformers.GPT2Config(**GPT2, n_layer=1, vocab_size=20, n_positions=8))
    (row,) = fe.integrations.transformers.targets(model).rows
    assert (row["name"], row["sizes"]) == ("h.0.attn.c_attn", (WIDTH,) * 3)


def test_no_packed_projections():
    """A model without packed projections says so."""
    config = transformers.BertConfig(**{**SMALL, "num_hidden_layers": 1, "vocab_size": 20})
    report = fe.integrations.transformers.targets(transformers.BertModel(config))
    assert report.rows == [] and "no packed projections" in str(report)


def test_slices_known_layout():
    """Slices need no layout where it is known."""
    model = neox(1)
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["query_key_value"], slices=("q", "v")))
    layer = model.gpt_neox.layers[0].attention.query_key_value
    q, v = layer.adapter_slices
    assert q.rows == tuple((h * 3 * SIZE, h * 3 * SIZE + SIZE) for h in range(HEADS))
    assert v.rows == tuple((h * 3 * SIZE + 2 * SIZE, (h + 1) * 3 * SIZE) for h in range(HEADS))


def test_subclass_unknown_layout():
    """A subclass that may unpack its rows differently has no known layout."""

    class Reordered(type(neox(1).gpt_neox.layers[0].attention)):
        pass

    model = neox(1)
    model.gpt_neox.layers[0].attention.__class__ = Reordered
    assert fe.integrations.transformers.targets(model).rows == []
    with pytest.raises(
        fe.LayoutError, match=r"layers\.0\.attention\.query_key_value: slices: expected a layout"
    ):
        fe.inject(model, fe.LoRAConfig(target_modules=["query_key_value"], slices=("q",)))
    assert fe.adapters(model) == {}
