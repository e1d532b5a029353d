# SPDX-License-Identifier: Apache-2.0
"""Benchmarks at shapes and with functions of the user, and what they export."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as bench
from benchmarks import extras, own
from fused_ewclora import functional as FE
from fused_ewclora.errors import ArgumentError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "microbenchmarks.md"
SHAPES = {
    "lora_linear": "7,6,4,2",
    "lora_linear_slices": "7,6,12,2",
    "ewc_penalty": "3,4,6,2",
    "structured_penalty": "3,4,6,2,kronecker",
    "l1_penalty": "3,4,6,2",
    "fisher_accumulate": "3,5,6,4,batch",
    "fisher_sums": "3,5,6,4",
    "merge": "3,4,6,2",
    "soft_threshold": "2,5",
}
PUBLIC = {
    "fisher_accumulate": "fisher_accumulate_", "fisher_sums": "fisher_accumulate_", "merge": "merge_",
    "soft_threshold": "soft_threshold_", "structured_penalty": "ewc_penalty",
}  # fmt: skip


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Ceilings are not measured and peers not compiled."""
    monkeypatch.setattr(bench, "ceilings", lambda *_: {"copy": 1e9, "fp32": 1e9})
    monkeypatch.setattr(extras, "compiled", lambda method, backend="": method)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[dict]]:
    status = bench.main([*arguments, "--seconds", "0", "--rounds", "2", "--json", "-"])
    return status, json.loads(capsys.readouterr().out)["records"]


@pytest.mark.parametrize("op", own.FIELDS)
def test_every_op(op: str, capsys: pytest.CaptureFixture[str]):
    """Every op runs at numbers, beside a function with the signature of the public op, and only JSON is on
    stdout."""
    path = f"fused_ewclora.functional:{PUBLIC.get(op, op)}"
    status, records = measured(capsys, "--op", op, "--shape", SHAPES[op], "--provider", path)
    assert status == 0, records
    found = {record["provider"]: record for record in records}
    assert found[path]["error_fp64"] <= found[path]["tolerance"] and found[path]["backend"] == ""
    assert found["fused_ewclora"]["rounds"] >= 2


def test_page_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The file and the command of the page run."""
    text = PAGE.read_text()
    (tmp_path / "mine.py").write_text(text.split("```text\n")[1].split("```")[0])
    command = next(line for line in text.splitlines() if "mine:low_rank_first" in line).split()[2:]
    status, records = measured(capsys, *command)
    assert status == 0
    assert {"mine:low_rank_first", "addmm"} < {record["provider"] for record in records}


def test_wrong_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A wrong function is not timed; its error is told and the status is 1."""
    (tmp_path / "twice.py").write_text(
        "from fused_ewclora import functional as FE\n"
        "def merge(ws, a, b, s): return FE.merge_(ws, a, b, 2000 * s)\n"
    )
    arguments = ["--op", "merge", "--shape", "1,4,6,2", "--provider", "twice:merge", "--csv", "out.csv"]
    status, records = measured(capsys, *arguments)
    (wrong,) = [record for record in records if record["provider"] == "twice:merge"]
    assert status == 1 and "wrong: error" in wrong["failed"] and "seconds" not in wrong
    with open("out.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["provider"] for row in rows] == [record["provider"] for record in records]
    assert rows[0]["shape"] == "d_out=4 d_in=6 adapters=1 rank=2"


@pytest.mark.parametrize(
    ("op", "shape", "dtype", "told"),
    [
        ("merge", "1,2,3", "fp32", "merge takes 4 integers >= 1: adapters,d_out,d_in,r"),
        ("merge", "1,2,3,0", "fp32", "integers >= 1"),
        ("lora_linear_slices", "1,2,4,2", "fp32", "divisible by 3"),
        ("soft_threshold", "2,5", "bf16", "fp32 alone"),
        ("training_step", "1,2", "fp32", "takes no numbers"),
    ],
)
def test_wrong_shapes(op: str, shape: str, dtype: str, told: str):
    """Wrong shapes are refused with the meaning of the numbers."""
    with pytest.raises(ArgumentError, match=told):
        own.workload(op, shape, dtype)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--shape", "1,2,3,4"], "numbers are for one --op: lora_linear M,d_in,d_out,r"),
        (["--op", "merge", "--provider", "no_such:thing"], "No module named 'no_such'"),
        (["--op", "merge", "--provider", "torch:nothing"], "cannot be imported"),
        (["--op", "merge", "--dtype", "bf16"], "are for shapes of your own"),
        (["--op", "mrege"], "did you mean 'merge'?"),
        (["--csv", "none/out.csv"], "in a folder that exists"),
        (["--csv", "-", "--json", "-"], "only one of them"),
    ],
)
def test_refused_options(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]):
    """Options that cannot work are refused before anything is measured."""
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments)
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_truth_is_separate():
    """The reference of a case does not depend on the function that is measured."""
    plan = own.workload("lora_linear", "7,6,4,2", "fp32")
    case = bench.SUITES["lora_linear"].build(plan, bench.Place(own={"x:y": FE.lora_linear}))
    assert all(result.dtype == torch.float64 for result in case.truth())
