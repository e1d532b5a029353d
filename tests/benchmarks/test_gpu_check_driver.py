# SPDX-License-Identifier: Apache-2.0
"""The driver of the GPU check: steps with limits, reports, and a whole rehearsal without a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import budgets
import pytest
import torch

from benchmarks import collection, compare, gpu_check, keep, plot, records, report, steps
from benchmarks.gpu.__main__ import NAMES, done, planned
from fused_ewclora.demo.environment import installed_version

ROOT = Path(__file__).resolve().parents[2]


def step(code: str, log: Path, name: str = "a step", limit: float = 20.0, **more: object) -> steps.Step:
    return steps.Step(name, [sys.executable, "-c", code], limit, log, **more)


@pytest.mark.parametrize(
    ("code", "status", "detail"), [("pass", steps.OK, ""), ("exit(4)", steps.FAILED, "exit status 4")]
)
def test_exit_status(code: str, status: str, detail: str, tmp_path: Path):
    """The exit status of a step decides its outcome."""
    outcome = steps.run(step(f"print('hello'); {code}", tmp_path / "log"), steps.Deadline(60.0), ROOT)
    assert (outcome.status, outcome.detail) == (status, detail)
    assert "hello" in (tmp_path / "log").read_text()
    assert (outcome.notes[-1:] == ("hello",)) is (status == steps.FAILED)


def test_unknown_command(tmp_path: Path):
    """A command that does not exist is an outcome, not an error."""
    missing = steps.Step("x", [str(tmp_path / "nothing")], 5.0, tmp_path / "log")
    assert steps.run(missing, steps.Deadline(60.0), ROOT).status == steps.FAILED


def lives(process: int) -> bool:
    try:
        told = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return told.rpartition(")")[2].split()[0] != "Z"


def test_interrupt_kills_children(tmp_path: Path):
    """A step is interrupted first, and its children end with it."""
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('child', child.pid, flush=True)\n"
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: print('reports', flush=True); time.sleep(60)"
    )
    begin = time.monotonic()
    outcome = steps.run(step(code, tmp_path / "log", limit=6.0), steps.Deadline(60.0), ROOT, grace=3.0)
    assert outcome.status == steps.TIMED_OUT and time.monotonic() - begin < 20.0
    told = (tmp_path / "log").read_text()
    assert "reports" in told
    child = int(re.search(r"child (\d+)", told)[1])
    end = time.monotonic() + 10.0  # a process that was killed goes when the scheduler gets to it
    while lives(child) and time.monotonic() < end:
        time.sleep(0.1)
    assert not lives(child)


def test_deadline_shortens_steps(tmp_path: Path):
    """The deadline cuts later steps short."""
    deadline = steps.Deadline(6.0, reserve=0.0)
    slow = "import time; time.sleep(60)"
    first = steps.run(step(slow, tmp_path / "log", limit=60.0), deadline, ROOT, grace=1.0)
    second = steps.run(step("pass", tmp_path / "log"), deadline, ROOT)
    assert (first.status, second.status) == (steps.TIMED_OUT, steps.NOT_RUN)


def test_rerun_status(tmp_path: Path):
    """A step runs again after the status that asks for it."""
    mark = tmp_path / "mark"
    code = f"import pathlib; p = pathlib.Path({str(mark)!r}); n = p.exists(); p.touch(); exit(0 if n else 75)"
    assert steps.run(step(code, tmp_path / "log", again=75), steps.Deadline(60.0), ROOT).status == steps.OK
    assert (tmp_path / "log").read_text().count("$ ") == 2
    endless = steps.run(step("exit(75)", tmp_path / "log", again=75), steps.Deadline(60.0), ROOT)
    assert endless.status == steps.FAILED


def test_killed_leaves_summary(tmp_path: Path):
    """A run ended from outside still leaves a summary."""
    code = (
        "import signal, sys, benchmarks.gpu_check as g, benchmarks.steps as s\n"
        "def todo(args, work):\n"
        "    yield s.Step('first', [sys.executable, '-c', 'exit(1)'], 20.0, work / 'first.log')\n"
        "    wait = 'import time; time.sleep(60)'\n"
        "    yield s.Step('long', [sys.executable, '-c', wait], 60.0, work / 'long.log')\n"
        "def interrupt(*_): raise KeyboardInterrupt\n"
        "signal.signal(signal.SIGTERM, interrupt)\n"
        f"raise SystemExit(g.check(g.arguments(['--out', {str(tmp_path)!r}]), todo))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:  # of the first step
        assert line.startswith("first") and "failed" in line
        break
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(r"the run +timed out", (tmp_path / "summary.txt").read_text())
    assert (tmp_path / "details.tar.gz").stat().st_size > 0


def test_report_failure_counts(tmp_path: Path):
    """Counts and names of failures come from the report."""
    xml = tmp_path / "x.xml"
    body = '<testcase classname="t" name="{}"/>'
    xml.write_text(
        f'<testsuites><testsuite tests="1" failures="0" errors="0">{body}</testsuite></testsuites>'
    )
    cut = steps.Outcome("tests", steps.TIMED_OUT, 1.0, "stopped")
    assert gpu_check.judged(cut, xml).status == gpu_check.PARTIAL
    assert gpu_check.judged(cut, tmp_path / "none.xml").status == steps.TIMED_OUT
    flaw = '<testcase classname="t" name="bad"><failure message="1 != 2&#10;more"/></testcase>'
    xml.write_text(
        f'<testsuites><testsuite tests="1" failures="1" errors="0">{flaw}</testsuite></testsuites>'
    )
    judged = gpu_check.judged(cut, xml)
    assert judged.status == steps.TIMED_OUT and "1 failures" in judged.detail and "1 != 2" in judged.notes[0]


def test_earlier_records_excluded(tmp_path: Path):
    """Records of an earlier run are not mixed in."""
    (tmp_path / "merge.jsonl").touch()
    with pytest.raises(SystemExit):
        gpu_check.arguments(["--out", str(tmp_path)])


def test_long_logs_cut(tmp_path: Path):
    """Long logs are cut in the middle."""
    log = tmp_path / "log"
    log.write_text("first" + "x" * 5000 + "last")
    gpu_check.shorten(log, 1000)
    text = log.read_text()
    assert len(text) < 1000 and text.startswith("first") and text.endswith("last")


def test_make_without_venv():
    """The Makefile starts the check without creating an environment of its own."""
    told = subprocess.run(
        ["make", "--dry-run", "gpu-check", "OUT=somewhere", "PYTHON=pythonX"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "pythonX -m benchmarks.gpu_check --out somewhere" in told
    assert "venv" not in told and "pip" not in told and "setup.py" not in told


def test_missing_gpu_stops(tmp_path: Path):
    """A missing GPU ends the run at once."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 1 and "no CUDA device" in ran.stdout
    assert "tests" not in {path.stem for path in tmp_path.iterdir()}


