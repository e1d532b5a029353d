"""Integrations with model libraries, each loaded on first use of its name or of a model of its library."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from ..layers.matching import register_library

_MODULES = ("avalanche", "bitsandbytes", "peft", "timm", "torchao", "torchvision", "transformers")
# The modules that register packed projections or layer classes, loaded for models of their library.
_MODELS = ("bitsandbytes", "timm", "torchao", "torchvision", "transformers")


def _load(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")


for _name in _MODELS:
    register_library(_name, functools.partial(_load, _name))


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _load(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
