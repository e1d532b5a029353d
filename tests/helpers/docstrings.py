# SPDX-License-Identifier: Apache-2.0
"""Docstrings of public names: which there are, their examples run, and what they leave out."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

import fused_ewclora as fe

OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
# What layers and Fishers of one's own implement; their members are described in a sentence each.
PROTOCOLS = ("AdaptedLinear", "LoRAPart", "Part", "Structure", "Sums", "Geometry")
OF_OTHERS = ("extra_repr",)


def public(module: Any) -> Iterator[tuple[str, Any]]:
    """Functions and classes of a module of ours, by the names in its `__all__`, or without one those that it
    defines."""
    for name in getattr(module, "__all__", None) or vars(module):
        value = getattr(module, name)
        if name.startswith("_") or not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        home = getattr(value, "__module__", "")
        if home == module.__name__ or (hasattr(module, "__all__") and home.startswith("fused_ewclora")):
            yield name, value


def members(value: Any) -> Iterator[tuple[str, Any, bool]]:
    """Public members that a class defines itself or has of a base that is not public: name, function or
    property, whether a further base class has it."""
    seen: set[str] = set()
    for owner in (value, *filter(hidden, value.__mro__[1:])):
        for name, member in vars(owner).items():
            member = getattr(member, "__func__", member)
            if name.startswith("_") or name in OF_OTHERS or name in seen:
                continue
            seen.add(name)
            if inspect.isfunction(member) or isinstance(member, property):
                yield name, member, any(name in vars(base) for base in owner.__mro__[1:])


def hidden(kind: type) -> bool:
    """Whether a class is of a module of ours that is not public."""
    return kind.__module__.startswith("fused_ewclora.") and kind.__module__.rpartition(".")[2].startswith("_")


Described = dict[str, tuple[Any, bool]]


def described(modules: Iterable[str]) -> Described:
    """Everything public of these modules by its dotted name, and whether the docstring of a base class has
    the sections."""
    found: Described = {}
    for path in modules:
        module = importlib.import_module(f"fused_ewclora.{path}".rstrip("."))
        for name, value in public(module):
            dotted = f"{path}.{name}".lstrip(".")
            if any(value is known for known, _ in found.values()):
                continue  # a second name of it
            found[dotted] = value, False
            for inner, member, inherited in members(value) if inspect.isclass(value) else ():
                if not any(member is known for known, _ in found.values()):
                    found[f"{dotted}.{inner}"] = member, inherited or name in PROTOCOLS
    return found


def examples(found: Described) -> dict[str, str]:
    """The docstrings that have examples."""
    return {name: value.__doc__ for name, (value, _) in found.items() if ">>> " in (value.__doc__ or "")}


def run(name: str, text: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run the examples of a docstring, and return the names that they leave."""
    example = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=report.append, clear_globs=False)
    assert result.failed == 0, "".join(report)
    return example.globs


def first_names() -> dict[str, Any]:
    """The names of the example in the docstring of the package, with which all others begin."""
    torch.set_num_threads(1)
    return run("fused_ewclora", fe.__doc__ or "", {})


def section(text: str, title: str) -> str | None:
    """The indented text below a title of a docstring."""
    found = re.search(rf"^{title}:\n((?:[ ]+.*\n?|\n)+)", inspect.cleandoc(text) + "\n", re.MULTILINE)
    return found and found[1]


def lacks(value: Any, text: str, example: bool = True) -> list[str]:
    """What a docstring does not say: arguments, result, and where it should have one the example."""
    if isinstance(value, property):
        return []
    kinds = inspect.Parameter
    signature = inspect.signature(value)
    arguments = [
        p.name for p in signature.parameters.values()
        if p.name not in ("self", "cls") and p.kind is not kinds.VAR_KEYWORD
    ]  # fmt: skip
    # The page of a named tuple has no constructor for Args to belong to.
    title = "Attributes" if hasattr(value, "_fields") else "(?:Args|Attributes)"
    listed = section(text, title) or ""
    missing = [name for name in arguments if not re.search(rf"^ {{4}}(\*\*)?{name}: ", listed, re.MULTILINE)]
    returns = signature.return_annotation not in ("None", None, inspect.Signature.empty)
    if returns and not inspect.isclass(value) and not (section(text, "Returns") or section(text, "Yields")):
        missing.append("Returns")
    if example and ">>> " not in (section(text, "Examples") or ""):
        missing.append("Examples")
    return missing


# Layers that `inject` makes have the arguments of the class of PyTorch; tables and errors are named alone.
WITHOUT_SECTIONS = ("LoRAConv1d", "LoRAConv2d", "AdaptedLinear", "LoRAPart", "structures.Sums")


def needs_sections(name: str, value: Any, inherited: bool) -> bool:
    is_error = inspect.isclass(value) and issubclass(value, (Exception, Warning))
    return not (inherited or is_error or name in WITHOUT_SECTIONS or not callable(value))
