# SPDX-License-Identifier: Apache-2.0
"""measured_choice.json from records that are made here: what is derived, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from benchmarks import choose
from benchmarks.case import OURS
from benchmarks.gpu.__main__ import planned
from benchmarks.place import CUDA
from fused_ewclora.backends import measured_choice
from fused_ewclora.backends.candidate import Call, Candidate, forget_choices
from fused_ewclora.ops import dispatch, schemas

ROOT = Path(__file__).resolve().parents[2]

MACHINE = {"device": "Abacus 9000", "capability": "9.0", "torch": "2", "python": "3", "commit": "abc"}
OTHER, LATER = {**MACHINE, "device": "Abacus 9001"}, {**MACHINE, "commit": "def"}


def record(provider: str, rows: int, host: float, device: float = 1e-5, **more: Any) -> dict[str, Any]:
    """Of a forward pass with d_in = d_out = 4, so that work is 16 times the rows rounded up."""
    shape = {"model": "m", "pass": "forward", "rows": rows, "d_in": 4, "d_out": 4, "rank": 2}
    return {
        "op": "lora_linear", "shape": shape, "dtype": "bfloat16", "provider": provider, "timing": "graph",
        "seconds": {"p20": 0.99 * device, "p50": device, "p80": 1.01 * device}, "host_seconds": host,
        "rounds": 9, "flops": 1.0, "bytes": 1.0, "error_fp64": 0.0, "backend": "", "algorithm": "",
        "gbytes_per_second": 1.0, "gflops_per_second": 1.0, "environment": MACHINE, "time": "now", **more,
    }  # fmt: skip


def pair(rows: int, cuda: float, triton: float, **more: Any) -> list[dict[str, Any]]:
    return [record(OURS, rows, triton, **more), record(CUDA, rows, cuda, **more)]


def write(folder: Path, *found: dict[str, Any], name: str = "lora_linear") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    return folder


def derived(folder: Path, table: Path) -> list[dict[str, Any]]:
    assert choose.main([str(folder), "--table", str(table)]) == 0
    return json.loads(table.read_text())["entries"]


FASTER, SLOWER, ALIKE = (1.0, 2.0), (2.0, 1.0), (0.95, 1.0)


@pytest.mark.parametrize(
    ("times", "work"),
    [
        ([FASTER, FASTER, SLOWER], 16 * 16),
        ([FASTER, FASTER, FASTER], 16 * 256),
        ([FASTER, SLOWER, FASTER], 16 * 1),  # monotone: what comes after a slower case does not count
        ([FASTER, ALIKE, FASTER], 16 * 1),  # within the noise
        ([SLOWER, FASTER, FASTER], 0),  # an entry all the same: it was measured
    ],
)
def test_cuda_until_not_faster(times, work, tmp_path: Path):
    """CUDA is preferred up to the first case in which it was not faster."""
    found = [r for rows, one in zip((1, 15, 200), times, strict=True) for r in pair(rows, *one)]
    entries = derived(write(tmp_path / "x", *reversed(found)), tmp_path / "table.json")
    assert [entry["work"] for entry in entries] == [work]


def test_equal_work_all_faster(tmp_path: Path):
    """Of cases of equal work, all must be faster."""
    found = [*pair(1, *FASTER), *pair(15, *FASTER), *pair(16, *SLOWER)]  # both are rounded up to 16 rows
    (entry,) = derived(write(tmp_path / "x", *found), tmp_path / "table.json")
    assert entry["work"] == 16 and entry["cases"] == 1


def test_graph_slower_or_failed(tmp_path: Path):
    """A case that is slower in a graph, or failed, does not count as faster."""
    slower = [record(OURS, 15, 2.0, 1e-5), record(CUDA, 15, 1.0, 2e-5)]
    failed = [record(OURS, 15, 2.0), {**record(CUDA, 15, 1.0), "failed": "wrong"}]
    for case in (slower, failed):
        (entry,) = derived(write(tmp_path / "x", *pair(1, *FASTER), *case), tmp_path / "table.json")
        assert entry["work"] == 16


def test_single_passes_only(tmp_path: Path):
    """Each pass decides for its own op; records of both passes together decide nothing."""
    found = []
    for which, times in (("forward", FASTER), ("backward", SLOWER), ("forward+backward", SLOWER)):
        shape = {"pass": which} if which != "forward+backward" else {}
        without = {name: value for name, value in pair(1, *times)[0]["shape"].items() if name != "pass"}
        found += [{**r, "shape": {**without, **shape}} for r in pair(1, *times)]
    entries = derived(write(tmp_path / "x", *found), tmp_path / "table.json")
    assert [(entry["op"], entry["work"]) for entry in entries] == [
        ("lora_linear", 16),
        ("lora_linear_backward", 0),
    ]


def test_table_provenance(tmp_path: Path):
    """The table names its sources and keeps the entries of other architectures."""
    table = tmp_path / "table.json"
    old = [{"arch": "sm_80", "op": "merge_", "work": 3}, {"arch": "sm_90", "op": "merge_", "work": 4}]
    table.write_text(json.dumps({"entries": [dict(one, record="r") for one in old]}))
    entries = derived(write(tmp_path / "x", *pair(1, *FASTER)), table)
    assert [(e["arch"], e["op"]) for e in entries] == [("sm_80", "merge_"), ("sm_90", "lora_linear")]
    assert entries[1] == {
        "arch": "sm_90", "op": "lora_linear", "work": 16, "record": "lora_linear.jsonl",
        "device": "Abacus 9000", "commit": "abc", "cases": 1,
    }  # fmt: skip


class FakeGPU:
    """A machine on which Triton serves every call, and CUDA unless there is a reason why it cannot."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.cuda_reason: str | None = None
        backends = (("triton", lambda call: None), ("cuda", lambda call: self.cuda_reason))
        candidates = tuple(Candidate(name, name, supports, lambda *_: None) for name, supports in backends)
        patch.setattr(dispatch, "candidates", lambda op: candidates)

    def use_table(self, table: Path) -> None:
        self.patch.setattr(measured_choice, "TABLE", table)
        forget_choices()

    def choice(self, rows: int, arch: str = "sm_90") -> str:
        call = Call("cuda", torch.bfloat16, arch, choose.LinearShape(rows, 4, 4, 2))
        return dispatch.choose("lora_linear", "auto", call).backend


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGPU]:
    with monkeypatch.context() as patch:
        yield FakeGPU(patch)
    forget_choices()


