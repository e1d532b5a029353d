# SPDX-License-Identifier: Apache-2.0
"""Imports inside the package follow the arrows of the architecture, wherever in a file they are written."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fused_ewclora"
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if not {"kernels", "benchmarks"} & set(path.relative_to(PACKAGE).parts[:1])  # links to other folders
}
MODEL_LIBRARIES = {
    "timm",
    "transformers",
    "peft",
    "avalanche",
    "torchvision",
    "open_clip",
    "diffusers",
    "bitsandbytes",
    "torchao",
}

# Of the package, from the bottom up. A file imports its own folder and folders of lower rows; folders of one
# row do not import each other. Files at the root are rooms of their own.
ROWS = (
    ("errors", "literals", "_version", "_arguments"),
    ("config", "metrics", "progress", "report", "reference", "kernels", "_C", "_C_cuda"),
    ("fishers",),
    ("backends",),
    ("ops",),
    ("functional", "profiling", "distributed"),
    ("layers",),
    ("ewc",),
    ("checkpoints", "structures"),
    ("integrations", "methods"),
    ("diagnostics",),
    ("demo", "benchmarks"),
    ("__main__", "_moved", ""),
)
LEVELS = {room: level for level, row in enumerate(ROWS) for room in row}
# Inside ops/, where the order of files is the path of a call.
OPS = ("capture", "sums", "schemas", "dispatch")  # each imports those to its right
IMPLEMENTATIONS = ("backends", "reference", "kernels", "_C", "_C_cuda")
# These report on implementations, and so look at them.
REPORTERS = ("fused_ewclora.diagnostics.info", "fused_ewclora.__main__")
DEMO_USES = ("", "functional", "metrics", "errors", "literals")

# Names that import_module is given when the program runs, so that no test can read them: module -> what it
# loads with them.
RUN_TIME = {
    "fused_ewclora": "names of its own modules, in _LAZY",
    "fused_ewclora.__main__": "benchmarks, in BENCHMARKS",
    "fused_ewclora._moved": "the modules in MOVED",
    "fused_ewclora.integrations": "its own modules",
    "fused_ewclora.integrations._library": "a model library",
    "fused_ewclora.backends.triton": "its own hosts",
    "fused_ewclora.backends.triton.tables": "tools.autotune, when it is switched on",
    "fused_ewclora.backends.triton.specialisation": "a module of kernels",
}


def room(module: str) -> str:
    """The folder, or the file at the root, that a module of the package belongs to."""
    return module.split(".")[1] if "." in module else ""


def literal_start(node: ast.expr, package: str, module: str) -> str | None:
    """What is known of the argument of import_module when it is read: all of it, or the folder it begins
    with."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if not isinstance(node, ast.JoinedStr) or not node.values:
        return None
    first = node.values[0]
    if isinstance(first, ast.Constant):
        return str(first.value)
    name = getattr(getattr(first, "value", None), "id", None)
    return {"__name__": module, "__package__": package}.get(str(name))


def imported(module: str, source: str, is_package: bool = False) -> Iterator[str]:
    """Full names of what `source` imports: import statements anywhere, import_module and __import__."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in SOURCES or base == "fused_ewclora" else base
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in ("import_module", "__import__"):
                target = literal_start(node.args[0], package, module) if node.args else None
                if target is None:
                    yield "?"
                else:
                    yield (package + target if target.startswith(".") else target).rstrip(".")


def violation(module: str, target: str) -> str | None:
    """Why `module` may not import `target`, or None."""
    if target == "?":
        return None if module in RUN_TIME else "import_module of a name that is not in RUN_TIME"
    if target.split(".")[0] in MODEL_LIBRARIES:
        return None if room(module) == "integrations" else "only integrations know model libraries"
    if target.split(".")[0] != "fused_ewclora":
        return None
    here, there = room(module), room(target)
    if here == there:
        if here == "ops" and module.split(".")[-1] in OPS and target.split(".")[-1] in OPS:
            order = OPS.index(module.split(".")[-1]) < OPS.index(target.split(".")[-1])
            return None if order else "files of ops/ follow the path of a call"
        return None
    if here == "":
        return None
    if here == "demo" and there not in DEMO_USES:
        return "demos use the public API only"
    if there not in LEVELS:  # an attribute of the package itself
        return None if here in ("__main__", "demo") else "the package root is for users"
    if there == "":
        return None if here in ("__main__", "demo") else "the package root is for users"
    if here == "reference" and there != "errors":
        return "the reference imports nothing of ours"
    if there in IMPLEMENTATIONS and LEVELS[here] > LEVELS["functional"] and module not in REPORTERS:
        return "modules know nothing of implementations"
    return None if LEVELS[there] < LEVELS[here] else "arrows never point up or sideways"


def edges() -> Iterator[tuple[str, str]]:
    for module, path in SOURCES.items():
        for target in imported(module, path.read_text(), path.name == "__init__.py"):
            if target != module:
                yield module, target


def test_imports_follow_the_arrows():
    violations = [
        f"{module} imports {target}: {reason}"
        for module, target in edges()
        if (reason := violation(module, target)) is not None
    ]
    assert not violations, "\n".join(violations)


def test_rooms_have_levels():
    """Every folder and every file at the root has a level."""
    rooms = {room(module) for module in SOURCES}
    assert rooms <= set(LEVELS), rooms - set(LEVELS)


def test_run_time_imports():
    """Run-time imports are listed."""
    asked = {module for module, target in edges() if target == "?" or target == module}
    assert asked <= set(RUN_TIME) and set(RUN_TIME) <= set(SOURCES)


def test_imports_make_no_circle():
    graph: dict[str, set[str]] = {}
    for module, target in edges():
        if target in SOURCES and "fused_ewclora" not in (module, target):
            if target.startswith(module + ".") or module.startswith(target + "."):
                continue  # a folder's __init__ and its files
            graph.setdefault(module, set()).add(target)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fused_ewclora.layers.linear", "def f():\n    from ..backends import native"),
        ("fused_ewclora.layers.linear", "import importlib\nimportlib.import_module('fused_ewclora._C')"),
        ("fused_ewclora.layers.linear", "import_module(f'fused_ewclora.backends.{name}')"),
        ("fused_ewclora.layers.linear", "import_module(name)"),
        ("fused_ewclora.layers.linear", "from ..ewc import state"),
        ("fused_ewclora.ops.schemas", "from ..functional import lora_linear"),
        ("fused_ewclora.ops.dispatch", "from . import schemas"),
        ("fused_ewclora.backends.native", "from .. import layers"),
        ("fused_ewclora.reference.merge", "from ..ops import capture"),
        ("fused_ewclora.metrics", "import fused_ewclora.config"),
        ("fused_ewclora.methods.lora", "from ..integrations import timm"),
        ("fused_ewclora.demo.data", "from ..ops.capture import FisherCapture"),
        ("fused_ewclora.layers.inject", "def f():\n    import timm.models"),
        ("fused_ewclora.ewc.controller", "from fused_ewclora import EWC"),
        ("fused_ewclora.ewc.controller", "import fused_ewclora.benchmarks.run"),
    ],
)
def test_wrong_import_noticed(module: str, source: str):
    """A wrong import is noticed."""
    assert any(violation(module, target) for target in imported(module, source))
