"""Imports inside the package follow the arrows of the architecture, wherever in a file they are written."""

from __future__ import annotations

import ast
import graphlib
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fused_ewclora"
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MODEL_LIBRARIES = {"timm", "transformers", "peft", "avalanche", "torchvision", "diffusers"}

# First match counts; higher numbers may import lower ones, equal ones each other but not in a circle.
LEVELS = [
    ("fused_ewclora.__main__", 11),
    ("fused_ewclora.demo", 10),
    ("fused_ewclora.checkpoint", 8),
    ("fused_ewclora.check", 10),
    ("fused_ewclora.integrations", 9),
    ("fused_ewclora.methods", 9),
    ("fused_ewclora.errors", 0),
    ("fused_ewclora.config", 1),
    ("fused_ewclora.metrics", 1),
    ("fused_ewclora.functional", 7),
    ("fused_ewclora._checks", 6),
    ("fused_ewclora.ops._library", 4),
    ("fused_ewclora.ops._dispatch", 3),
    ("fused_ewclora.ops", 5),
    ("fused_ewclora.backends", 2),
    ("fused_ewclora.reference", 1),
    ("fused_ewclora.kernels", 1),
    ("fused_ewclora._C", 1),
    ("fused_ewclora.", 8),  # inject, layers, ewc, fisher, checkpoint, info and whatever else acts on modules
]
LEAVES = ("fused_ewclora.errors", "fused_ewclora.config", "fused_ewclora.metrics", "fused_ewclora.reference")
PUBLIC = ("fused_ewclora", "fused_ewclora.functional", "fused_ewclora.metrics", "fused_ewclora.errors")
IMPLEMENTATIONS = tuple(
    f"fused_ewclora.{name}" for name in ("backends", "reference", "kernels", "_C", "_C_cuda")
)
# These say what is there, and so look at implementations.
REPORTERS = ("fused_ewclora.info", "fused_ewclora.compile_report", "fused_ewclora.tuning")


def level(module: str) -> int:
    return next(number for prefix, number in LEVELS if module.startswith(prefix))


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def imported(module: str, source: str, is_package: bool = False) -> Iterator[str]:
    """Full names of what `source` imports: import statements anywhere, and import_module("...")."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in SOURCES or full == "fused_ewclora.kernels" else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in ("import_module", "__import__"):
                target = str(node.args[0].value)
                yield package + target if target.startswith(".") else target


def violation(module: str, target: str) -> str | None:
    """Why `module` may not import `target`, or None."""
    if target.split(".")[0] in MODEL_LIBRARIES:
        allowed = within(module, ("fused_ewclora.integrations",))
        return None if allowed else "only integrations know model libraries"
    if not within(target, ("fused_ewclora",)) or module == "fused_ewclora":
        return None
    if within(module, ("fused_ewclora.demo",)):
        allowed = within(target, ("fused_ewclora.demo",)) or target in PUBLIC
        return None if allowed else "demos use the public API only"
    if target == "fused_ewclora":
        return None if module == "fused_ewclora.__main__" else "the package root is for users"
    if within(module, LEAVES):
        family = module.rpartition(".")[0]
        own = family != "fused_ewclora" and within(target, (family, module))
        allowed = own or target == "fused_ewclora.errors"
        return None if allowed else "leaves import nothing of the package but errors"
    if level(module) >= 8 and within(target, IMPLEMENTATIONS) and module not in REPORTERS:
        return "modules know nothing of implementations"
    return None if level(target) <= level(module) else "arrows never point up"


def edges() -> Iterator[tuple[str, str]]:
    for module, path in SOURCES.items():
        for target in imported(module, path.read_text(), path.name == "__init__.py"):
            if target != module:
                yield module, target


def test_imports_follow_the_arrows():
    found = [
        f"{module} imports {target}: {reason}"
        for module, target in edges()
        if (reason := violation(module, target)) is not None
    ]
    assert not found, "\n".join(found)


def test_imports_make_no_circle():
    graph: dict[str, set[str]] = {}
    for module, target in edges():
        if target in SOURCES and "fused_ewclora" not in (module, target):
            graph.setdefault(module, set()).add(target)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fused_ewclora.layers", "def f():\n    from .backends import native"),
        ("fused_ewclora.layers", "import importlib\nimportlib.import_module('fused_ewclora._C')"),
        ("fused_ewclora.ops._library", "from ..functional import lora_linear"),
        ("fused_ewclora.backends.native", "from .. import layers"),
        ("fused_ewclora.reference.merge", "from ..ops import capture"),
        ("fused_ewclora.metrics", "import fused_ewclora.config"),
        ("fused_ewclora.demo.data", "from ..ops.capture import FisherCapture"),
        ("fused_ewclora.inject", "def f():\n    import timm.models"),
        ("fused_ewclora.ewc", "from fused_ewclora import EWC"),
    ],
)
def test_a_wrong_import_is_noticed(module: str, source: str):
    assert any(violation(module, target) for target in imported(module, source))


def test_files_stay_short():
    folders = ("fused_ewclora", "kernels", "csrc", "benchmarks", "tests")
    suffixes = (".py", ".cpp", ".h", ".inl", ".cu", ".cuh")
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert not {name: n for name, n in lengths.items() if n > 400}, "hard cap of 400 lines"
    assert statistics.median(lengths.values()) <= 150
