# SPDX-License-Identifier: Apache-2.0
"""Optional libraries: imported when needed, and refused in versions that are not supported."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from types import ModuleType

from ..errors import IntegrationError

# module: (distribution, extra of this package, first supported version, first unsupported version after it).
# The tests pass with the first supported versions, which pyproject.toml and docs/integrations name too.
_SUPPORTED = {
    "timm": ("timm", "timm", (0, 9), (2,)),
    "transformers": ("transformers", "transformers", (4, 57), (6,)),
    "torchvision": ("torchvision", "torchvision", (0, 24), (1,)),
    "accelerate": ("accelerate", "transformers", (1, 4), (2,)),
    "peft": ("peft", "peft", (0, 16), (1,)),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes", (0, 50), (1,)),
    "torchao": ("torchao", "torchao", (0, 18), (1,)),
    "avalanche": ("avalanche-lib", "avalanche", (0, 6), (1,)),
}


def require(name: str) -> ModuleType:
    """The module of an optional library; raises `IntegrationError` that names the extra to install, the
    supported versions, or the error of its import."""
    distribution, extra, first, beyond = _SUPPORTED[name]
    version = _version(distribution)  # None for a folder that happens to have the name of the module
    if version is None or importlib.util.find_spec(name) is None:
        raise IntegrationError(
            f"{distribution} is not installed; pip install 'fused-ewclora[{extra}]' brings it along"
        )
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    if not first <= numbers < beyond:
        wanted = f">= {_text(first)}, < {_text(beyond)}"
        raise IntegrationError(f"{distribution}: expected a version {wanted}, got {version}")
    try:
        return importlib.import_module(name)
    except Exception as error:  # a library may raise anything beside packages that it does not support
        raise IntegrationError(f"{distribution} {version} cannot be imported: {error}") from error


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
