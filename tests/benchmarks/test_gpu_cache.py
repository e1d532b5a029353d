# SPDX-License-Identifier: Apache-2.0
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
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")

# In a process of its own, because this one interprets kernels. First what is noted; then two small kernels in
# place of everything are compiled and looked for, and again when all entries but one are deleted.
CODE = """
import itertools, pathlib, shutil, sys
import torch
from benchmarks.gpu import cache, launches, noting, sanitize, small_calls, tune
from fused_ewclora.backends import triton as hosts
from fused_ewclora.backends.candidate import forget_choices
from fused_ewclora.ops import dispatch

found = launches.noted("sm_90", ["calls", "graphs", "tune"])
names = [one.name for one in found.specialisations.values()]
print("complaints", found.complaints)
print("unwatched", set(names) - set(sanitize.watched("memcheck", "triton")))
print("missing", set(sanitize.kernels("triton")) - set(names))
print("keys", len(tune.keys("sm_90")), *sorted({key.kernel for key in tune.keys("sm_90")}))
print("tried", names.count("fisher_sample_kernel"))

def few(noted):
    for call in small_calls.calls():
        if call.name in ("soft_threshold_, float32", "soft_threshold_, bfloat16"):
            with noted.by(call.name, call.precision):
                call.method(small_calls.Values("meta", False), "triton")

launches.PARTS = {"few": few}
folder = pathlib.Path(sys.argv[1])
notes = list(launches.noted("sm_90").specialisations.values())
print("noted", len(notes))
print("filled", *cache.fill(notes, folder, 1, 600.0))
cache.finish(folder, ["sm_90"], False)
print("whole", cache.verify(folder, "sm_90", []))
print("files", *sorted({path.suffix for path in folder.rglob("*") if path.is_file()}))
for entry in cache.entries(folder)[1:]:
    shutil.rmtree(entry)
print("part", cache.verify(folder, "sm_90", []))

hosts.unavailable = lambda: None
forget_choices()
def empty(*shape): return torch.empty(shape, dtype=torch.bfloat16, device="meta")
sizes = (1, 200, 12608), (64, 1024), (96, 4096), (4, 70), (0.0, 0.1)
for rows, d_in, d_out, rank, p in itertools.product(*sizes):
    x, dy, weight = empty(rows, d_in), empty(rows, d_out), empty(d_out, d_in)
    adapters = [[empty(rank, d_in)], [empty(d_out, rank)], [None], [1.0], [0, 0, d_out], p, None]
    for asked in ("triton", "triton:addmm"):
        for op, args in (
            ("lora_linear", [x, weight, None, *adapters, asked]),
            ("lora_linear_backward", [dy, x, weight, None, None, *adapters, [True] * 5, asked]),
        ):
            chosen = dispatch.choose(op, asked, noting._call(op, args, "sm_90"))
            assert noting.serving(op, args, "sm_90").algorithm == chosen.algorithm
print("algorithms agree")
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the process says, by the first word of its lines."""
    command = [sys.executable, "-c", CODE, str(tmp_path_factory.mktemp("kernels") / "made")]
    ran = subprocess.run(command, cwd=ROOT, env={**os.environ, **HERE}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    words: dict[str, str] = {}
    for line in ran.stdout.splitlines():
        word, _, rest = line.partition(" ")
        words[word] = words.get(word, "") + rest
    return words


@needs_triton
def test_everything_noted(told: dict[str, str]):
    """Calls, graphs and tuning launch every kernel; each launch can be noted, and tools watch it."""
    assert told["complaints"] == "[]" and told["unwatched"] == told["missing"] == "set()"
    count, *kernels = told["keys"].split()
    assert 5 <= int(count) <= 10
    for name in ("lora_linear", "lowrank_rows", "ewc_penalty", "fisher_sample"):
        assert any(kernel.startswith(name) for kernel in kernels)
    assert int(told["tried"]) > 10


@needs_triton
def test_entries_found_elsewhere(told: dict[str, str]):
    """What is compiled here is found by Triton's own launches on the architecture, after a move; what is
    missing is noticed."""
    count = int(told["noted"])
    assert count >= 2 and told["filled"] == f"{count} []" and told["files"] == ".cubin .json"
    assert f"{count} of {count} launches find theirs" in told["sm_90:"] and told["whole"] == "0"
    assert f"1 of {count} launches find theirs" in told["sm_90:"] and told["part"] == "1"


@needs_triton
def test_same_algorithm_as_dispatch(told: dict[str, str]):
    """Noted calls take the algorithm that the dispatch takes on a GPU."""
    assert told["algorithms"] == "agree"


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


@pytest.fixture
def stamped(monkeypatch: pytest.MonkeyPatch):
    """This machine's Triton, in place of the real one."""
    monkeypatch.setattr(cache, "stamp", lambda arch: f"stamp of {arch}")
    monkeypatch.setattr(cache, "tools", lambda: "Triton 9.9 of Python 3.99")


def test_install_corrects_paths(stamped, tmp_path: Path):
    """An installed entry names the files beside it; what is there already stays."""
    source, target = folder_of(tmp_path / "made", {"sm_90": "stamp of sm_90"}), tmp_path / "target"
    for _ in range(2):
        assert "1 kernels were compiled beforehand" in cache.install(source, target, "sm_90")
        listed = json.loads((target / "KEY" / "__grp__k.json").read_text())["child_paths"]
        assert listed == {name: str(target / "KEY" / name) for name in ("k.cubin", "k.json")}
        (target / "KEY" / "k.cubin").write_bytes(b"new")
    assert (target / "KEY" / "k.cubin").read_bytes() == b"new"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_other_triton_refused(arch: str, stamped, tmp_path: Path):
    """Entries for another Triton, Python or architecture are left, with the reason."""
    source = folder_of(tmp_path / "made", {"sm_90": "another stamp"})
    told = cache.install(source, tmp_path / "target", arch)
    assert (
        f"made by Triton 1.0 of Python 3.9 for sm_90, here are Triton 9.9 of Python 3.99 and {arch}" in told
    )
    assert not (tmp_path / "target").exists()
    assert "make gpu-cache" in cache.install(tmp_path / "nothing", tmp_path / "target", arch)


@needs_triton
def test_complete_folder(stamped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing is compiled on the device only where the folder has everything of these very sources."""
    monkeypatch.setattr(cache, "LAUNCHERS", (3, 0))
    folder = folder_of(tmp_path / "made", {"sm_90": "stamp of sm_90"})
    assert not cache.complete(folder, "sm_90") and not cache.complete(tmp_path, "sm_90")
    monkeypatch.setattr(cache, "sources", lambda: "s")
    assert cache.complete(folder, "sm_90") and not cache.complete(folder, "sm_80")
    monkeypatch.setattr(cache, "LAUNCHERS", (99, 0))
    assert not cache.complete(folder, "sm_90")


def test_kernels_step_rehearsed(tmp_path: Path):
    """A rehearsal prepares no kernels, and says why."""
    args = gpu_check.arguments(["--out", str(tmp_path / "out"), "--rehearse", "--steps", "kernels"])
    (one,) = gpu_check.plan(args, tmp_path)
    outcome = steps.run(one, steps.Deadline(200.0), ROOT)
    assert outcome.status == steps.SKIPPED and "a rehearsal interprets kernels" in outcome.detail
