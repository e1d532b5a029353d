"""Optional libraries: imported when they are needed, refused in versions that were never tried."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from types import ModuleType

from ..errors import IntegrationError

# module: (distribution, extra of this package, first version that works, first version that is not known to).
# The tests were run with the first of each; pyproject.toml and docs/integrations name the same.
_SUPPORTED = {
    "timm": ("timm", "timm", (1, 0, 20), (2,)),
    "transformers": ("transformers", "transformers", (4, 57), (6,)),
    "accelerate": ("accelerate", "transformers", (1, 4), (2,)),
    "peft": ("peft", "peft", (0, 16), (1,)),
    "avalanche": ("avalanche-lib", "avalanche", (0, 6), (1,)),
}


def require(name: str) -> ModuleType:
    """The module of an optional library; raises `IntegrationError` naming the extra to install, the
    supported versions, or why it cannot be imported."""
    distribution, extra, first, beyond = _SUPPORTED[name]
    version = _version(distribution)  # a folder that happens to have the name of the module has none
    if version is None or importlib.util.find_spec(name) is None:
        raise IntegrationError(
            f"{distribution} is not installed; pip install 'fused-ewclora[{extra}]' brings it along"
        )
    found = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    if not first <= found < beyond:
        wanted = f">= {_text(first)}, < {_text(beyond)}"
        raise IntegrationError(f"{distribution}: expected a version {wanted}, got {version}")
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a library raises beside packages that it was not made for
        raise IntegrationError(f"{distribution} {version} cannot be imported: {error}") from error


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
