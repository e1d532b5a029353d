# SPDX-License-Identifier: Apache-2.0
"""Models by name, small enough for a dry run: a model name of timm or torchvision, or a configuration file or
model type of transformers. Weights are random; nothing is downloaded."""

from __future__ import annotations

import difflib
import importlib.util
import os.path
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from . import _named_torchvision
from ._library import require
from ._named_torchvision import BATCH, Size

TOKENS = 8
SMALLEST_IMAGE = 32
LAYERS = 2  # of every stack of a shrunk transformers model
VOCABULARY = 1024
LIBRARIES = ("timm", "transformers", "torchvision")


@dataclass(frozen=True)
class NamedModel:
    """A model in eval mode, keyword arguments that it runs with, and a description of what was built."""

    library: str
    version: str
    model: nn.Module
    sample: Mapping[str, Tensor]
    built: str


def build(name: str, library: str | None = None, full: bool = False) -> NamedModel:
    """The model called `name` with the smallest input that it accepts; a transformers model also gets fewer
    layers and a smaller vocabulary. `full` leaves all sizes as they are.

    The name may begin with that of its library, as in "torchvision/vit_b_16"; else the first library that
    knows it is taken. Raises `ArgumentError` with similar names when there is no such model, and
    `IntegrationError` when its library is not installed.
    """
    prefix, _, rest = name.partition("/")
    if library is None and prefix in LIBRARIES and not os.path.exists(name):
        library, name = prefix, rest
    if library is not None:
        return _BUILDERS[library](name, full)
    installed = [candidate for candidate in LIBRARIES if importlib.util.find_spec(candidate) is not None]
    for candidate in installed or LIBRARIES[:1]:  # if none is installed, the error names what to install
        if _knows(candidate, name):
            return _BUILDERS[candidate](name, full)
    raise _unknown(name, installed)


def _knows(library: str, name: str) -> bool:
    module = require(library)
    if library == "timm":
        return bool(module.is_model(name))
    if library == "torchvision":
        return name in _named_torchvision.names()
    return os.path.exists(name) or name in module.CONFIG_MAPPING


def _names(library: str) -> Iterable[str]:
    module = require(library)
    if library == "torchvision":
        return _named_torchvision.names()
    return list(module.list_models()) if library == "timm" else list(module.CONFIG_MAPPING)


def _unknown(name: str, libraries: list[str]) -> ArgumentError:
    close = [
        f"{guess} ({library})"
        for library in libraries
        for guess in difflib.get_close_matches(name, _names(library), n=3)
    ]
    hint = f"; similar names: {', '.join(close)}" if close else ""
    kinds = [
        "a classification model of torchvision" if library == "torchvision" else f"a name of {library}"
        for library in libraries
    ]
    return ArgumentError(
        f"model: expected {' or '.join(kinds)}"
        f"{', or the path of a config.json' if 'transformers' in libraries else ''}, got {name!r}{hint}"
    )


