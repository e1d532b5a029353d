# SPDX-License-Identifier: Apache-2.0
"""The scripts of pages that need no model libraries run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, needing_libraries, run, script, with_scripts

DISTRIBUTED = ROOT / "docs" / "integrations" / "distributed.md"
PAGES = [page for page in with_scripts() if page not in [*needing_libraries(), DISTRIBUTED]]


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_script(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The script of a page runs."""
    monkeypatch.chdir(tmp_path)
    run(page)


def test_two_process_script(tmp_path: Path):
    """The script for several processes runs in two."""
    (tmp_path / "train.py").write_text(script(DISTRIBUTED))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "train.py",
    ]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert {"ddp", "fsdp"} <= {folder.name for folder in tmp_path.iterdir()}


def test_readme_first_screen():
    """The README begins with its picture, the installation and a script of at most ten lines of ours."""
    text = (ROOT / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    ours = [line for line in code.splitlines() if "fe." in line or "ewc." in line or "fused_ewclora" in line]
    assert len(ours) <= 10
    assert text.index("![") < text.index("pip install") < text.index("```python")
