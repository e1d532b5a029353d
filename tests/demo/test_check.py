# SPDX-License-Identifier: Apache-2.0
"""Data that a recipe cannot use are refused before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fused_ewclora.demo.formats import DataError
from fused_ewclora.demo.protocol import Recipe, check
from fused_ewclora.demo.scenario import make_scenario


def test_unusable_refused() -> None:
    """Too few classes, and sides that patches do not divide."""
    pytest.importorskip("sklearn")
    found, recipe = make_scenario("digits", Path("nowhere")), Recipe(tasks=2, patches=4)
    check(found, recipe)
    with pytest.raises(DataError, match="need 40 classes"):
        check(found, replace(recipe, tasks=20))
    with pytest.raises(DataError, match="that 3 divides"):
        check(found, replace(recipe, patches=3))
