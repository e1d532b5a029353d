"""The scripts in the documentation run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = [*sorted((DOCS / "integrations").glob("*.md")), DOCS / "methods.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def script(page: Path) -> str:
    """All Python of a page, at the lines where it stands."""
    text = page.read_text()
    lines = [""] * text.count("\n")
    for match in BLOCK.finditer(text):
        first = text.count("\n", 0, match.start(1))
        block = match[1].splitlines()
        lines[first : first + len(block)] = block
    return "\n".join(lines) + "\n"


ALONE = [page for page in PAGES if page.stem != "distributed"]


@pytest.mark.parametrize("page", ALONE, ids=[page.stem for page in ALONE])
def test_single_process_script(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The script of a page runs."""
    code = script(page)
    assert code.strip(), "a page without a script"
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})


def test_two_process_script(tmp_path: Path):
    """The script for several processes runs in two."""
    page = next(page for page in PAGES if page.stem == "distributed")
    (tmp_path / "train.py").write_text(script(page))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "train.py",
    ]
    path = os.pathsep.join([str(DOCS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert {"ddp", "fsdp"} <= {folder.name for folder in tmp_path.iterdir()}
