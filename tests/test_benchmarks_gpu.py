"""The GPU check can run unattended: its plans, records, verdicts and driver, without a GPU."""

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

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # benchmarks are not installed
    sys.path.append(str(ROOT))

from benchmarks import goals, gpu_check, harness, machine, predict, records, shapes, steps, summary  # noqa: E402
from benchmarks.case import OURS, Case, Provider, Target  # noqa: E402
from benchmarks.clock import WallClock  # noqa: E402
from benchmarks.extras import Unavailable  # noqa: E402
from benchmarks.gpu.__main__ import NAMES, broken, done, marker, planned  # noqa: E402
from benchmarks.place import Place  # noqa: E402
from benchmarks.suites import SUITES  # noqa: E402
from benchmarks.workload import LATER, OP, SMALL, matrices  # noqa: E402
from benchmarks.workloads import label_of  # noqa: E402

PARAMETERS = {"ViT-B/16": 14.2e6, "ViT-L/16": 50.3e6, "ViT-H/14": 104.9e6}  # of all k and v together


# Plans


@pytest.mark.parametrize("suite", NAMES)
@pytest.mark.parametrize("rehearsal", [False, True])
def test_a_plan_lists_every_part_once(suite: str, rehearsal: bool):
    parts = [(records.key(vars(one)), marker(one)) for one in planned(suite, rehearsal)]
    assert parts and len(set(parts)) == len(parts)


def test_a_gpu_runs_the_suites_that_a_cpu_runs():
    assert set(NAMES) == set(gpu_check.SUITE_LIMITS) == set(SUITES) - {"growth"}
    for suite in NAMES:
        kinds = [{(one.op, one.part) for one in planned(suite, rehearsal)} for rehearsal in (False, True)]
        assert kinds[1] <= kinds[0] and {op for op, _ in kinds[1]} == {op for op, _ in kinds[0]}
        assert {part for _, part in kinds[0]} - {part for _, part in kinds[1]} <= {SMALL}


def test_shapes_are_those_of_the_models():
    sizes = shapes.RELEASE
    for model in sizes.models:
        by_label = {label_of(model, name): size for name, size in model.linears().items()}
        for one in planned("lora_linear"):
            if one.shape["model"] in by_label:
                assert (one.shape["d_in"], one.shape["d_out"]) == by_label[str(one.shape["model"])]
                few, many = (1, sizes.base.tokens, 8 * sizes.base.tokens), sizes.samples * model.tokens
                assert one.shape["rows"] in (few if one.part == SMALL else (many,))
        block = sum(d_in * d_out for d_in, d_out in model.linears().values())
        assert block == 12 * model.width**2
        penalties = [one for one in planned("ewc_penalty") if one.part not in (SMALL, OP)]
        counted = {label: {sum(o * i for o, i in matrices(one)) for one in penalties
                           if one.shape["model"] == label_of(model, label)}
                   for label in ("k,v", "all linears")}  # fmt: skip
        (kv,) = counted["k,v"]
        assert kv == pytest.approx(PARAMETERS[model.name], rel=0.01)
        assert counted["all linears"] <= {model.depth * block}
        assert counted["all linears"] or model is not sizes.large


def test_every_target_finds_its_cases_in_the_plans():
    for goal in goals.goals():
        cases = {
            records.key(vars(one))
            for one in planned(goal.suite)
            if goals.matches({"op": one.op, "dtype": one.dtype, "shape": one.shape}, goal.where)
        }
        assert len(cases) == goal.cases, goal


# Records and verdicts


def record(provider: str, seconds: float, role: str = "peer", **more: object) -> dict:
    shape = more.pop("shape", {"model": "m"})
    return {
        "op": "x", "shape": shape, "dtype": "bfloat16", "provider": provider, "role": role, "timing": "graph",
        "seconds": {"p20": seconds, "p50": seconds, "p80": seconds}, **more,
    }  # fmt: skip


def case(*runs: Provider, **more: object) -> Case:
    exact = torch.arange(4.0, dtype=torch.float64)
    return Case("x", {"n": 4}, "float32", 8.0, 16.0, runs, lambda: [exact], 1e-6, **more)


def test_the_records_in_the_repository_fit_the_schema():
    paths = sorted((ROOT / "benchmarks" / "results").rglob("*.jsonl"))
    assert paths
    for path in paths:
        found = records.read(path)
        assert found and not [v for r in found for v in records.violations(r)], path


