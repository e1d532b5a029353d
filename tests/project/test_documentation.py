# SPDX-License-Identifier: Apache-2.0
"""Docstrings and pages: everything public is described, examples name what exists, links lead somewhere."""

from __future__ import annotations

import ast
import builtins
import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fused_ewclora as fe
from fused_ewclora import functional

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fused_ewclora"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
INTEGRATIONS = [p for p in sorted((PACKAGE / "integrations").glob("*.py")) if not p.stem.startswith("_")]

# Names that other people's code relies on, by where they are.
FUNCTIONAL = (
    "lora_linear", "lora_linear_slices", "ewc_penalty", "ewc_penalty_grad_", "fisher_accumulate_", "merge_",
    "soft_threshold_",
)  # fmt: skip
PACKAGE_NAMES = (
    "LoRAConfig", "QKVLayout", "inject", "LoRALinear", "adapters", "disabled", "merge", "unmerge", "eject",
    "explain", "use_backend", "available_backends", "EWC", "convert_lambda", "save_pretrained",
    "load_pretrained", "export_peft", "import_peft",
)  # fmt: skip
OF_EWC = (
    "penalty", "add_penalty_grad_", "estimate_fisher", "accumulate_fisher", "consolidate", "end_task",
    "abort_fisher", "reduce_fisher_", "shard_", "fishers", "state_dict", "load_state_dict",
)  # fmt: skip
OF_TORCH = ("extra_repr",)  # what they do is said by torch.nn.Module


