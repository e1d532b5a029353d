"""The problems that configurations can name."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from fused_ewclora.demo.formats import DataError

from .stream import Problem

# kind -> module with `load(root, seed, device, **settings) -> Problem`
KINDS = {
    "language": "language",  # WordNet glosses, MiniLM
    "vision": "vision",  # image sets of the demo, after a small transformer trained on another one
    "images": "images",  # CIFAR-100, DomainNet, ImageNet-R, ImageNet-A, timm
}


def load(settings: dict[str, Any], root: Path, seed: int, device: str) -> Problem:
    """The problem that `settings` describe: "kind", and the keywords of its loader.

    root: folder of the data; data sets that a package index has are downloaded into it.
    """
    options = dict(settings)
    kind = options.pop("kind", None)
    if kind not in KINDS:
        raise DataError(f"problem: kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    module = importlib.import_module(f".{KINDS[kind]}", __package__)
    try:
        inspect.signature(module.load).bind(root, seed, device, **options)
    except TypeError as error:
        raise DataError(f"problem: {kind}: {error}") from error
    problem: Problem = module.load(root, seed, device, **options)
    return problem
