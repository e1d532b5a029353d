# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a language model in little memory: its command, without a model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from fused_ewclora.benchmarks import large_model


def record(structure: str, failed: str | None = None) -> dict:
    found = {
        "model": "tiny", "structure": structure, "samples": 2, "tokens": 8, "rank": 2,
        "seconds": {"model": 1.0}, "peak_bytes": 3 << 30, "limit_bytes": 4 << 30,
    }  # fmt: skip
    return found if failed is None else {**found, "failed": failed}


@pytest.mark.parametrize(("failing", "status"), [("dense", 0), ("8bit", 1), (None, 0)])
def test_status_and_records(tmp_path: Path, capsys, failing: str | None, status: int):
    """Every structure is measured and recorded; those that should fit decide the status."""

    def measure(structure: str, arguments: argparse.Namespace) -> dict:
        assert arguments.limit == large_model.LIMIT_BYTES
        return record(structure, "out of memory in: model" if structure == failing else None)

    assert large_model.main(["--out", str(tmp_path)], measure) == status
    lines = (tmp_path / "large_model.jsonl").read_text().splitlines()
    assert [json.loads(line)["structure"] for line in lines] == list(large_model.STRUCTURES)
    assert all("environment" in json.loads(line) for line in lines)
    text = capsys.readouterr().out
    assert text.count("fits") == 3 - (failing is not None) and "peak 3.00 GiB" in text


def test_bad_record_refused(tmp_path: Path):
    """What does not follow the schema is not written."""
    with pytest.raises(RuntimeError, match="peak_bytes"):
        large_model.main(["--out", str(tmp_path)], lambda *_: {**record("dense"), "peak_bytes": "3 GiB"})
    assert not list(tmp_path.iterdir())


def test_names_checked(tmp_path: Path, capsys):
    """An unknown structure is refused before anything runs."""
    with pytest.raises(SystemExit):
        large_model.main(["--structures", "sparse", "--out", str(tmp_path)])
    assert "unknown name 'sparse'" in capsys.readouterr().err
