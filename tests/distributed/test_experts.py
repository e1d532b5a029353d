# SPDX-License-Identifier: Apache-2.0
"""DDP and FSDP2 of models with experts, with gloo on the CPU."""

from __future__ import annotations

from pathlib import Path

import expert_checks
import pytest
from processes import Results, assert_agreed, launched

WORLD = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder: Path = tmp_path_factory.mktemp("experts")
    return launched(expert_checks.__file__, WORLD, folder)


@pytest.mark.parametrize("name", expert_checks.CHECKS)
def test_experts_agree(results: Results, name: str):
    """Each check of expert_checks.py, by two processes."""
    assert_agreed(results, name)