def check_that_every_tool_reads(out: Path, tmp_path: Path) -> None:
    """The records of a rehearsal, as if they had been measured: kept, reported, drawn, compared."""
    of_gpu = {"device": "a GPU", "capability": "9.0", "cuda": "13.0"}
    (tmp_path / "as-if").mkdir()
    for suite in NAMES:
        found = records.read(out / f"{suite}.jsonl")
        found = [{**r, "environment": {**r["environment"], **of_gpu}, "timing": "graph"} for r in found]
        (tmp_path / "as-if" / f"{suite}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    keep.keep(tmp_path / "as-if", tmp_path / "results")
    kept = collection.load(tmp_path / "results" / "a-gpu")
    text = report.generate(tmp_path / "results")
    assert "## a GPU" in text and "### Targets" in text
    ops = {one.op for suite in NAMES for one in planned(suite, True)}
    assert all(f"### {op}\n" in text for op in ops)
    assert {picture.op for picture in plot.planned(kept)} == {"", *ops}
    assert compare.compare(kept, kept).status == 0


@pytest.mark.skipif(not budgets.LONG, reason="two minutes; each step has tests of its own")
def test_full_rehearsal(tmp_path: Path):
    """The whole driver in a copy of the sources, where nothing was built."""
    copy, out = tmp_path / "checkout", tmp_path / "out"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "results", "*.so", "__pycache__", "*-output")
    shutil.copytree(ROOT, copy, ignore=left_out)
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(out), "--rehearse"]
    command += ["--budget", "900", "--seconds", "0.001"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, f"{ran.stdout[-6000:]}\n{ran.stderr[-2000:]}"
    assert (out / "summary.txt").read_text() in ran.stdout
    assert len(list(out.iterdir())) <= 8
    for suite in NAMES:
        found = records.read(out / f"{suite}.jsonl")
        assert not [v for r in found for v in records.violations(r)]
        assert all(r["role"] == "peer" and "Unavailable" in r["failed"] for r in found if "failed" in r)
        assert all(done(one, found) for one in planned(suite, True))
    check_that_every_tool_reads(out, tmp_path)
    assert installed_version("a distribution that nobody installed") is None
