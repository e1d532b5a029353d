"""What the GPU check launches, noted and compiled without a GPU, and found where Triton looks for it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_check, steps
from benchmarks.gpu import cache

ROOT = Path(__file__).resolve().parents[2]
HERE = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "TRITON_INTERPRET": "0"}
needs_compiler = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")


def run(code: str, *more: str) -> str:
    """What a process prints that compiles kernels, which this one interprets."""
    command = [sys.executable, "-c", code, *more]
    ran = subprocess.run(command, cwd=ROOT, env={**os.environ, **HERE}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout


# Two small kernels in place of everything; then all entries but one are deleted.
FEW = """
import pathlib, shutil, sys
from benchmarks.gpu import cache, launches, small_calls

def few(noted):
    for call in small_calls.calls():
        if call.name in ("soft_threshold_, float32", "soft_threshold_, bfloat16"):
            with noted.by(call.name, call.precision):
                call.method(small_calls.Values("meta", False), "triton")

launches.PARTS = {"few": few}
folder = pathlib.Path(sys.argv[1])
if __name__ == "__main__":
    notes = list(launches.noted("sm_90").specialisations.values())
    print("noted", len(notes))
    print("filled", *cache.fill(notes, folder, 1, 600.0))
    made = cache.finish(folder, ["sm_90"], False)
    print("whole", cache.verify(folder, "sm_90", []))
    for entry in cache.entries(folder)[1:]:
        shutil.rmtree(entry)
    print("part", cache.verify(folder, "sm_90", []))
"""


@needs_compiler
def test_entries_found_elsewhere(tmp_path: Path):
    """What is compiled here is found by Triton's own launches on the architecture, after a move; what is
    missing is noticed."""
    folder = tmp_path / "made"
    told = run(FEW, str(folder)).splitlines()
    count = int(next(line for line in told if line.startswith("noted")).split()[1])
    assert count >= 2 and f"filled {count} []" in told
    assert f"sm_90: {count} kernels were compiled beforehand; {count} of {count} launches find theirs" in told[2]
    assert "whole 0" in told and "part 1" in told and f"; 1 of {count} launches" in told[-2]
    names = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert names <= {".json", ".cubin"}


NOTED = """
from benchmarks.gpu import launches, sanitize, tune
found = launches.noted("sm_90", ["calls", "graphs", "fisher_accumulate", "merge", "tune"])
print("complaints", found.complaints)
names = {one.name for one in found.specialisations.values()}
print("unwatched", names - set(sanitize.watched("memcheck", "triton")))
print("missing", set(sanitize.kernels("triton")) - names)
keys = tune.keys("sm_90")
print("keys", len(keys), sorted({key.kernel.partition("_kernel")[0] for key in keys}))
tried = sum(one.name == "fisher_sample_kernel" for one in found.specialisations.values())
print("tried", tried)
"""


@needs_compiler
def test_everything_noted():
    """Calls, graphs and tuning launch every kernel, and each launch can be noted."""
    told = dict(line.split(" ", 1) for line in run(NOTED).splitlines())
    assert told["complaints"] == "[]" and told["unwatched"] == told["missing"] == "set()"
    count, kernels = told["keys"].split(" ", 1)
    assert 5 <= int(count) <= 10
    for name in ("lora_linear", "lowrank_rows", "ewc_penalty", "fisher_sample"):
        assert name in kernels
    assert int(told["tried"]) > 10


CHOSEN = """
import itertools, torch
from benchmarks.gpu import noting
from fused_ewclora.backends import triton as hosts
from fused_ewclora.ops import dispatch, schemas
hosts.unavailable = lambda: None
for rows, d_in, d_out, rank, p in itertools.product((1, 200, 12608), (64, 1024), (96, 4096), (4, 70), (0.0, 0.1)):
    def empty(*shape): return torch.empty(shape, dtype=torch.bfloat16, device="meta")
    x, dy, weight = empty(rows, d_in), empty(rows, d_out), empty(d_out, d_in)
    adapters = [[empty(rank, d_in)], [empty(d_out, rank)], [None], [1.0], [0, 0, d_out], p, None]
    for asked in ("triton", "triton:addmm"):
        for op, args in (
            ("lora_linear", [x, weight, None, *adapters, asked]),
            ("lora_linear_backward", [dy, x, weight, None, None, *adapters, [True] * 5, asked]),
        ):
            call = noting._call(op, args, "sm_90")
            assert noting.serving(op, args, "sm_90").algorithm == dispatch.choose(op, asked, call).algorithm
