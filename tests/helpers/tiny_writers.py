# SPDX-License-Identifier: Apache-2.0
"""Tiny language models of transformers with random weights, and tokens for them, in the files of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

SPECIAL = ["<pad>", "</s>", "<s>"]
TEXTS = ["World Sports Business Science or Technology", "abc 1 2 3 , Task TC Dataset agnews Option Answer"]


def tokenizer(kind: str) -> Tokenizer:
    """Pieces of words; prompts of T5 end with </s>, those of LLaMA begin with <s>."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    form = "$A </s>" if kind == "t5" else "<s> $A"
    made.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[(name, number) for number, name in enumerate(SPECIAL)]
    )
    return made


def network(kind: str, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "t5":
            return T5ForConditionalGeneration(
                T5Config(
                    vocab_size=300, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, dropout_rate=0.0,
                    pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
                    tie_word_embeddings=False,
                )
            ).eval()  # fmt: skip
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                pad_token_id=None, bos_token_id=2, eos_token_id=[1, 2],
            )
        ).eval()  # fmt: skip


def write_model(folder: Path, kind: str) -> None:
    """config.json, tokenizer.json and model.safetensors."""
    network(kind).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6}))
    tokenizer(kind).save(str(folder / "tokenizer.json"))
