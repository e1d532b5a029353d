"""transformers."""
from __future__ import annotations

from typing import Any

import torch

from .architecture import CAUSAL, CLASS, CLASSES, TOKEN, TOKENS, Architecture, classes, images, labelled_tokens

WORDS = 40
_SIZES = dict(
    vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=32, pad_token_id=0, num_labels=CLASSES,
)


def words(n: int) -> dict:
    return {"input_ids": torch.randint(3, WORDS, (n, TOKENS)), "attention_mask": torch.ones(n, TOKENS, dtype=torch.long)}


def _text(kind: str, head: str, task, targets, **options: Any) -> Architecture:
    def make():
        import transformers

        config = transformers.AutoConfig.for_model(kind, **{**_SIZES, **options})
        return getattr(transformers, f"AutoModelFor{head}").from_config(config)
    return Architecture("transformers", f"{kind} {head}", make, words, targets, task)

def _classifier(kind: str, **options: Any) -> Architecture:
    return _text(kind, "SequenceClassification", CLASS, classes(), **options)

def _causal(kind, **options):
    return _text(kind, "CausalLM", CAUSAL, labelled_tokens(WORDS), **options)

ARCHITECTURES = [
    _classifier("bert"),
    _text("bert", "TokenClassification", TOKEN, labelled_tokens()),
    _causal("llama"),
    _causal("mixtral", num_key_value_heads=2, num_local_experts=4),
    _classifier("longformer", attention_window=8),
    _causal("gpt2"),
]
