# SPDX-License-Identifier: Apache-2.0
"""Pretrained language models of transformers, from a folder with their files, as frozen backbones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused_ewclora.demo.formats import DataError
from fused_ewclora.errors import IntegrationError
from fused_ewclora.integrations._library import require

from ..extras import prepare_torchvision
from .answers import DecoderOnly, EncoderDecoder, Writer
from .prompts import Vocabulary

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FILES = ("config.json", "tokenizer.json")


def transformers() -> Any:
    """The library; raises `DataError` where it is not installed."""
    try:
        require("transformers")
    except IntegrationError as error:
        raise DataError(f"model: {error}") from error
    prepare_torchvision()  # transformers imports it for images
    import transformers as library

    return library


def load(root: Path, model: str, dtype: str = "float32", separator: str = "") -> tuple[Writer, Vocabulary]:
    """A model from the folder `root/model`, and its tokens; separator: see `Vocabulary`.

    The folder has config.json, tokenizer.json and the weights (*.safetensors), as on the model hub. Raises
    `DataError` for a folder without them, and for weights that lack a parameter of the model.

        >>> load(Path("data"), "t5-large")
    """
    library = transformers()
    if dtype not in DTYPES:
        raise DataError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    folder = root / model
    for file in FILES:
        if not (folder / file).is_file():
            raise DataError(
                f"model: {folder}: expected config.json, tokenizer.json and *.safetensors of a language "
                f"model, found no {file}; download them on a machine with network access"
            )
    try:
        settings = library.AutoConfig.from_pretrained(folder, local_files_only=True)
        kind = library.AutoModelForSeq2SeqLM if settings.is_encoder_decoder else library.AutoModelForCausalLM
        with torch.random.fork_rng(devices=[]):
            network, report = kind.from_pretrained(
                folder,
                config=settings,
                local_files_only=True,
                use_safetensors=True,
                dtype=DTYPES[dtype],
                output_loading_info=True,
            )
    except Exception as error:  # damaged files, unknown architectures: the library can raise almost any
        raise DataError(f"model: {folder}: cannot be loaded: {type(error).__name__}: {error}") from error
    if lacking := sorted(report["missing_keys"]):
        raise DataError(f"model: {folder}: the weights lack {lacking[0]} ({len(lacking)} tensors in all)")
    return made(network, tokenizer(folder / "tokenizer.json"), separator)


def tokenizer(file: Path) -> Any:
    """The tokens of a model from its tokenizer.json."""
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain exceptions
        raise DataError(f"model: {file}: not readable: {error}") from error
    found.no_truncation()
    found.no_padding()
    return found


def made(network: Any, tokens: Any, separator: str = "") -> tuple[Writer, Vocabulary]:
    """The backbone of a network of transformers, in eval mode, and its tokens."""
    settings = network.config
    end = _first(settings.eos_token_id)
    if end is None:
        raise DataError("model: expected a token that ends texts (eos_token_id), found none")
    pad = settings.pad_token_id if settings.pad_token_id is not None else end
    if settings.is_encoder_decoder and settings.decoder_start_token_id is None:
        raise DataError("model: expected a token that starts answers (decoder_start_token_id), found none")
    # Without the settings of chats, such as sampling at a temperature.
    network.generation_config = transformers().GenerationConfig(
        bos_token_id=getattr(settings, "bos_token_id", None),
        decoder_start_token_id=getattr(settings, "decoder_start_token_id", None),
        eos_token_id=end,
        pad_token_id=pad,
    )
    backbone: nn.Module = (EncoderDecoder if settings.is_encoder_decoder else DecoderOnly)(network)
    left = not settings.is_encoder_decoder
    return backbone.eval(), Vocabulary(tokens, end, pad, left, separator)  # type: ignore[return-value]


def _first(value: int | list[int] | None) -> int | None:
    """Models of chats have several tokens that end an answer; the first one ends a text."""
    return value[0] if isinstance(value, list) else value