def members(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Public functions and classes, and what these define themselves."""
    for name in getattr(module, "__all__", None) or vars(module):
        value = getattr(module, name)
        ours = getattr(value, "__module__", "").startswith("fused_ewclora")
        if name.startswith("_") or not ours or not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        yield f"{module.__name__}.{name}", value
        if inspect.isclass(value):
            for inner, attribute in vars(value).items():
                documented = inspect.isfunction(attribute) or isinstance(
                    attribute, (property, classmethod, staticmethod)
                )
                if documented and not inner.startswith("_") and inner not in OF_TORCH:
                    yield f"{module.__name__}.{name}.{inner}", getattr(attribute, "__func__", attribute)


MODULES = [fe, functional, *(importlib.import_module(f"fused_ewclora.{m}") for m in ("metrics", "profiling"))]
MEMBERS = dict(item for module in MODULES for item in members(module))


def static_docstrings(path: Path) -> dict[str, str | None]:
    """Of a module whose library may be missing."""
    tree = ast.parse(path.read_text())
    docstrings: dict[str, str | None] = {path.stem: ast.get_docstring(tree)}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            docstrings[f"{path.stem}.{node.name}"] = ast.get_docstring(node)
    return docstrings


STATIC = {key: text for path in INTEGRATIONS for key, text in static_docstrings(path).items()}


def is_summary(text: str | None) -> bool:
    """A first paragraph with a sentence."""
    first = (text or "").strip().split("\n\n")[0].strip()
    return len(first.split()) >= 2 and re.search(r"[.:](\s|$)", first) is not None


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_public_sentences(module):
    """Everything public begins with a sentence."""
    texts = {module.__name__: module.__doc__} | {name: value.__doc__ for name, value in members(module)}
    assert len(texts) > 1
    assert [name for name, text in texts.items() if not is_summary(text)] == []


def test_integration_sentences():
    """Integrations begin with a sentence."""
    assert len(STATIC) > 2 * len(INTEGRATIONS)
    assert [name for name, text in STATIC.items() if not is_summary(text)] == []


# What examples are about: names that a reader's program has.
KNOWN = {"fe": fe, "fused_ewclora": fe, "FE": functional, "ewc": fe.EWC}
READERS = ("MyVisionTransformer", "criterion", "fully_shard", "loader", "model", "optimizer", "scaler")


def called(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def resolve(name: str, module: ModuleType) -> Any:
    """What a dotted name of an example is; None for what belongs to the reader or to another library."""
    first, *rest = name.split(".")
    if first in KNOWN:
        value = KNOWN[first]
    elif not rest and first not in READERS and not hasattr(builtins, first):
        value = getattr(module, first, None) or getattr(fe, first, None)
        assert value is not None, f"{name} does not exist"
    else:
        return None
    for part in rest:
        value = getattr(value, part)  # AttributeError names what does not exist
    return value


def check_example(source: str, module: ModuleType, defined: set[str]) -> None:
    tree = ast.parse(source)
    for name, call in called(tree):
        if name.split(".")[0] in defined:
            continue
        target = resolve(name, module) if re.fullmatch(r"[\w.]+", name) else None
        if target is None or not callable(target):
            continue
        signature = inspect.signature(target)
        keywords = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
        options = signature.parameters
        if not any(p.kind is p.VAR_KEYWORD for p in options.values()):
            assert keywords <= options.keys(), f"{name} has no {keywords - options.keys()}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            defined.update(alias.asname or alias.name.split(".")[0] for alias in node.names)


def examples(text: str) -> str:
    return "".join(example.source for example in doctest.DocTestParser().get_examples(text))


WITH_EXAMPLES = [name for name, value in MEMBERS.items() if examples(value.__doc__ or "")]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_parse(name):
    """Examples parse and name what exists."""
    value = MEMBERS[name]
    home = importlib.import_module(
        value.__module__ if not isinstance(value, property) else "fused_ewclora.ewc.controller"
    )
    check_example(examples(value.__doc__), home, set(KNOWN) - {"ewc", "fe", "FE", "fused_ewclora"})


def test_examples_of_integrations_parse():
    sources = {name: examples(text or "") for name, text in STATIC.items()}
    assert any(sources.values())
    for source in sources.values():
        ast.parse(source)


@pytest.mark.parametrize(
    "source", ["fe.injekt(model)", "fe.inject(model, rank=3)", "ewc.penalties()", "injekt(model)"]
)
def test_wrong_example_noticed(source):
    """A wrong example is noticed."""
    with pytest.raises((AssertionError, AttributeError)):
        check_example(source, fe, set())


LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)(?:#[^)\s]*)?\)")
MENTION = re.compile(r"\bdocs/[\w/-]+\.md\b")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links(page):
    """Links of pages lead to files."""
    text = page.read_text()
    assert [link for link in LINK.findall(text) if not (page.parent / link).exists()] == []
    assert [name for name in MENTION.findall(text) if not (ROOT / name).exists()] == []


def test_pages_mentioned():
    """Pages that sources mention exist."""
    texts = {path: path.read_text() for path in PACKAGE.rglob("*.py")}
    missing = {
        (path.name, name) for path, text in texts.items() for name in MENTION.findall(text)
        if not (ROOT / name).exists()
    }  # fmt: skip
    assert missing == set()


def test_readme_lists_integrations():
    """Pages of integrations are listed in the README."""
    readme = (ROOT / "README.md").read_text()
    pages = [str(page.relative_to(ROOT)) for page in PAGES if page.parent.name == "integrations"]
    assert pages and [page for page in pages if page not in readme] == []


def test_members_of_pages():
    """The members that pages of the API list exist, and all that are promised are among them."""
    tree = ast.parse((ROOT / "docs/hooks.py").read_text())
    assigned = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    listed = ast.literal_eval(assigned["MEMBERS"])
    for name, members in listed.items():
        assert [member for member in members if not hasattr(getattr(fe, name), member)] == []
    assert set(OF_EWC) <= set(listed["EWC"])
    for member in ast.literal_eval(assigned["OF_BASES"]):
        assert any(hasattr(getattr(fe.methods, kind), member) for kind in fe.methods.__all__), member


@pytest.mark.parametrize(
    ("where", "names"),
    [(functional, FUNCTIONAL), (fe, PACKAGE_NAMES), (fe.EWC, OF_EWC)],
    ids=["FE", "fe", "EWC"],
)
def test_promised_names(where, names):
    """Names that programs rely on exist and are on a page."""
    pages = "\n".join(page.read_text() for page in PAGES)
    assert [name for name in names if not hasattr(where, name)] == []
    assert [name for name in names if not re.search(rf"\b{name}\b", pages)] == []
