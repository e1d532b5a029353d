"""Models by name, small enough for a dry run: a model name of timm, or a configuration file or model type of
transformers. Weights are random; nothing is downloaded."""

from __future__ import annotations

import difflib
import importlib.util
import os.path
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ._library import require

BATCH = 2
TOKENS = 8
SMALLEST_IMAGE = 32
LAYERS = 2  # of every stack of a shrunk transformers model
VOCABULARY = 1024
LIBRARIES = ("timm", "transformers")


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

    Raises `ArgumentError` with similar names when there is no such model, and `IntegrationError` when its
    library is not installed.
    """
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
    return os.path.exists(name) or name in module.CONFIG_MAPPING


def _names(library: str) -> Iterable[str]:
    module = require(library)
    return list(module.list_models()) if library == "timm" else list(module.CONFIG_MAPPING)


def _unknown(name: str, libraries: list[str]) -> ArgumentError:
    close = [
        f"{guess} ({library})"
        for library in libraries
        for guess in difflib.get_close_matches(name, _names(library), n=3)
    ]
    hint = f"; similar names: {', '.join(close)}" if close else ""
    return ArgumentError(
        f"model: expected a name of {' or '.join(libraries)}"
        f"{', or the path of a config.json' if 'transformers' in libraries else ''}, got {name!r}{hint}"
    )


def _timm(name: str, full: bool) -> NamedModel:
    timm = require("timm")
    if not timm.is_model(name):
        raise _unknown(name, ["timm"])
    config = timm.get_pretrained_cfg(name)
    channels, height, width = config.input_size if config is not None else (3, 224, 224)
    native = (height, width)
    sizes = [native] if full else [(height // 4, width // 4), (height // 2, width // 2), native]
    any_size: nn.Module | None = (
        None  # built once for models that accept any size and have no argument for it
    )
    failure = ""
    for size in [size for size in sizes if min(size) >= SMALLEST_IMAGE] or [native]:
        images = torch.randn(BATCH, channels, *size)
        try:
            if any_size is None and size != native:
                try:
                    model = timm.create_model(name, pretrained=False, img_size=size)
                except TypeError as error:
                    if "img_size" not in str(error):
                        raise
                    model = any_size = timm.create_model(name, pretrained=False)
            else:
                model = timm.create_model(name, pretrained=False) if any_size is None else any_size
            model.eval()
            with torch.no_grad():
                model(images)
        except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
            failure = f"{type(error).__name__}: {error}"
            continue
        instead = "" if size == native else f" instead of {_by(native)}"
        built = f"timm.create_model({name!r}), images of {_by(size)}{instead}"
        return NamedModel("timm", timm.__version__, model, {"x": images}, built)
    raise ArgumentError(f"model: {name} does not run on images of {_by(native)} ({failure})")


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


_BUILDERS = {"timm": _timm, "transformers": _transformers}
