# SPDX-License-Identifier: Apache-2.0
"""The examples that need model libraries run; the others are those of tests/project."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LEAVES = {
    "two_tasks_timm": "two-tasks-timm/merged.pt",
    "two_tasks_torchvision": "two-tasks-torchvision/merged.pt",
    "trainer_llama": "trainer-llama/merged/model.safetensors",
    "peft_accelerated": "peft-accelerated/merged/model.safetensors",
    "profile_vit": "trace.json",
}


@pytest.mark.parametrize("name", LEAVES)
def test_quick(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An example runs and leaves its file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--quick"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert (tmp_path / LEAVES[name]).stat().st_size > 0


def test_profile_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The table of the profiler has the fused operations, called once per layer and once per step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["profile_vit", "--quick", "--steps", "1"])
    runpy.run_path(str(EXAMPLES / "profile_vit.py"), run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith("%")]
    calls = {row[0]: int(row[-3]) for row in rows}
    assert calls == {"lora_linear": 2, "lora_linear_backward": 2, "ewc_penalty": 1}
