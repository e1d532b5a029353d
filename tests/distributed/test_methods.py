# SPDX-License-Identifier: Apache-2.0
"""Methods with gloo on the CPU: every check of method_checks.py, by two processes with half of the data."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import method_checks
import pytest
from processes import Results, assert_agreed, launched


@functools.cache
def results() -> Results:
    return launched(method_checks.__file__, 2, Path(tempfile.mkdtemp(prefix="fused_ewclora-methods-")))


@pytest.mark.parametrize("name", method_checks.CHECKS)
def test_processes_agree(name: str):
    assert_agreed(results(), name)
