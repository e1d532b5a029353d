# SPDX-License-Identifier: Apache-2.0
"""What users see while a program runs: log records, progress bars and the texts of objects."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch.nn.functional as F
from tiny_models import adapted, data

import fused_ewclora as fe
from fused_ewclora import progress
from fused_ewclora.layers.grouping import abbreviated


def test_once_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Injection, the end of a task and written files are told at level INFO."""
    caplog.set_level(logging.INFO, "fused_ewclora")
    model = adapted()
    ewc = fe.EWC(model, ewc_lambda=1.0)
    ewc.end_task([data(4)], F.cross_entropy)
    fe.save_pretrained(tmp_path / "task", model, ewc)
    text = "\n".join(record.getMessage() for record in caplog.records)
    for part in ("inject: adapters in", "consolidate: task 1, a Fisher of 4 samples", "adapter_model"):
        assert part in text, part


def test_silent_by_default():
    """The logger has a handler that prints nothing."""
    handlers = logging.getLogger("fused_ewclora").handlers
    assert any(isinstance(handler, logging.NullHandler) for handler in handlers)


def test_bar_by_argument(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """True shows a bar, False none; None only on a terminal, after a delay."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for wanted in (False, None):
        assert list(progress.with_bar(range(3), 2, wanted, "Pass")) == [0, 1]
        assert "Pass" not in capsys.readouterr().err
    monkeypatch.setattr(progress, "DELAY", 0.0)
    for wanted in (True, None):
        assert list(progress.with_bar(iter(range(3)), None, wanted, "Pass")) == [0, 1, 2]
        assert "Pass" in capsys.readouterr().err


def test_bar_of_block(capsys: pytest.CaptureFixture[str]):
    """A block decides for passes that do not, and is refused what is no choice."""
    with progress.showing(True):
        list(progress.with_bar(range(2), None, None, "Inner"))
        list(progress.with_bar(range(2), None, False, "Never"))
    found = capsys.readouterr().err
    assert "Inner" in found and "Never" not in found
    with pytest.raises(fe.DtypeError, match="progress: expected True, False or None"):
        fe.EWC(adapted()).estimate_fisher([data(4)], F.cross_entropy, progress="yes")


def test_reprs_short():
    """Settings and state of controllers, methods and configurations are in their texts."""
    model = adapted()
    ewc = fe.EWC(model, ewc_lambda=1e7, gamma=0.9, fisher_dtype="8bit")
    for part in (
        "ewc_lambda=1e+07",
        "gamma=0.9",
        "fisher_dtype='8bit'",
        "0 tasks",
        f"{len(ewc.layers)} layers",
    ):
        assert part in repr(ewc), part
    method = fe.methods.EWCLoRA(model, ewc_lambda=2.0)
    assert repr(method).startswith("EWCLoRA(labels='empirical', ewc=EWC(ewc_lambda=2")
    assert repr(fe.LoRAConfig(r=4, slices=("k",))) == "LoRAConfig(r=4, slices=('k',))"
    assert "rows" in repr(fe.explain(model))


def test_names_abbreviated():
    """Equal rows share one, whose name has all of their numbers and no others."""
    names = ["a.0.b.0", "a.0.b.1", "a.1.b.0", "head", "c.0", "c.2"]
    rows = abbreviated(({"name": name, "r": 2, "size": 1} for name in names), "count", ("size",))
    found = {row["name"]: (row["count"], row["size"]) for row in rows}
    assert found == {"a.0.b.0-1": (2, 2), "a.1.b.0": (1, 1), "head": (1, 1), "c.0,2": (2, 2)}
