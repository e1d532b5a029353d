# SPDX-License-Identifier: Apache-2.0
"""Peers from the package index: what a missing one says, and which are pinned."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path

import pytest

from benchmarks import extras

ROOT = Path(__file__).resolve().parents[2]


def test_missing_install_hint(monkeypatch: pytest.MonkeyPatch):
    """A peer that is not installed says how to install it."""
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(extras.Unavailable, match=r"opacus is not installed; pip install --no-deps"):
        extras.load("opacus")
    with pytest.raises(ValueError, match="expected one of peft"):
        extras.load("numpy")


def test_import_error_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A peer that cannot be imported is unavailable."""
    (tmp_path / "opacus.py").write_text("raise RuntimeError('made for another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "opacus"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(extras, "prepare_torchvision", lambda: None)
    with pytest.raises(extras.Unavailable, match="cannot be imported: made for another torch"):
        extras.load("opacus")


@pytest.mark.parametrize("missing", [True, False])
def test_missing_operators_declared(missing: bool, monkeypatch: pytest.MonkeyPatch):
    """Operators are declared only where they are missing."""
    tried: list[str] = []

    def imported(name: str) -> types.ModuleType:
        tried.append(name)
        if missing and len(tried) == 1:
            raise RuntimeError("operator torchvision::nms does not exist")
        return types.ModuleType(name)

    spec = importlib.machinery.ModuleSpec("torchvision", None)
    declared: list[bool] = []
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(extras.importlib, "import_module", imported)
    monkeypatch.setattr(extras, "_declared", lambda: declared.append(True))
    extras.prepare_torchvision.__wrapped__()
    assert declared == [True] * missing and len(tried) == 1 + missing


def test_requirements_pin_every_peer():
    pinned = {
        line.split("==")[0]
        for line in (ROOT / "requirements-extras.txt").read_text().splitlines()
        if "==" in line
    }
    assert set(extras.DISTRIBUTIONS.values()) - {"matplotlib"} <= pinned
    assert not pinned & {"torch", "numpy", "triton"}
