# SPDX-License-Identifier: Apache-2.0
"""Pretrained vision transformers of timm, torchvision, transformers and open_clip as frozen extractors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_ewclora.demo.formats import DataError

from .. import extras

# Parts of checkpoints that do not contribute to features: classifiers, and a layer before them in early ones.
CLASSIFIERS = ("head.", "head_dist.", "heads.", "fc.", "pre_logits.", "classifier.")
CLIP_NORMALISATION = {  # of the published weights of CLIP
    "mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711),
}  # fmt: skip
IMAGENET_NORMALISATION = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class Backbone(nn.Module):
    """Maps images `[N, 3, S, S]` to the features `[N, dim]` that a model gives its classifier.

    pretrained_config: "mean" and "std" of the images that the weights were trained on.
    """

    def __init__(
        self,
        network: nn.Module,
        dim: int,
        pretrained_config: dict[str, Any],
        features: Callable[[Any], Tensor] = lambda output: output,
    ) -> None:
        super().__init__()
        self.network, self.dim, self.pretrained_config = network, dim, pretrained_config
        self._features = features

    def forward(self, images: Tensor) -> Tensor:
        return self._features(self.network(images))


def make(root: Path, model: str, image_size: int, pretrained: bool | str, seed: int) -> Backbone:
    """A model by its name, without classifier, frozen and in eval mode: one of timm, or
    "torchvision:vit_b_16", "transformers:google/vit-base-patch16-224-in21k", "open_clip:ViT-B-16" (the image
    tower).

    pretrained: True for the library's own weights, which it downloads once; the path of a .safetensors or
    PyTorch checkpoint, relative to `root`, whose position embedding timm resizes where needed (for
    transformers: the folder of `save_pretrained`); or False for random weights, drawn with the seed. Raises
    `DataError` for an unknown model and for weights that are missing, cannot be read or do not fit.
    """
    if not isinstance(pretrained, (bool, str)):
        raise DataError(f"pretrained: expected true, false or the path of a checkpoint, got {pretrained!r}")
    library, _, name = model.rpartition(":") if ":" in str(model) else ("timm", "", model)
    if library not in LIBRARIES:
        known = ", ".join(LIBRARIES)
        raise DataError(f"model: expected a name of timm or LIBRARY:NAME of {known}, got {model!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = LIBRARIES[library](root, name, image_size, pretrained)
    return backbone.requires_grad_(False).eval()


def _timm_model(root: Path, model: str, image_size: int, pretrained: bool | str) -> Backbone:
    timm = _library("timm")
    if not timm.is_model(model):
        raise DataError(f"model: expected the name of a model of timm {timm.__version__}, got {model!r}")
    options = {"num_classes": 0, "img_size": image_size}
    try:
        network = timm.create_model(model, pretrained=False, **options)
    except (TypeError, RuntimeError) as error:  # a network without img_size, an unknown tag
        raise DataError(f"model: {model!r} cannot be made: {error}") from error
    if pretrained is True:
        config = timm.get_pretrained_cfg(model)
        source = config.hf_hub_id if config is not None and config.hf_hub_id else "no source known to timm"
        network = _downloaded(model, source, lambda: timm.create_model(model, pretrained=True, **options))
    if isinstance(pretrained, str):
        _fill(network, root / pretrained, lambda file: _converted(timm, network, file))
    return Backbone(network, network.num_features, dict(network.pretrained_cfg))


def _torchvision_model(root: Path, model: str, image_size: int, pretrained: bool | str) -> Backbone:
    models = _library("torchvision").models
    if model not in models.list_models():
        raise DataError(f"model: expected the name of a model of torchvision, got {model!r}")
    options = {"image_size": image_size} if model.startswith("vit_") else {}
    network = models.get_model(model, weights=None, **options)
    if pretrained is True:
        network = _downloaded(
            model, "download.pytorch.org", lambda: models.get_model(model, weights="DEFAULT", **options)
        )
    if isinstance(pretrained, str):
        _fill(network, root / pretrained, _state)
    for name in ("heads", "head", "fc", "classifier"):
        if isinstance(classifier := getattr(network, name, None), nn.Module):
            last = [layer for layer in classifier.modules() if isinstance(layer, nn.Linear)]
            setattr(network, name, nn.Identity())
            return Backbone(network, last[0].in_features, dict(IMAGENET_NORMALISATION))
    raise DataError(f"model: torchvision:{model}: expected a classifier called heads, head, fc or classifier")


def _transformers_model(root: Path, model: str, image_size: int, pretrained: bool | str) -> Backbone:
    transformers = _library("transformers")
    folder = root / (pretrained if isinstance(pretrained, str) else model)
    if isinstance(pretrained, str) and not folder.is_dir():
        raise DataError(f"pretrained: expected a folder of save_pretrained, found no {folder}")
    place = str(folder) if folder.is_dir() else model

    def load() -> nn.Module:
        config = transformers.AutoConfig.from_pretrained(place, image_size=image_size)
        if pretrained is False:
            made: nn.Module = transformers.AutoModel.from_config(config)
            return made
        options = {"config": config, "ignore_mismatched_sizes": False}
        loaded: nn.Module = transformers.AutoModel.from_pretrained(place, **options)
        return loaded

    network = _downloaded(model, place, load)
    dim = getattr(network.config, "hidden_size", None)
    if not isinstance(dim, int):
        raise DataError(f"model: transformers:{model}: expected a vision transformer with a hidden_size")
    statistics = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # of the processors of ViT
    return Backbone(network, dim, statistics, _class_token)


def _class_token(output: Any) -> Tensor:
    """The first token after the last layer norm, which the classifiers of ViT read."""
    token: Tensor = output.last_hidden_state[:, 0]
    return token


def _open_clip_model(root: Path, model: str, image_size: int, pretrained: bool | str) -> Backbone:
    open_clip = _library("open_clip")
    if model not in open_clip.list_models():
        raise DataError(f"model: expected the name of a model of open_clip, got {model!r}")
    options = {"force_image_size": image_size}
    whole = open_clip.create_model(model, pretrained=None, **options)
    if pretrained is True:
        tags = open_clip.list_pretrained_tags_by_model(model)
        tag = "openai" if "openai" in tags else tags[0] if tags else ""
        whole = _downloaded(
            model, f"tag {tag!r}", lambda: open_clip.create_model(model, pretrained=tag, **options)
        )
    if isinstance(pretrained, str):
        _fill(whole, root / pretrained, _state)
    return Backbone(whole.visual, whole.visual.output_dim, dict(CLIP_NORMALISATION))


LIBRARIES: dict[str, Callable[[Path, str, int, bool | str], Backbone]] = {
    "timm": _timm_model,
    "torchvision": _torchvision_model,
    "transformers": _transformers_model,
    "open_clip": _open_clip_model,
}


def _library(name: str) -> Any:
    try:
        if name in extras.DISTRIBUTIONS:
            return extras.load(name)
        extras.prepare_torchvision()
        return importlib.import_module(name)
    except (extras.Unavailable, ImportError) as error:
        package = {"open_clip": "open_clip_torch"}.get(name, name)
        raise DataError(
            f"model: image problems need {name} and torchvision (pip install {package} torchvision): {error}"
        ) from error


def _downloaded(model: str, source: str, load: Callable[[], nn.Module]) -> nn.Module:
    try:
        return load()
    except Exception as error:  # of the hub client, HTTP or files: a download can fail in many ways
        raise DataError(
            f"pretrained: {model} could not be loaded ({type(error).__name__}) from {source}. Download its "
            "checkpoint on a machine with network access, and give the file as pretrained"
        ) from error


def _state(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint."""
    if file.suffix == ".safetensors":
        state: dict[str, Tensor] = importlib.import_module("safetensors.torch").load_file(str(file))
        return state
    found = torch.load(file, map_location="cpu", weights_only=True)
    return found.get("state_dict", found) if isinstance(found, dict) else found


