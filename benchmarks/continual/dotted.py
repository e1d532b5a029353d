# SPDX-License-Identifier: Apache-2.0
"""Objects that configurations and command lines name by a dotted path."""

from __future__ import annotations

import importlib
from typing import Any

from fused_ewclora.errors import ArgumentError


def named(path: str, what: str) -> Any:
    """The object with a dotted path "package.module:name"; raises `ArgumentError` that begins with `what`."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ArgumentError(f"{what}: {path!r} cannot be imported: {error}") from error
