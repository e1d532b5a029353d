# SPDX-License-Identifier: Apache-2.0
"""Docstrings of the integrations: their examples run, and every argument and result is described."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from docstrings import described, examples, first_names, lacks, needs_sections, run
from torch import nn

LIBRARIES = (
    "avalanche",
    "bitsandbytes",
    "open_clip",
    "peft",
    "timm",
    "torchao",
    "torchvision",
    "transformers",
)
DESCRIBED = described(f"integrations.{name}" for name in LIBRARIES)
EXAMPLES = examples(DESCRIBED)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The examples of a public name run and print what they say."""
    monkeypatch.chdir(tmp_path)
    run(name, EXAMPLES[name], first_names())


def own_arguments(name: str) -> bool:
    """Whether the arguments are ours: modules have those of the class of the library that they replace."""
    value, inherited = DESCRIBED[name]
    is_module = inspect.isclass(value) and issubclass(value, nn.Module)
    return not is_module and needs_sections(name, value, inherited)


@pytest.mark.parametrize("name", filter(own_arguments, DESCRIBED))
def test_sections(name: str):
    """Arguments, result and an example are described, each in its section."""
    value = DESCRIBED[name][0]
    alone = inspect.isclass(value) or "." not in value.__qualname__
    assert lacks(value, value.__doc__ or "", example=alone) == []


def test_all_integrations_have_examples():
    """Every integration has examples, so that none is left out."""
    assert {name.split(".")[1] for name in EXAMPLES} == set(LIBRARIES)