def _converted(timm: Any, network: nn.Module, file: Path) -> dict[str, Tensor]:
    """With timm's own conversion of published checkpoints, which also resizes position embeddings."""
    state = timm.models.load_state_dict(str(file), device="cpu", weights_only=True)
    module = importlib.import_module(type(network).__module__)
    convert = getattr(module, "checkpoint_filter_fn", lambda state, _: state)
    converted: dict[str, Tensor] = convert(state, network)
    return converted


def _fill(network: nn.Module, file: Path, read: Callable[[Path], dict[str, Tensor]]) -> None:
    """Loads all weights of the network from a checkpoint that has no others, except for a classifier."""
    if not file.is_file():
        raise DataError(f"pretrained: expected a checkpoint, found no file {file}")
    try:
        state = read(file)
    except Exception as error:  # a damaged or unrelated file can raise almost any exception
        raise DataError(
            f"pretrained: {file}: not a readable checkpoint: {type(error).__name__}: {error}"
        ) from error
    try:
        missing, unexpected = network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise DataError(f"pretrained: {file}: shapes do not fit: {str(error)[-300:]}") from error
    missing = [name for name in missing if not name.startswith(CLASSIFIERS)]
    unexpected = [name for name in unexpected if not name.startswith(CLASSIFIERS)]
    for words, names in (("lacks", missing), ("also has", unexpected)):
        if names:
            raise DataError(
                f"pretrained: {file}: expected weights of {type(network).__name__}, but it {words} "
                f"{names[0]} ({len(names)} tensors in all)"
            )