def test_measured_and_failed_records_fit_the_schema(tmp_path: Path):
    def crash() -> list[torch.Tensor]:
        raise ValueError("no such kernel")

    right, wrong = torch.arange(4.0), torch.full((4,), torch.nan)
    providers = [
        Provider(OURS, lambda: [right], "ours"),
        Provider("crashes", crash),
        Provider("wrong", lambda: [wrong]),
        Provider("of equal size", lambda: [wrong], "floor"),
    ]
    found = harness.measure(case(*providers, floor_bytes=64.0), 0.0, {"copy": 1e9, "fp32": 1e9})
    harness.append(tmp_path / "x.jsonl", found, {"time": "now", "environment": dict.fromkeys(
        ("device", "torch", "python", "commit"))})  # fmt: skip
    read = {r["provider"]: r for r in records.read(tmp_path / "x.jsonl")}
    assert not [v for r in read.values() for v in records.violations(r)]
    assert "no such kernel" in read["crashes"]["failed"] and "nan" in read["wrong"]["failed"]
    assert read[OURS]["error_fp64"] == 0.0 and read["of equal size"]["error_fp64"] is None
    assert read[harness.FLOOR]["seconds"]["p50"] == pytest.approx(64e-9)
    assert read[OURS]["fraction_of_ceiling"] == pytest.approx(16e-9 / read[OURS]["seconds"]["p50"])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"op": None}, "record.op"),
        ({"provider": 3}, "record.provider"),
        ({"seconds": {"p20": 1.0, "p50": 1.0}}, "p80 is missing"),
        ({"seconds": {"p20": 1.0, "p50": float("nan"), "p80": 1.0}}, "record.seconds.p50"),
        ({"role": "friend"}, "none of"),
        ({"rounds": -1}, "< 0"),
        ({"surprise": 1}, "surprise is not described"),
    ],
)
def test_a_record_that_breaks_the_schema_is_noticed(change: dict, complaint: str):
    good = records.read(ROOT / "benchmarks" / "results" / "cpu" / "lora_linear.jsonl")[0]
    assert not list(records.violations(good))
    assert any(complaint in v for v in records.violations({**good, **change}))
    assert any("is missing" in v for v in records.violations({k: v for k, v in good.items() if k != "flops"}))