"""


@needs_compiler
def test_same_algorithm_as_dispatch():
    """Noted calls take the algorithm that the dispatch takes on a GPU."""
    run(CHOSEN)


# Taking over


def folder_of(path: Path, stamps: dict[str, str]) -> Path:
    """A folder as it is after a move: files name their old places."""
    entry = path / "KEY"
    entry.mkdir(parents=True)
    (entry / "k.cubin").write_bytes(b"code")
    (entry / "k.json").write_text("{}")
    paths = {name: f"/elsewhere/KEY/{name}" for name in ("k.cubin", "k.json", "k.source")}
    (entry / "__grp__k.json").write_text(json.dumps({"child_paths": paths}))
    made = {"tools": "Triton 1.0 of Python 3.9", "stamps": stamps, "sources": "s", "entries": 1, "bytes": 4}
    (path / cache.MADE_FOR).write_text(json.dumps(made))
    return path


def test_install_corrects_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An installed entry names the files beside it; what is there already stays."""
    monkeypatch.setattr(cache, "stamp", lambda arch: f"stamp of {arch}")
    source, target = folder_of(tmp_path / "made", {"sm_90": "stamp of sm_90"}), tmp_path / "target"
    for _ in range(2):
        assert "1 kernels were compiled beforehand" in cache.install(source, target, "sm_90")
        listed = json.loads((target / "KEY" / "__grp__k.json").read_text())["child_paths"]
        assert listed == {name: str(target / "KEY" / name) for name in ("k.cubin", "k.json")}
        (target / "KEY" / "k.cubin").write_bytes(b"new")
    assert (target / "KEY" / "k.cubin").read_bytes() == b"new"


@pytest.mark.parametrize(("arch", "what"), [("sm_80", "here are"), ("sm_90", "made by Triton 1.0 of Python 3.9")])
def test_other_triton_refused(arch: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Entries for another Triton, Python or architecture are left, with the reason."""
    monkeypatch.setattr(cache, "stamp", lambda arch: f"stamp of {arch}")
    source = folder_of(tmp_path / "made", {"sm_90": "another stamp"})
    told = cache.install(source, tmp_path / "target", arch)
    assert "of no use" in told and what in told and not (tmp_path / "target").exists()
    assert "make gpu-cache" in cache.install(tmp_path / "nothing", tmp_path / "target", arch)


@needs_compiler
def test_complete_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing is compiled on the device only where the folder has everything of these very sources."""
    monkeypatch.setattr(cache, "stamp", lambda arch: f"stamp of {arch}")
    monkeypatch.setattr(cache, "LAUNCHERS", (3, 0))
    folder = folder_of(tmp_path / "made", {"sm_90": "stamp of sm_90"})
    assert not cache.complete(folder, "sm_90") and not cache.complete(tmp_path, "sm_90")
    monkeypatch.setattr(cache, "sources", lambda: "s")
    assert cache.complete(folder, "sm_90") and not cache.complete(folder, "sm_80")
    monkeypatch.setattr(cache, "LAUNCHERS", (99, 0))
    assert not cache.complete(folder, "sm_90")


def test_kernels_step_without_gpu(tmp_path: Path):
    """Without a GPU the step that prepares kernels is skipped."""
    args = gpu_check.arguments(["--out", str(tmp_path / "out"), "--rehearse", "--steps", "kernels"])
    (one,) = gpu_check.plan(args, tmp_path)
    outcome = steps.run(one, steps.Deadline(60.0), ROOT)
    assert outcome.status == steps.SKIPPED and "a rehearsal interprets kernels" in outcome.detail
