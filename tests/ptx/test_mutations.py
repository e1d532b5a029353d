# SPDX-License-Identifier: Apache-2.0
"""Broken code is caught: barriers, waits, fences, orders and masks of Triton's PTX, removed or weakened."""

from __future__ import annotations

import json

import pytest
from ptx import mutations, separately


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    return json.loads(separately.run("ptx.mutations", "--json"))


@separately.needed
@pytest.mark.parametrize("name", mutations.MUTATIONS)
def test_caught(name: str, found: dict[str, list[str]]) -> None:
    """The machine finds what is expected of it."""
    assert mutations.MUTATIONS[name][4] & set(found[name]), found[name]