def _smallest(
    name: str, native: Size, full: bool, make: Callable[[Size], tuple[nn.Module, Tensor]], multiple: int = 1
) -> tuple[nn.Module, Tensor, str]:
    """(model, images, their size in words) of the first size of images that runs: a quarter of the native
    one, half of it, or all of it. make(size) -> model, images."""
    parts = [tuple(side // part // multiple * multiple for side in native) for part in (4, 2)]
    sizes = [native] if full else [*(size for size in parts if min(size) >= SMALLEST_IMAGE), native]
    failure = ""
    for height, width in sizes:
        size = height, width
        try:
            model, images = make(size)
            model.eval()
            with torch.no_grad():
                model(images)
        except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
            failure = f"{type(error).__name__}: {error}"
            continue
        instead = "" if size == native else f" instead of {_by(native)}"
        return model, images, f"{_by(size)}{instead}"
    raise ArgumentError(f"model: {name} does not run on images of {_by(native)} ({failure})")


def _timm(name: str, full: bool) -> NamedModel:
    timm = require("timm")
    if not timm.is_model(name):
        raise _unknown(name, ["timm"])
    config = timm.get_pretrained_cfg(name)
    channels, height, width = config.input_size if config is not None else (3, 224, 224)
    native = (height, width)
    any_size: list[nn.Module] = []  # built once for models that accept any size and have no argument for it

    def make(size: Size) -> tuple[nn.Module, Tensor]:
        if not any_size and size != native:
            try:
                return timm.create_model(name, pretrained=False, img_size=size), images(size)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
            any_size.append(timm.create_model(name, pretrained=False))
        model = any_size[0] if any_size else timm.create_model(name, pretrained=False)
        return model, images(size)

    def images(size: Size) -> Tensor:
        return torch.randn(BATCH, channels, *size)

    model, x, size = _smallest(name, native, full, make)
    built = f"timm.create_model({name!r}), images of {size}"
    return NamedModel("timm", timm.__version__, model, {"x": x}, built)


def _torchvision(name: str, full: bool) -> NamedModel:
    torchvision = require("torchvision")
    if name not in _named_torchvision.names():
        raise _unknown(name, ["torchvision"])
    native = _named_torchvision.native_size(name)

    def make(size: Size) -> tuple[nn.Module, Tensor]:
        return _named_torchvision.make(name, size, native=size == native)

    model, x, size = _smallest(name, native, full, make, _named_torchvision.multiple_of(name))
    frames = f"{x.shape[2]} images" if x.dim() == 5 else "images"
    built = f"torchvision.models.get_model({name!r}), {frames} of {size}"
    return NamedModel("torchvision", torchvision.__version__, model, {"x": x}, built)


def _by(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


def _transformers(name: str, full: bool) -> NamedModel:
    transformers = require("transformers")
    if os.path.exists(name):
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
    elif name in transformers.CONFIG_MAPPING:
        config = transformers.AutoConfig.for_model(name)
    else:
        raise _unknown(name, ["transformers"])
    changed = [] if full else list(dict.fromkeys(_shrink(config)))
    architecture = (config.architectures or [None])[0]
    if architecture is not None and hasattr(transformers, architecture):
        model = getattr(transformers, architecture)._from_config(config)
    else:
        model = transformers.AutoModel.from_config(config)
    model.eval()
    built = f"{type(model).__name__} of {name}" + (f" with {', '.join(changed)}" if changed else "")
    return NamedModel(
        "transformers", transformers.__version__, model, _tokens_or_images(model, config), built
    )


# The names that configurations use for the number of layers.
_DEPTHS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers",
)  # fmt: skip


def _shrink(config: Any) -> Iterable[str]:
    """Reduce layers and vocabulary of a configuration and of those nested in it, in place; yields what
    changed. Widths are kept, because layouts and the choice of a kernel depend on them."""
    for key in _DEPTHS:
        if isinstance(getattr(config, key, None), int) and getattr(config, key) > LAYERS:
            setattr(config, key, LAYERS)
            yield f"{key}={LAYERS}"
    if isinstance(vars(config).get("layer_types"), list):  # elsewhere it is derived from the depth
        config.layer_types = config.layer_types[:LAYERS]
    words = getattr(config, "vocab_size", None)
    if isinstance(words, int) and words > VOCABULARY:
        config.vocab_size = VOCABULARY
        for key, value in list(vars(config).items()):
            if key.endswith("token_id") and isinstance(value, int) and value >= VOCABULARY:
                setattr(config, key, value % VOCABULARY)
        yield f"vocab_size={VOCABULARY}"
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _shrink(value)
    config.use_cache = False


def _tokens_or_images(model: Any, config: Any) -> dict[str, Tensor]:
    """Random inputs: tokens, images, or both for models of text and images."""
    vision = getattr(config, "vision_config", config)
    sample = {}
    if model.main_input_name == "input_ids":
        words = config.get_text_config().vocab_size
        sample["input_ids"] = torch.randint(1, words, (BATCH, TOKENS))
        if config.is_encoder_decoder:
            sample["decoder_input_ids"] = torch.randint(1, words, (BATCH, TOKENS))
    if model.main_input_name == "pixel_values" or vision is not config:
        size = getattr(vision, "image_size", 224)
        sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        sample["pixel_values"] = torch.randn(BATCH, getattr(vision, "num_channels", 3), *sides)
    if model.main_input_name not in sample:
        raise ArgumentError(
            f"model: expected one that takes input_ids or pixel_values, got {type(model).__name__}, which "
            f"takes {model.main_input_name}"
        )
    return sample


_BUILDERS = {"timm": _timm, "transformers": _transformers, "torchvision": _torchvision}
