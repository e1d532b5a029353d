# SPDX-License-Identifier: Apache-2.0
"""Records of a GPU run join those of the repository, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark_records import CPU, GPU, newer, results

from benchmarks import collection, keep


def test_append_by_device(tmp_path: Path, capsys):
    """Records are appended under the name of the device."""
    results(tmp_path, one_merge=newer(), two_merge=newer(time="2026-02-02T00:00:00+00:00"))
    for out in ("one", "two"):
        (tmp_path / out / "lora_linear.jsonl").touch()  # a suite that time did not reach
        assert keep.main([str(tmp_path / out), "--results", str(tmp_path / "kept")]) == 0
        assert capsys.readouterr().out.split() == [str(tmp_path / "kept" / "a-gpu" / "merge.jsonl")]
    assert collection.load(tmp_path / "kept" / "a-gpu") == [
        *newer(),
        *newer(time="2026-02-02T00:00:00+00:00"),
    ]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([], "holds no records"),
        (newer(environment=CPU), "not measured on a GPU"),
        ([*newer(), *newer(environment={**GPU, "device": "another"})], "several devices"),
        ([*newer(), {"op": "x"}], "does not follow record_schema.json"),
    ],
)
def test_unusable_records_refused(found: list, said: str, tmp_path: Path, capsys):
    """Records that cannot be used are refused in one sentence."""
    results(tmp_path, out_merge=found)
    assert keep.main([str(tmp_path / "out"), "--results", str(tmp_path / "kept")]) == 2
    told = capsys.readouterr().err
    assert said in told and len(told.splitlines()) == 1 and not (tmp_path / "kept").exists()


def test_records_are_kept_once(tmp_path: Path, capsys):
    results(tmp_path, out_merge=newer())
    for status in (0, 2):
        assert keep.main([str(tmp_path / "out"), "--results", str(tmp_path / "kept")]) == status
    assert "already" in capsys.readouterr().err
    assert collection.load(tmp_path / "kept" / "a-gpu") == newer()
