# SPDX-License-Identifier: Apache-2.0
"""Docstrings of the integrations: their examples run, and every argument and result is described."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from docstrings import described, examples, lacks, needs_sections, run
from torch import nn

import fused_ewclora as fe

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


@pytest.fixture
def names(tmp_path, monkeypatch) -> dict[str, Any]:
    """The names of the example in the docstring of the package, with which all others begin."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return run("fused_ewclora", fe.__doc__ or "", {})


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, names: dict[str, Any]):
    """The examples of a public name run and print what they say."""
    run(name, EXAMPLES[name], names)


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
