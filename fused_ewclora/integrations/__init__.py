# SPDX-License-Identifier: Apache-2.0
"""Integrations with model libraries, each loaded on first use of its name or of a model of its library."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from ..layers.matching import register_library

_MODULES = (
    "avalanche", "bitsandbytes", "open_clip", "peft", "timm", "torchao", "torchvision", "transformers",
)  # fmt: skip
# Top-level packages, and the module that registers what their models need, which is loaded for them.
_MODELS = {
    "bitsandbytes": "bitsandbytes",
    "clip": "open_clip",
    "open_clip": "open_clip",
    "timm": "timm",
    "torchao": "torchao",
    "torchvision": "torchvision",
    "transformers": "transformers",
}


def _load(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")


for _package, _name in _MODELS.items():
    register_library(_package, functools.partial(_load, _name))


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _load(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
