# SPDX-License-Identifier: Apache-2.0
"""CLIP of open_clip and of transformers as frozen towers, with their tokenizers and their normalisation."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_ewclora.demo.formats import DataError

from ..extras import prepare_torchvision
from .clip_learner import Towers
from .image_transforms import Statistics

LIBRARIES = {"open_clip": "open_clip_torch", "transformers": "transformers"}
OPEN_CLIP_CONFIGURATION = "open_clip_config.json"
CONFIGURATION, PREPROCESSING = "config.json", "preprocessor_config.json"


@dataclass(frozen=True)
class Model:
    """Frozen towers in eval mode; tokenize: texts -> `[K, T]` int64, longer ones cut off; image_size: side of
    images; statistics: mean and standard deviation of their channels."""

    towers: Towers
    tokenize: Callable[[Sequence[str]], Tensor]
    image_size: int
    statistics: Statistics


class OpenClip(Towers):
    """A model of open_clip; layers have its names, as `network.visual.transformer.resblocks.0.attn`."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        if getattr(network, "logit_scale", None) is None or getattr(network, "logit_bias", None) is not None:
            raise DataError(
                "model: expected one that was trained with the softmax loss of CLIP, with a logit_scale and "
                f"without a logit_bias, got {type(network).__name__}"
            )
        self.network = network

    def encode_image(self, images: Tensor) -> Tensor:
        features: Tensor = self.network.encode_image(images)
        return features

    def encode_text(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.network.encode_text(tokens)
        return features

    def scale(self) -> Tensor:
        factor: Tensor = self.network.logit_scale.exp()
        return factor


class HuggingFace(Towers):
    """A `CLIPModel` of transformers; layers have its names, as
    `network.text_model.encoder.layers.0.self_attn.q_proj`.

    Tokens after the end of a text are not masked: attention is causal, and the end is what is read.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def encode_image(self, images: Tensor) -> Tensor:
        return _pooled(self.network.get_image_features(pixel_values=images))

    def encode_text(self, tokens: Tensor) -> Tensor:
        return _pooled(self.network.get_text_features(input_ids=tokens))

    def scale(self) -> Tensor:
        factor: Tensor = self.network.logit_scale.exp()
        return factor


def make(root: Path, library: str, model: str, pretrained: bool | str, seed: int) -> Model:
    """A model of one of `LIBRARIES`.

    open_clip: model is a name that it knows, or a folder in `root` with its open_clip_config.json, and
    pretrained a tag that it downloads ("openai"), the path of a checkpoint, relative to `root`, or False for
    random weights, drawn with the seed. transformers: model is a folder in `root`, or a name on the model
    hub, with config.json, preprocessor_config.json and the files of the tokenizer, and pretrained true for
    its weights or false for random ones. Raises `DataError`.
    """
    if library not in LIBRARIES:
        raise DataError(f"library: expected one of {', '.join(LIBRARIES)}, got {library!r}")
    if not isinstance(model, str) or not model:
        raise DataError(f"model: expected a name or a folder in {root}, got {model!r}")
    module = imported(library)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        makers = {"open_clip": _open_clip, "transformers": _hugging_face}
        made = makers[library](module, root, model, pretrained)
    made.towers.requires_grad_(False).eval()
    return made


def imported(library: str) -> Any:
    """The module of a library; raises `DataError` where it is missing."""
    prepare_torchvision()
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise DataError(
            f"library: {library} is needed (pip install {LIBRARIES[library]} torchvision): {error}"
        ) from error


def _open_clip(module: Any, root: Path, model: str, pretrained: bool | str) -> Model:
    if pretrained is True or not isinstance(pretrained, (bool, str)):
        raise DataError(
            f"pretrained: expected a tag of open_clip, the path of a checkpoint or false, got {pretrained!r}"
        )
    name = model
    if (root / model / OPEN_CLIP_CONFIGURATION).is_file():
        name = f"local-dir:{root / model}"
    elif model not in module.list_models():
        raise DataError(
            f"model: expected a name that open_clip {module.__version__} knows, or a folder in {root} with "
            f"{OPEN_CLIP_CONFIGURATION}, got {model!r}"
        )
    is_tag = isinstance(pretrained, str) and name == model and not (root / pretrained).is_file()
    if is_tag:
        _check_tag(module, model, str(pretrained), root)
    try:
        network = _quietly(module.create_model, name, pretrained if is_tag else None, load_weights=is_tag)
        tokenizer = module.get_tokenizer(name)
    except Exception as error:  # of the hub client, HTTP or files: a download can fail in many ways
        raise DataError(
            f"model: {model}, pretrained: {pretrained}: open_clip cannot make it ({type(error).__name__}: "
            f"{error}). Without network access, give the path of open_clip_model.safetensors as pretrained"
        ) from error
    if isinstance(pretrained, str) and not is_tag:
        _fill(module, network, root / pretrained)
    settings = network.visual.preprocess_cfg
    return Model(
        OpenClip(network), tokenizer, _side(network.visual.image_size),
        (tuple(settings["mean"]), tuple(settings["std"])),
    )  # fmt: skip


def _check_tag(module: Any, model: str, tag: str, root: Path) -> None:
    """Whether open_clip has weights of this name for the model, which were trained with its activation."""
    if tag not in (tags := module.list_pretrained_tags_by_model(model)):
        raise DataError(
            f"pretrained: expected one of {', '.join(tags) or 'no tag'} for {model}, or the path of a "
            f"checkpoint in {root}, got {tag!r}"
        )
    trained = bool(module.get_pretrained_cfg(model, tag).get("quick_gelu", False))
    if trained != bool(module.get_model_config(model).get("quick_gelu", False)):
        other = f"{model}-quickgelu" if trained else model.removesuffix("-quickgelu")
        raise DataError(
            f"model: the weights {tag} were trained with another activation; expected {other}, got {model}"
        )


def _fill(module: Any, network: nn.Module, file: Path) -> None:
    if not file.is_file():
        raise DataError(f"pretrained: expected a checkpoint, found no file {file}")
    try:
        module.load_checkpoint(network, str(file))
    except Exception as error:  # a damaged or unrelated file can raise almost any exception
        raise DataError(
            f"pretrained: {file}: not a checkpoint of {type(network).__name__}: {type(error).__name__}: "
            f"{str(error)[:300]}"
        ) from error


def _hugging_face(module: Any, root: Path, model: str, pretrained: bool | str) -> Model:
    if not isinstance(pretrained, bool):
        raise DataError(f"pretrained: expected true or false for transformers, got {pretrained!r}")
    source: str = model
    if (folder := root / model).is_dir():
        for name in (CONFIGURATION, PREPROCESSING):
            if not (folder / name).is_file():
                raise DataError(f"{folder}: expected a model of transformers, found no {name}")
        source = str(folder)
    try:
        settings = module.CLIPConfig.from_pretrained(source)
        network = module.CLIPModel(settings)
        missing: Sequence[str] = ()
        if pretrained:
            network, report = module.CLIPModel.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True
            )
            missing = sorted(report["missing_keys"])
        tokenizer = module.CLIPTokenizer.from_pretrained(source)
        images = module.AutoImageProcessor.from_pretrained(source)
    except Exception as error:  # of the hub client, HTTP or files
        raise DataError(
            f"model: {model}: transformers cannot load it ({type(error).__name__}: {str(error)[:300]}). "
            f"Without network access, put its files into {folder}"
        ) from error
    if missing:
        raise DataError(f"model: {model}: its weights lack {missing[0]} ({len(missing)} tensors in all)")
    length = int(settings.text_config.max_position_embeddings)

    def tokenize(texts: Sequence[str]) -> Tensor:
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        tokens: Tensor = tokenizer(list(texts), **options).input_ids
        return tokens

    statistics = (tuple(images.image_mean), tuple(images.image_std))
    return Model(HuggingFace(network), tokenize, int(settings.vision_config.image_size), statistics)


def _pooled(features: Any) -> Tensor:
    """Features `[N, d]`, which transformers 5 returns inside an object."""
    pooled: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return pooled


def _side(size: Any) -> int:
    sides = {int(side) for side in (size if isinstance(size, (tuple, list)) else (size,))}
    if len(sides) != 1:
        raise DataError(f"model: expected one of square images, got {size!r}")
    return sides.pop()


def _quietly(make: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Without the warning that a model has random weights, which are asked for or filled in later."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return make(*arguments, **options)
    finally:
        logging.disable(before)
