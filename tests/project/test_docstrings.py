# SPDX-License-Identifier: Apache-2.0
"""Docstrings of the public names: their examples run, and every argument and result is described."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from docstrings import described, examples, first_names, lacks, needs_sections, run

MODULES = ("", "functional", "fishers", "structures", "profiling", "methods", "metrics", "config", "errors")
DESCRIBED = described(MODULES)
EXAMPLES = examples(DESCRIBED)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The examples of a public name run and print what they say."""
    monkeypatch.chdir(tmp_path)
    run(name, EXAMPLES[name], first_names())


@pytest.mark.parametrize(
    "name", [name for name, (value, inherited) in DESCRIBED.items() if needs_sections(name, value, inherited)]
)
def test_sections(name: str):
    """Arguments, result and an example are described, each in its section."""
    value = DESCRIBED[name][0]
    # The example of a class serves its methods, but those of the controller have their own.
    alone = inspect.isclass(value) or name.startswith("EWC.") or "." not in value.__qualname__
    assert lacks(value, value.__doc__ or "", example=alone) == []


def undocumented(a: int, *, b: int = 0) -> int:
    """One sentence.

    Args:
        a: a number.
    """
    return a + b


def test_missing_sections_noticed():
    """An argument, a result and an example that are not described are noticed."""
    assert lacks(undocumented, undocumented.__doc__ or "") == ["b", "Returns", "Examples"]


@pytest.mark.parametrize("wrong", [">>> 1 + 1\n3\n", ">>> undefined\n"])
def test_wrong_example_fails(wrong: str):
    """An example that prints something else, or raises, fails."""
    check: Callable[..., Any] = run
    with pytest.raises(AssertionError, match="Failed example"):
        check("wrong", wrong, {})