def test_an_unfinished_last_line_is_left_out(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"op": 1}\n{"op": ')
    assert records.read(path) == [{"op": 1}]
    path.write_text('{"op": \n{"op": 1}\n')
    with pytest.raises(json.JSONDecodeError):
        records.read(path)


def test_rotated_buffers_share_a_sample():
    calls: list[int] = []
    prepared = WallClock().prepare([lambda: calls.append(0), lambda: calls.append(1)])
    calls.clear()
    prepared.once()
    assert calls == [0, 1] and prepared.share == 2


def test_a_device_that_is_lost_keeps_the_records():
    class Lost(WallClock):
        def check(self) -> None:
            raise RuntimeError("illegal memory access")

    with pytest.raises(harness.DeviceLost) as lost:
        harness.measure(case(Provider(OURS, lambda: [torch.arange(4.0)], "ours")), 0.0, {}, Lost())
    assert [r["provider"] for r in lost.value.records] == [OURS]
    assert "illegal" in lost.value.records[0]["failed"]


@pytest.mark.parametrize(
    ("target", "ratio", "met"),
    [
        (Target("slow", 1 / 2, ""), 0.25, True),
        (Target("best peer", 1 / 2, ""), 1.0, False),
        (Target("best peer", 1.0, ""), 1.0, True),
        (Target("absent", 1.0, ""), None, False),
        (Target(None, 0.0, "", "peak_bytes"), 7.0, False),
        (Target(None, 0.0, "", "peak_bytes", allowance=7.0), 1.0, True),
        (Target("slow", 1.0, "", "peak_bytes", allowance=5.0), 1.0, True),
    ],
)
def test_a_target_compares_sums_over_cases(target: Target, ratio: float | None, met: bool):
    one = {
        OURS: record(OURS, 1.0, "ours", peak_bytes=3),
        "slow": record("slow", 2.0, peak_bytes=2),
        "fast": record("fast", 0.5),
        "floor": record("floor", 0.1, "floor"),
        f"{OURS}, forced": record(f"{OURS}, forced", 0.2, "variant"),
    }
    two = {
        OURS: record(OURS, 1.0, "ours", peak_bytes=4), "slow": record("slow", 6.0, peak_bytes=0),
        "fast": record("fast", 1.5),
    }  # fmt: skip
    row = harness.verdict(target, [one, two], OURS)
    assert row["met"] is met
    if ratio is None:
        assert row["ratio"] != row["ratio"]
    elif target.allowance != 5.0:
        assert row["ratio"] == pytest.approx(ratio)


def synthetic(ours: float) -> list[dict]:
    """ViT-L's four linears, frozen at 1 second each."""
    found = []
    for one in planned("lora_linear"):
        if one.op == "lora_linear" and str(one.shape["model"]).startswith("ViT-L") and one.part != LATER:
            for name, role, seconds in (
                (OURS, "ours", ours), (goals.FROZEN, "floor", 1.0), (goals.COMPOSITION, "peer", 1.9),
            ):  # fmt: skip
                found.append({**record(name, seconds, role, shape=one.shape), "op": one.op})
    return found


@pytest.mark.parametrize(("ours", "word"), [(1.2, "PASS"), (1.3, "FALL SHORT")])
def test_the_summary_says_which_targets_are_met(ours: float, word: str):
    found = {"lora_linear": synthetic(ours)}
    text, verdicts = summary.targets(goals.goals(), found)
    line = next(line for line in text if "ViT-L/16 four linears, fwd+bwd, x frozen" in line)
    assert line.split("ViT-L")[0].strip() == word and f"{ours:.3f}" in line
    assert verdicts.count(summary.MISSING) == len(verdicts) - 2  # nothing else was measured
    table = "\n".join(summary.tables(found))
    assert "ViT-L fc1 12608 16 bf16" in table and "ViT-L fc1 12608 bwd 16 bf16" in table
    assert f"frozen {ours:.2f}" in table


def test_a_target_with_a_missing_case_is_not_met():
    found = [r for r in synthetic(0.5) if r["shape"]["model"] != "ViT-L fc2"]
    assert summary.PASS not in summary.targets(goals.goals(), {"lora_linear": found})[1]


def test_failures_of_peers_are_not_ours():
    found = [{"provider": role, "role": role, "failed": "x"} for role in ("ours", "variant", "floor", "peer")]
    assert [r["role"] for r in broken(found)] == ["ours", "variant", "floor"]
    missing = {"provider": OURS, "role": "ours", "failed": f"{Unavailable.__name__}: timm is not installed"}
    assert not broken([missing])


# Steps and the driver


def step(code: str, log: Path, name: str = "a step", limit: float = 20.0, **more: object) -> steps.Step:
    return steps.Step(name, [sys.executable, "-c", code], limit, log, **more)


@pytest.mark.parametrize(
    ("code", "status", "detail"), [("pass", steps.OK, ""), ("exit(4)", steps.FAILED, "exit status 4")]
)
def test_the_exit_status_of_a_step_decides(code: str, status: str, detail: str, tmp_path: Path):
    outcome = steps.run(step(f"print('hello'); {code}", tmp_path / "log"), steps.Deadline(60.0), ROOT)
    assert (outcome.status, outcome.detail) == (status, detail)
    assert "hello" in (tmp_path / "log").read_text()
    assert (outcome.notes[-1:] == ("hello",)) is (status == steps.FAILED)


def test_a_command_that_does_not_exist_is_an_outcome(tmp_path: Path):
    missing = steps.Step("x", [str(tmp_path / "nothing")], 5.0, tmp_path / "log")
    assert steps.run(missing, steps.Deadline(60.0), ROOT).status == steps.FAILED


def lives(process: int) -> bool:
    try:
        told = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return told.rpartition(")")[2].split()[0] != "Z"


def test_a_step_is_interrupted_first_and_its_children_end_with_it(tmp_path: Path):
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


def test_the_deadline_cuts_later_steps_short(tmp_path: Path):
    deadline = steps.Deadline(6.0, reserve=0.0)
    slow = "import time; time.sleep(60)"
    first = steps.run(step(slow, tmp_path / "log", limit=60.0), deadline, ROOT, grace=1.0)
    second = steps.run(step("pass", tmp_path / "log"), deadline, ROOT)
    assert (first.status, second.status) == (steps.TIMED_OUT, steps.NOT_RUN)


def test_a_step_runs_again_after_the_status_that_asks_for_it(tmp_path: Path):
    mark = tmp_path / "mark"
    code = f"import pathlib; p = pathlib.Path({str(mark)!r}); n = p.exists(); p.touch(); exit(0 if n else 75)"
    assert steps.run(step(code, tmp_path / "log", again=75), steps.Deadline(60.0), ROOT).status == steps.OK
    assert (tmp_path / "log").read_text().count("$ ") == 2
    endless = steps.run(step("exit(75)", tmp_path / "log", again=75), steps.Deadline(60.0), ROOT)
    assert endless.status == steps.FAILED


def test_a_run_ended_from_outside_still_leaves_a_summary(tmp_path: Path):
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


def test_counts_and_names_of_failures_come_from_the_report(tmp_path: Path):
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


def test_records_of_an_earlier_run_are_not_mixed_in(tmp_path: Path):
    (tmp_path / "merge.jsonl").touch()
    with pytest.raises(SystemExit):
        gpu_check.arguments(["--out", str(tmp_path)])


def test_long_logs_are_cut_in_the_middle(tmp_path: Path):
    log = tmp_path / "log"
    log.write_text("first" + "x" * 5000 + "last")
    gpu_check.shorten(log, 1000)
    text = log.read_text()
    assert len(text) < 1000 and text.startswith("first") and text.endswith("last")


def test_make_starts_the_check_without_an_environment_of_its_own():
    told = subprocess.run(
        ["make", "--dry-run", "gpu-check", "OUT=somewhere", "PYTHON=pythonX"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "pythonX -m benchmarks.gpu_check --out somewhere" in told
    assert "venv" not in told and "pip" not in told and "setup.py" not in told


def test_a_missing_gpu_ends_the_run_at_once(tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 1 and "no CUDA device" in ran.stdout
    assert "tests" not in {path.stem for path in tmp_path.iterdir()}


def test_a_rehearsal_runs_every_step_and_provider(tmp_path: Path):
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
    assert machine.version("a distribution that nobody installed") is None


@pytest.mark.parametrize("suite", NAMES)
def test_only_ours_carry_a_prediction(suite: str):
    one = predict.filled(SUITES[suite].build(planned(suite, True)[0], Place("cpu", True)))
    for provider in one.providers:
        assert bool(provider.predicted) is (provider.role in ("ours", "variant")), provider.name
