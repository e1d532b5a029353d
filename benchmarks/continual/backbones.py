"""Pretrained vision transformers of timm as frozen feature extractors."""

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
CLASSIFIERS = ("head.", "head_dist.", "fc.", "pre_logits.")


class Backbone(nn.Module):
    """Maps images `[N, 3, S, S]` to the features `[N, dim]` that a model of timm gives its classifier."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.dim: int = network.num_features  # type: ignore[assignment]
        self.pretrained_config: dict[str, Any] = dict(network.pretrained_cfg)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images)
        return features


def make(root: Path, model: str, image_size: int, pretrained: bool | str, seed: int) -> Backbone:
    """A model by its name in timm, without classifier, frozen and in eval mode.

    pretrained: True for timm's own weights, which it downloads once; the path of a .safetensors or PyTorch
    checkpoint, relative to `root`, whose position embedding is resized where needed; or False for random
    weights, drawn with the seed. Raises `DataError` for an unknown model and for weights that are missing,
    cannot be read or do not fit.
    """
    timm = _timm()
    if not timm.is_model(model):
        raise DataError(f"model: expected the name of a model of timm {timm.__version__}, got {model!r}")
    if not isinstance(pretrained, (bool, str)):
        raise DataError(f"pretrained: expected true, false or the path of a checkpoint, got {pretrained!r}")
    options = {"num_classes": 0, "img_size": image_size}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network = timm.create_model(model, pretrained=False, **options)
        except (TypeError, RuntimeError) as error:  # a network without img_size, an unknown tag
            raise DataError(f"model: {model!r} cannot be made: {error}") from error
        if pretrained is True:
            network = _downloaded(timm, model, options)
    if isinstance(pretrained, str):
        _fill(timm, network, root / pretrained)
    return Backbone(network).requires_grad_(False).eval()


def _timm() -> Any:
    try:
        return extras.load("timm")
    except extras.Unavailable as error:
        raise DataError(
            f"model: image problems need timm and torchvision (pip install timm torchvision): {error}"
        ) from error


def _downloaded(timm: Any, model: str, options: dict[str, Any]) -> nn.Module:
    try:
        network: nn.Module = timm.create_model(model, pretrained=True, **options)
    except Exception as error:  # of the hub client, HTTP or files: a download can fail in many ways
        config = timm.get_pretrained_cfg(model)
        source = config.hf_hub_id if config is not None and config.hf_hub_id else "no source known to timm"
        raise DataError(
            f"pretrained: the weights of {model} could not be downloaded ({type(error).__name__}). timm "
            f"loads them from the model hub ({source}); download model.safetensors on a machine with network "
            "access, and give the file as pretrained"
        ) from error
    return network


def _fill(timm: Any, network: nn.Module, file: Path) -> None:
    """Loads all weights of the network from a checkpoint that has no others, except for a classifier."""
    if not file.is_file():
        raise DataError(f"pretrained: expected a checkpoint, found no file {file}")
    try:
        state = timm.models.load_state_dict(str(file), device="cpu", weights_only=True)
        state = _converter(network)(state, network)
    except Exception as error:  # a damaged or unrelated file can raise almost any exception
        raise DataError(
            f"pretrained: {file}: not a readable checkpoint: {type(error).__name__}: {error}"
        ) from error
    try:
        missing, unexpected = network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise DataError(f"pretrained: {file}: shapes do not fit: {str(error)[-300:]}") from error
    unexpected = [name for name in unexpected if not name.startswith(CLASSIFIERS)]
    for words, names in (("lacks", missing), ("also has", unexpected)):
        if names:
            raise DataError(
                f"pretrained: {file}: expected weights of {type(network).__name__}, but it {words} "
                f"{names[0]} ({len(names)} tensors in all)"
            )


def _converter(network: nn.Module) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]:
    """timm's own conversion of published checkpoints, which also resizes position embeddings."""
    module = importlib.import_module(type(network).__module__)
    return getattr(module, "checkpoint_filter_fn", lambda state, _: state)
