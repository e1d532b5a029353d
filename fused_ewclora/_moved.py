# SPDX-License-Identifier: Apache-2.0
"""Module paths of earlier versions. Importing one gives the module that has taken its place, not a copy."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Path of earlier versions -> present path, inside the package.
MOVED = {
    "adapted": "layers.adapted",
    "backends.triton.aot": "backends.triton.tools.aot",
    "backends.triton.autotune": "backends.triton.tools.autotune",
    "backends.triton.occupancy": "backends.triton.tools.occupancy",
    "backends.triton.regimes": "backends.triton.cost_model",
    "backends.triton.workloads": "backends.triton.tools.workloads",
    "check": "diagnostics.check",
    "checkpoint": "checkpoints.checkpoint",
    "compile_report": "backends.triton.tools.compile_report",
    "explain": "diagnostics.explain",
    "fisher": "ewc.estimation",
    "info": "diagnostics.info",
    "inject": "layers.inject",
    "interchange": "checkpoints.interchange",
    "matching": "layers.matching",
    "optimizers": "layers.optimizers",
    "slices": "layers.slices",
    "tuning": "backends.triton.tools.tuning",
}


class _Finder(MetaPathFinder, Loader):
    """Finds modules by earlier paths. It is asked last, so imports of present paths never reach it."""

    def __init__(self, package: str) -> None:
        self.moved = {f"{package}.{old}": f"{package}.{new}" for old, new in MOVED.items()}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in self.moved else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        # The import system returns what sys.modules holds under the name when this is done.
        sys.modules[module.__name__] = importlib.import_module(self.moved[module.__name__])


def install(package: str) -> None:
    """Make the earlier paths importable.

    Modules that share their name with a public function are registered at once: importing a submodule sets an
    attribute of its package, which would hide the function.
    """
    finder = _Finder(package)
    sys.meta_path.append(finder)
    for name in ("explain", "inject"):
        sys.modules[f"{package}.{name}"] = importlib.import_module(f"{package}.{MOVED[name]}")
