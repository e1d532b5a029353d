# SPDX-License-Identifier: Apache-2.0
"""The package imports benchmarks/ in one place: `_of_benchmarks` in `fused_ewclora.__main__`."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from fused_ewclora import __main__ as cli

PACKAGE = Path(__file__).resolve().parents[2] / "fused_ewclora"
SOURCES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.relative_to(PACKAGE).parts[0] not in ("kernels", "benchmarks")  # links to other folders
]
IMPORTS = ("import_module", "__import__", "run_module", "find_spec")


def mentions(source: str) -> Iterator[int]:
    """Lines that import benchmarks, by a statement or by the name given to a function that imports."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module or ''}.{alias.name}" for alias in node.names]
        elif (
            isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in IMPORTS
        ):
            texts = [part for argument in node.args for part in ast.walk(argument)]
            names = [str(part.value) for part in texts if isinstance(part, ast.Constant)]
        # "avalanche.benchmarks" is a module of another library.
        if any("benchmarks" in name.split(".") and not name.startswith("avalanche.") for name in names):
            yield node.lineno


def test_imported_once():
    """Benchmarks are imported at one place of the package."""
    places = [(path.name, line) for path in SOURCES for line in mentions(path.read_text())]
    assert [name for name, _ in places] == ["__main__.py"], places


@pytest.mark.parametrize(
    "source",
    [
        "from .benchmarks import report",
        "from . import benchmarks",
        "import benchmarks.report",
        "import fused_ewclora.benchmarks as b",
        "def f():\n    from fused_ewclora.benchmarks.case import OURS",
        "import importlib\nimportlib.import_module('fused_ewclora.benchmarks')",
        "import_module(f'fused_ewclora.benchmarks.{name}')",
        "runpy.run_module('benchmarks')",
    ],
)
def test_imports_noticed(source: str):
    """Every way to import them is noticed."""
    assert list(mentions(source))


@pytest.mark.parametrize("module", [*(module for _, module in cli.BENCHMARKS.values()), "continual.__main__"])
def test_commands_have_options(module: str):
    """Every module of a command has options, their execution and a main."""
    spec = importlib.util.find_spec(f"fused_ewclora.benchmarks.{module}")
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {"add_arguments", "execute", "main"} <= functions