def test_backend_follows_table(tmp_path: Path, gpu: FakeGPU):
    """The backend follows the table."""
    derived(write(tmp_path / "x", *pair(15, *FASTER)), tmp_path / "table.json")
    gpu.use_table(tmp_path / "table.json")
    assert [gpu.choice(rows) for rows in (16, 32)] == ["cuda", "triton"]
    assert gpu.choice(16, "sm_80") == "triton"


def test_incapable_not_preferred(tmp_path: Path, gpu: FakeGPU):
    """A backend that cannot serve a call is not preferred."""
    derived(write(tmp_path / "x", *pair(15, *FASTER)), tmp_path / "table.json")
    gpu.cuda_reason = "not built"
    gpu.use_table(tmp_path / "table.json")
    assert gpu.choice(16) == "triton"


def calls_into(file: str, run: Callable[[], object]) -> int:
    """How many calls of functions that are written in `file` there are."""
    calls = 0

    def note(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename == file

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return calls


def test_empty_table_unread(tmp_path: Path, gpu: FakeGPU):
    """Choices consult the table only while it has entries."""
    empty, filled = tmp_path / "empty.json", tmp_path / "filled.json"
    empty.write_text('{"entries": []}')
    derived(write(tmp_path / "x", *pair(15, *FASTER)), filled)
    for table, consulted in ((empty, False), (filled, True), (empty, False)):
        gpu.use_table(table)
        gpu.choice(1024)  # reads the table
        calls = calls_into(measured_choice.__file__, lambda: [gpu.choice(rows) for rows in (1, 16, 64)])
        assert (calls > 0) is consulted


def test_work_matches_call():
    """The records' shapes and the calls' tensors lead to the same number."""
    works = {}
    for suite in ("ewc_penalty", "fisher_accumulate", "merge", "lora_linear"):
        for one in planned(suite):
            works.setdefault(one.op, choose.work_of({"op": one.op, "shape": one.shape}))
    sizes = next(one.shape for one in planned("ewc_penalty") if one.op == "l1_penalty")
    lora_as = [torch.empty(int(sizes["rank"]), int(sizes["d_in"]), device="meta")] * int(sizes["adapters"])
    assert schemas._SIZES["l1_penalty"](([], lora_as))["work"] == works["l1_penalty"]
    sizes = planned("ewc_penalty")[0].shape
    fishers = [torch.empty(int(sizes["d_out"]), int(sizes["d_in"]), device="meta")] * int(sizes["adapters"])
    lora_as = [torch.empty(10, int(sizes["d_in"]), device="meta")] * len(fishers)
    told = schemas._SIZES["ewc_penalty"]((fishers, lora_as))
    assert told["work"] == works["ewc_penalty"]
    sizes = planned("fisher_accumulate")[0].shape
    leading = (int(sizes["samples"]), int(sizes["tokens"]))
    x, dy = (torch.empty(*leading, int(sizes[name]), device="meta") for name in ("d_in", "d_out"))
    assert schemas._SIZES["fisher_accumulate_"]((None, x, dy))["work"] == works["fisher_accumulate"]
    sizes = planned("merge")[0].shape
    weights = [torch.empty(int(sizes["d_out"]), int(sizes["d_in"]), device="meta")] * int(sizes["adapters"])
    assert schemas._SIZES["merge_"]((weights,))["work"] == works["merge"]
    sizes = planned("lora_linear")[0].shape
    x = torch.empty(int(sizes["rows"]), int(sizes["d_in"]), device="meta")
    weight = torch.empty(int(sizes["d_out"]), int(sizes["d_in"]), device="meta")
    shape = schemas._linear_shape(x, weight, [], 0.0)
    call = Call("cuda", torch.bfloat16, shape=shape)
    assert measured_choice.work(call) == works["lora_linear"]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([], "there are no records"),
        ([record(OURS, 1, 1.0)], "has both providers"),
        ([record(CUDA, 1, 1.0)], "has both providers"),
        ([*pair(1, 1.0, 2.0), *pair(2, 1.0, 2.0, environment=OTHER)], "several devices"),
        ([*pair(1, 1.0, 2.0), *pair(2, 1.0, 2.0, environment=LATER)], "several commits"),
        (pair(1, 1.0, 2.0, environment={**MACHINE, "capability": None}), "not measured on a GPU"),
        (pair(1, 1.0, 2.0, timing="wall"), "not measured on a GPU"),
        (pair(1, 1.0, 2.0, surprise=1), "not a record of this version"),
    ],
)  # fmt: skip
def test_undecided_records_refused(found, said: str, tmp_path: Path, capsys):
    """Records that decide nothing are refused in one sentence."""
    table = tmp_path / "table.json"
    table.write_text('{"entries": []}')
    assert choose.main([str(write(tmp_path / "x", *found)), "--table", str(table)]) == 1
    told = capsys.readouterr().err
    assert said in told and len(told.splitlines()) == 1
    assert table.read_text() == '{"entries": []}'


def test_cpu_records_refused(capsys):
    """The CPU records in this repository are refused."""
    table = measured_choice.TABLE.read_text()
    assert choose.main([str(ROOT / "benchmarks" / "results" / "cpu")]) == 1
    assert "not measured on a GPU" in capsys.readouterr().err
    assert measured_choice.TABLE.read_text() == table
