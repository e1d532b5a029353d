# SPDX-License-Identifier: Apache-2.0
"""The examples that need PyTorch alone run; each is listed in examples/README.md and typed."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "two_tasks.ipynb"


@pytest.mark.parametrize("name", ["own_method", "own_fisher"])
def test_quick(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An example runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--quick"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_two_processes(tmp_path: Path):
    """Two processes compare themselves with one."""
    script = [str(EXAMPLES / "distributed.py"), "--quick"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *script,
    ]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("are those of one process") == 2
    assert (tmp_path / "distributed").is_dir()


def test_notebook(monkeypatch: pytest.MonkeyPatch):
    """The notebook runs, EWC forgets less in it, and its outputs are committed."""
    matplotlib = pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    matplotlib.use("Agg")
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds == {"stream", "display_data"}
    space: dict[str, object] = {"__name__": "__main__"}
    for cell in cells:
        exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), space)
    curves = space["curves"]
    assert isinstance(curves, dict)
    assert curves[1000.0][-1][0] > curves[0.0][-1][0] + 10.0


def test_listed():
    """Every example is in the table."""
    linked = set(re.findall(r"\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text()))
    assert linked == {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
