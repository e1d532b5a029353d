# SPDX-License-Identifier: Apache-2.0
"""Architectures of transformers, made from small configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import (
    CAUSAL,
    CLASS,
    CLASSES,
    FEATURES,
    IMAGE_TEXT,
    PIXELS,
    QUERIES,
    SPAN,
    TOKEN,
    TOKENS,
    Architecture,
    Task,
    class_loss,
    classes,
    images,
    labelled_tokens,
)

WORDS = 40
PAD, START, END = 0, 1, 2
_SIZES = {
    "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 32, "num_labels": CLASSES,
    "pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END, "use_cache": False,
}  # fmt: skip
_D_MODEL = {
    **_SIZES, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "decoder_start_token_id": START,
}  # fmt: skip
_T5 = {
    **_SIZES,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": START,
}
_VIT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 32, "patch_size": 8, "num_labels": CLASSES,
}  # fmt: skip
_STAGES = {
    "num_labels": CLASSES, "image_size": 32, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
}  # fmt: skip
_SWIN = {
    "num_labels": CLASSES,
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}
_SPEECH = {
    **_SIZES, "conv_dim": (8, 8), "conv_kernel": (10, 4), "conv_stride": (8, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_codevectors_per_group": 4,
    "classifier_proj_size": 8, "apply_spec_augment": False, "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip
_TEXT = {k: _SIZES[k] for k in (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
)}  # fmt: skip
_VISION = {k: v for k, v in _VIT.items() if k != "num_labels"}
_MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "num_key_value_heads": 2,
}
_MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": _MOE,
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**_MOE, "head_dim": 8},
    "olmoe": _MOE,
    "granitemoe": _MOE,
    "gpt_oss": {**_MOE, "head_dim": 8},
    "deepseek_v3": {
        **_MOE, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1,
        "n_shared_experts": 1,
    },
    "jamba": {
        **_MOE, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False, "attn_layer_period": 2,
        "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    },
}  # fmt: skip


def words(n: int) -> dict[str, Tensor]:
    """Sentences of different lengths."""
    tokens = torch.randint(3, WORDS, (n, TOKENS))
    mask = (torch.arange(TOKENS) < torch.randint(TOKENS // 2, TOKENS + 1, (n, 1))).long()
    return {"input_ids": tokens.masked_fill(mask == 0, PAD), "attention_mask": mask}


def unpadded(n: int) -> dict[str, Tensor]:
    """For models without masks."""
    return {"input_ids": torch.randint(3, WORDS, (n, TOKENS))}


def pairs(n: int) -> dict[str, Tensor]:
    """The sentences of an encoder and of a decoder."""
    return {**words(n), "decoder_input_ids": torch.randint(3, WORDS, (n, TOKENS))}


def speech(n: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(n, 300, dtype=torch.float64)}


def mel(frames: int, name: str = "input_features") -> Callable[[int], dict[str, Tensor]]:
    return lambda n: {name: torch.randn(n, 8, frames, dtype=torch.float64)}


def picture_and_words(n: int) -> dict[str, Tensor]:
    """16 tokens that stand for the patches of a picture, then words."""
    tokens = torch.cat([torch.full((n, 16), 3), torch.randint(4, WORDS, (n, TOKENS))], dim=1)
    return {"input_ids": tokens, **images(32, name="pixel_values")(n)}


def picture_and_answer(n: int) -> dict[str, Tensor]:
    return {**images(32, name="pixel_values")(n), "decoder_input_ids": torch.randint(3, WORDS, (n, TOKENS))}


def spans(n: int) -> Tensor:
    return torch.randint(0, TOKENS, (n, 2))


def pixels(size: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randint(0, CLASSES, (n, size, size))


def _made(
    kind: str,
    head: str,
    inputs: Callable[[int], dict[str, Tensor]],
    targets: Callable[[int], Tensor],
    task: Task,
    sizes: dict[str, Any],
    title: str = "",
    shared: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
    adapted: str | list[str] = "all-linear",
    **options: Any,
) -> Architecture:
    """kind: a model type; head: what follows AutoModel, or a class; sizes, options: of the configuration;
    without: sizes that it does not take; adapted: what gets adapters."""

    def make() -> nn.Module:
        import transformers

        arguments = {name: value for name, value in {**sizes, **options}.items() if name not in without}
        config = transformers.AutoConfig.for_model(kind, **arguments)
        config._experts_implementation = "eager"  # the others have no fp64
        made = getattr(transformers, f"AutoModel{head}", None) or getattr(transformers, head)
        build = getattr(made, "from_config", None) or made._from_config
        model: nn.Module = build(config)
        return model

    name = title or f"{kind} {head.removeprefix('For')}".strip()
    return Architecture(
        "transformers", name, make, inputs, targets, task, shared or {}, targets_of_adapters=adapted
    )


def _classifier(kind: str, inputs: Any = words, **options: Any) -> Architecture:
    return _made(kind, "ForSequenceClassification", inputs, classes(), CLASS, _SIZES, **options)


def _tagger(kind: str, inputs: Any = words, **options: Any) -> Architecture:
    return _made(kind, "ForTokenClassification", inputs, labelled_tokens(), TOKEN, _SIZES, **options)


def _masked(kind: str, inputs: Any = words, **options: Any) -> Architecture:
    return _made(kind, "ForMaskedLM", inputs, labelled_tokens(WORDS), TOKEN, _SIZES, **options)


def _causal(kind: str, inputs: Any = words, **options: Any) -> Architecture:
    return _made(kind, "ForCausalLM", inputs, labelled_tokens(WORDS), CAUSAL, _SIZES, **options)


def _seq2seq(kind: str, sizes: dict[str, Any] = _D_MODEL, **options: Any) -> Architecture:
    return _made(kind, "ForSeq2SeqLM", pairs, labelled_tokens(WORDS), TOKEN, sizes, **options)


def _images(kind: str, sizes: dict[str, Any] = _VIT, size: int = 32, **options: Any) -> Architecture:
    return _made(
        kind, "ForImageClassification", images(size, name="pixel_values"), classes(), CLASS, sizes, **options
    )


def _segmented(
    kind: str, head: str, sizes: dict[str, Any], size: int, of_logits: int, **options: Any
) -> Architecture:
    return _made(kind, head, images(size, name="pixel_values"), pixels(of_logits), PIXELS, sizes, **options)


def _detector(
    kind: str, sizes: dict[str, Any], size: int = 32, none: int = 1, **options: Any
) -> Architecture:
    """none: whether the last class means that there is no object."""
    targets = labelled_tokens(CLASSES + none, 6)
    return _made(
        kind, "ForObjectDetection", images(size, name="pixel_values"), targets, QUERIES, sizes, **options
    )


def _heard(kind: str, inputs: Any = speech, **options: Any) -> Architecture:
    return _made(kind, "ForAudioClassification", inputs, classes(), CLASS, _SPEECH, **options)


ANSWERS = Task("class", class_loss, own=None)  # its own loss takes a score for every answer
PROMPTS = torch.randint(3, WORDS, (CLASSES, TOKENS), generator=torch.Generator().manual_seed(5))
PROMPTS[:, -1] = END
_TWO_TOWERS = {"text_config": _TEXT, "vision_config": _VISION, "projection_dim": 8}
_BACKBONE = {
    "backbone_config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 16],
                        "depths": [1, 1, 1, 1], "out_features": ["stage4"]},
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_kwargs": None,
}  # fmt: skip


def _prompted(kind: str, **options: Any) -> Architecture:
    """Images against the prompts of the classes."""
    return _made(
        kind, "", images(32, name="pixel_values"), classes(), IMAGE_TEXT, {**_TWO_TOWERS, **options},
        title=f"{kind} with class prompts", shared={"input_ids": PROMPTS},
    )  # fmt: skip


ARCHITECTURES = [
    _classifier("bert"),
    _classifier("roberta"),
    _classifier("distilbert", dim=16, n_layers=2, n_heads=2, hidden_dim=32),
    _classifier("albert", embedding_size=8),
    _classifier("electra", embedding_size=8),
    _classifier("deberta", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    _classifier("deberta-v2", relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=4),
    _classifier(
        "deberta-v2",
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        share_att_key=True,
        title="deberta-v2, shared keys",
    ),
    _classifier("xlnet", without=("max_position_embeddings",), d_model=16, n_layer=2, n_head=2, d_inner=32),
    _classifier("mpnet"),
    _classifier("convbert", embedding_size=16, head_ratio=1),
    _classifier(
        "funnel",
        without=("num_hidden_layers",),
        block_sizes=[1, 1],
        d_model=16,
        n_head=2,
        d_head=8,
        d_inner=32,
        num_decoder_layers=1,
    ),
    _classifier("longformer", attention_window=8),
    _classifier("big_bird", attention_type="original_full"),
    _classifier("fnet", inputs=unpadded),
    _classifier("squeezebert", embedding_size=16),
    _classifier("mobilebert", embedding_size=16, true_hidden_size=8, intra_bottleneck_size=8),
    _classifier("roformer", embedding_size=16),
    _classifier("nystromformer", num_landmarks=8, segment_means_seq_len=8),
    _classifier("rembert", input_embedding_size=8, output_embedding_size=8),
    _classifier("ibert"),
    _classifier("modernbert", num_hidden_layers=3),
    _classifier("xlm", emb_dim=16, n_layers=2, n_heads=2),
    _classifier("luke", entity_vocab_size=10, entity_emb_size=8),
    _classifier("esm", position_embedding_type="rotary", mask_token_id=3),
    _classifier("llama"),
    _classifier("gpt2", n_embd=16, n_layer=2, n_head=2),
    _classifier(
        "perceiver",
        d_model=16,
        d_latents=16,
        num_latents=4,
        num_blocks=1,
        num_self_attends_per_block=1,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
    ),
    _tagger("bert"),
    _tagger("deberta-v2"),
    _tagger("distilbert", dim=16, n_layers=2, n_heads=2, hidden_dim=32),
    _masked("bert"),
    _masked("roberta"),
    _masked("albert", embedding_size=8),
    _masked("modernbert"),
    _made("bert", "ForQuestionAnswering", words, spans, SPAN, _SIZES, num_labels=2),
    _made(
        "bert",
        "ForMultipleChoice",
        lambda n: {k: v.view(n, 2, TOKENS) for k, v in words(2 * n).items()},
        classes(2),
        CLASS,
        _SIZES,
    ),
    _causal("gpt2", n_embd=16, n_layer=2, n_head=2),
    _causal("gpt_neo", num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]),
    _causal("gpt_neox"),
    _causal("gptj", n_embd=16, n_layer=2, n_head=2, rotary_dim=4),
    _causal("codegen", hidden_size=32, num_attention_heads=4, n_inner=32, rotary_dim=4),
    _causal("opt", ffn_dim=32, word_embed_proj_dim=8),
    _causal("bloom", n_layer=2, n_head=2),
    _causal("mpt", d_model=16, n_heads=2, n_layers=2, max_seq_len=32),
    _causal("falcon", new_decoder_architecture=False, multi_query=True),
    _causal("llama", num_key_value_heads=1),
    _causal("mistral", num_key_value_heads=1),
    _causal("qwen2", num_key_value_heads=2),
    _causal("qwen3", num_key_value_heads=2, head_dim=8),
    _causal("phi", num_key_value_heads=2),
    _causal("phi3", num_key_value_heads=2),
    _causal("gemma", num_key_value_heads=1, head_dim=8),
    _causal("gemma2", num_key_value_heads=1, head_dim=8),
    _causal("gemma3_text", num_key_value_heads=1, head_dim=8),
    _causal("stablelm", num_key_value_heads=2),
    _causal("cohere", num_key_value_heads=2),
    _causal("olmo2", num_key_value_heads=2),
    _causal("starcoder2", num_key_value_heads=2),
    _causal("persimmon"),
    _causal("biogpt"),
    _causal("openai-gpt", n_embd=16, n_layer=2, n_head=2, n_positions=32),
    *(_causal(kind, **options) for kind, options in _MIXTURES.items()),
    *(
        _causal(kind, **options, title=f"{kind} CausalLM, experts", adapted=["experts"])
        for kind, options in _MIXTURES.items()
    ),
    _causal("mamba", inputs=unpadded, state_size=4, time_step_rank=4),
    _causal("mamba2", inputs=unpadded, state_size=4, num_heads=4, head_dim=8, n_groups=1, chunk_size=4),
    _causal("falcon_mamba", inputs=unpadded, state_size=4, time_step_rank=4),
    _causal("recurrent_gemma", lru_width=16, num_key_value_heads=1, attention_window_size=8),
    _causal("rwkv", inputs=unpadded, attention_hidden_size=16, context_length=32),
    _seq2seq("t5", _T5),
    _seq2seq("t5", _T5, feed_forward_proj="gated-gelu", title="t5 v1.1"),
    _seq2seq("longt5", _T5, local_radius=2, encoder_attention_type="transient-global", global_block_size=2),
    _seq2seq("bart"),
    _seq2seq("mbart"),
    _seq2seq("marian", decoder_vocab_size=WORDS),
    _seq2seq("pegasus"),
    _seq2seq("blenderbot"),
    _seq2seq("m2m_100"),
    _seq2seq(
        "led", attention_window=[8, 8], max_encoder_position_embeddings=32, max_decoder_position_embeddings=32
    ),
    _images("vit"),
    _made(
        "deit",
        "DeiTForImageClassification",
        images(32, name="pixel_values"),
        classes(),
        CLASS,
        _VIT,
        title="deit ImageClassification",
    ),
    _images("beit"),
    _images("data2vec-vision"),
    _images("dinov2", mlp_ratio=2),
    _made("dinov3_vit", "", images(32, name="pixel_values"), classes(), FEATURES, _VISION),
    _images("vit_msn"),
    _images("swin", _SWIN),
    _images("swinv2", _SWIN),
    _images("donut-swin", _SWIN),
    _images("convnext", _STAGES),
    _images("pvt", {**_STAGES, "num_encoder_blocks": 4, "num_attention_heads": [1, 1, 2, 2]}),
    _images("pvt_v2", {**_STAGES, "num_attention_heads": [1, 1, 2, 2]}, sr_ratios=[8, 4, 2, 1]),
    _images("segformer", {**_STAGES, "decoder_hidden_size": 8}),
    _made(
        "levit",
        "LevitForImageClassification",
        images(64, name="pixel_values"),
        classes(),
        CLASS,
        {
            "num_labels": CLASSES,
            "image_size": 64,
            "hidden_sizes": [8, 16, 16],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [4, 4, 4],
            "drop_path_rate": 0,
        },
        title="levit ImageClassification",
    ),
    _images(
        "hiera",
        {
            "num_labels": CLASSES,
            "image_size": [64, 64],
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 2, 2],
        },
        size=64,
    ),
    _images(
        "mobilevit",
        {
            **_STAGES,
            "image_size": 64,
            "hidden_sizes": [8, 8, 16],
            "neck_hidden_sizes": [4, 8, 8, 8, 8, 8, 16],
            "num_attention_heads": 2,
        },
        size=64,
    ),
    _images(
        "focalnet",
        {
            "num_labels": CLASSES,
            "image_size": 32,
            "embed_dim": 8,
            "hidden_sizes": [8, 8, 16, 16],
            "depths": [1, 1, 1, 1],
        },
    ),
    _images(
        "resnet",
        {"num_labels": CLASSES, "embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]},
    ),
    _images("clip", {**_TWO_TOWERS, "num_labels": CLASSES}),
    _images("siglip", {"vision_config": _VISION, "text_config": _TEXT, "num_labels": CLASSES}),
    _segmented("segformer", "ForSemanticSegmentation", {**_STAGES, "decoder_hidden_size": 8}, 32, 8),
    _segmented(
        "beit",
        "ForSemanticSegmentation",
        {
            **_VIT,
            "num_hidden_layers": 4,
            "out_indices": [1, 2, 3, 4],
            "use_auxiliary_head": False,
            "pool_scales": [1, 2],
        },
        32,
        16,
    ),
    _segmented(
        "dpt",
        "ForSemanticSegmentation",
        {
            **_VIT,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 8,
            "use_auxiliary_head": False,
        },
        32,
        64,
    ),
    _detector("detr", {**_D_MODEL, **_BACKBONE, "num_queries": 6}),
    _detector("conditional_detr", none=0, sizes={**_D_MODEL, **_BACKBONE, "num_queries": 6}),
    _detector("table-transformer", {**_D_MODEL, **_BACKBONE, "num_queries": 6}),
    _detector("yolos", {**_VIT, "image_size": [32, 32], "num_detection_tokens": 6}),
    _heard("wav2vec2"),
    _heard("hubert"),
    _heard("wavlm"),
    _heard("unispeech"),
    _heard("sew", squeeze_factor=2),
    _heard("wav2vec2-conformer"),
    _heard("data2vec-audio", conv_pos_kernel_size=3),
    _made(
        "wav2vec2", "ForCTC", speech, labelled_tokens(WORDS, 9), QUERIES, _SPEECH, title="wav2vec2 CTC frames"
    ),
    _heard(
        "whisper",
        inputs=mel(32),
        **{**_D_MODEL, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
    ),
    _made(
        "whisper",
        "ForSpeechSeq2Seq",
        lambda n: {**mel(32)(n), "decoder_input_ids": torch.randint(3, WORDS, (n, TOKENS))},
        labelled_tokens(WORDS),
        TOKEN,
        {
            **_D_MODEL,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 16,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
    _heard(
        "audio-spectrogram-transformer",
        inputs=lambda n: {"input_values": torch.randn(n, 24, 16, dtype=torch.float64)},
        patch_size=8,
        max_length=24,
        num_mel_bins=16,
        frequency_stride=8,
        time_stride=8,
    ),
    _prompted("clip"),
    _prompted("siglip", text_config={**_TEXT, "max_position_embeddings": TOKENS}),
    _prompted("altclip"),
    _prompted("clipseg"),
    _made(
        "vilt",
        "ViltForQuestionAnswering",
        lambda n: {**words(n), **images(32, name="pixel_values")(n)},
        classes(),
        ANSWERS,
        {**_SIZES, **_VIT},
    ),
    _made(
        "llava",
        "LlavaForConditionalGeneration",
        picture_and_words,
        labelled_tokens(WORDS, 16 + TOKENS),
        CAUSAL,
        {
            "vision_config": {**_VISION, "model_type": "clip_vision_model"},
            "text_config": {**_TEXT, "model_type": "llama"},
            "image_token_index": 3,
            "vision_feature_layer": -1,
        },
        title="llava",
    ),
    _made(
        "vision-encoder-decoder",
        "VisionEncoderDecoderModel",
        picture_and_answer,
        labelled_tokens(WORDS),
        TOKEN,
        {
            "encoder": {**_VISION, "model_type": "vit"},
            "decoder": {**_TEXT, "model_type": "gpt2", "add_cross_attention": True, "is_decoder": True},
        },
        title="vision-encoder-decoder",
    ),
    _made("clip_vision_model", "", images(32, name="pixel_values"), classes(), FEATURES, _VISION),
]
