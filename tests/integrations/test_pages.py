# SPDX-License-Identifier: Apache-2.0
"""The scripts of pages that need model libraries run as they stand; the others are those of tests/project."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import needing_libraries, run

PAGES = needing_libraries()


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_script(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The script of a page runs."""
    monkeypatch.chdir(tmp_path)
    run(page)
