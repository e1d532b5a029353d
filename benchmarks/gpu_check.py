# SPDX-License-Identifier: Apache-2.0
"""Checks and measures the GPU kernels unattended: `python -m benchmarks.gpu_check --out DIR`.

Needs PyTorch and Triton in the running interpreter, builds the CUDA extension in the checkout, installs
nothing, and leaves at most eight files in DIR (docs/gpu-check.md). Exit status 0: everything passed; 1: a
step or one of our kernels failed; 2: only targets were missed or not measured.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import signal
import sys
import tarfile
import tempfile
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import records, steps, summary
from .collection import PASS
from .steps import Deadline, Outcome, Step

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 520.0
PARTIAL = "partial"  # a test run without failures that ran out of time
# Test files, by their paths in tests/. Those of the kernels are these, and all of backends/.
KERNELS = (
    "ops/test_lora_linear.py", "ops/test_ewc_penalty.py", "ops/test_ewc_penalty_grad.py",
    "ops/test_fisher_accumulate.py", "ops/test_structured_penalty.py", "ops/test_fisher_sums.py",
    "ops/test_l1_penalty.py",
    "ops/test_merge_weights.py", "ops/test_merge_grouped.py",
    "ops/test_dropout.py", "reference/test_philox.py", "ops/test_compile.py", "ops/test_autocast.py",
)  # fmt: skip
REQUIRED = ("pytest", "hypothesis")  # by the tests
HOST = ("backends/cuda/test_build.py",)  # compile for minutes and need no GPU: after everything else
ELSEWHERE = (  # not run here: need a build or model libraries, or test this driver
    "project/test_packaging.py",
    "benchmarks/test_gpu.py",
    "benchmarks/test_gpu_check_",
    "backends/test_choose.py",
    "integrations/",
)
SUITE_LIMITS = {
    "lora_linear": 80.0,
    "ewc_penalty": 45.0,
    "fisher_accumulate": 30.0,
    "end_to_end": 30.0,
    "merge": 15.0,
}
EVERYTHING = "all tests"
OF_CUDA = "cuda calls"
SLOWER = 4.0  # limits of a rehearsal, on a CPU that may be busy
NAMES = (  # of steps, in order of value
    "environment",
    "kernels",
    "calls",
    "build",
    OF_CUDA,
    "graphs",
    "tests",
    "sanitize",
    "ceilings",
    *SUITE_LIMITS,
    "tune",
    EVERYTHING,
)
CACHE = ROOT / "build" / "gpu-cache"  # kernels that were compiled beforehand, by make gpu-cache
KERNELS_FOLDER = ROOT / "build" / "gpu-kernels"  # Triton's cache of a check, with those
LARGEST = 15 << 20  # bytes of a file in DIR
NO_GPU = "exit status 3"


def test_files() -> tuple[list[str], list[str]]:
    """Test files of the kernels, and others; HOST in neither."""
    folder = ROOT / "tests"
    everything = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("test_*.py"))]
    everything = [name for name in everything if not name.startswith((*ELSEWHERE, *HOST))]
    first = [*KERNELS, *(name for name in everything if name.startswith("backends/"))]
    return first, [name for name in everything if name not in first]


def missing() -> str | None:
    """Why tests cannot run, or None."""
    absent = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def pytest_command(files: Sequence[str], report: Path, workers: int, few: bool) -> list[str]:
    if reason := missing():
        return [sys.executable, "-c", f"print({reason!r}); raise SystemExit({steps.SKIP})"]
    command = [sys.executable, "-m", "pytest", *(f"tests/{name}" for name in files)]
    command += [
        "-q",
        "--tb=short",
        "--maxfail=60",
        "--continue-on-collection-errors",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
    ]
    plugins = {entry.value for entry in importlib.metadata.entry_points(group="pytest11")}
    if few and "_hypothesis_pytestplugin" in plugins:
        command += ["-p", "benchmarks.few_examples", "--hypothesis-profile=few"]
    if "xdist.plugin" in plugins:
        command += ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else ["-p", "no:xdist"]
    return command


def plan(args: argparse.Namespace, work: Path) -> list[Step]:
    """All steps, in order of value."""
    rehearse = ["--rehearse"] if args.rehearse else []
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(work / "hypothesis"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TRITON_INTERPRET": "1" if args.rehearse else "0",
    }
    if not args.rehearse:
        environment["TRITON_CACHE_DIR"] = os.environ.get("TRITON_CACHE_DIR") or str(KERNELS_FOLDER)
    else:
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment["FUSED_EWCLORA_BUILD"] = "none"  # without the emulator of the CUDA kernels as well

    def step(name: str, command: list[str], limit: float, log: Path | None = None, **more: Any) -> Step:
        limit *= SLOWER if args.rehearse else 1.0
        return Step(name, command, limit, log or work / f"{name.replace(' ', '-')}.log", environment, **more)

    def module(name: str, *more: str) -> list[str]:
        return [sys.executable, "-m", f"benchmarks.{name}", *more, *rehearse]

    first, others = test_files()
    whole = [*others, *first, *HOST]
    if args.rehearse:
        first, whole = ["project/test_metrics.py"], ["layers/test_config.py"]
    log = args.out / "tests.log"
    workers = 0 if args.rehearse else args.workers
    within = ("--budget", "{budget}")
    planned = [
        step("environment", module("gpu.describe"), 30.0),
        step("kernels", module("gpu.cache", str(args.cache), "--install", *within), 60.0, says=1),
        step("calls", module("gpu.small_calls", "--backends", "triton", "reference"), 60.0, says=1),
        step("build", module("gpu.build"), 120.0),
        step(OF_CUDA, module("gpu.small_calls", "--backends", "cuda"), 30.0, says=1),
        step("graphs", module("gpu.graphs", *within), 60.0, says=1),
        step("tests", pytest_command(first, work / "tests.xml", workers, True), 60.0, log),
        step("sanitize", module("gpu.sanitize", *within), 60.0, says=1),
        step("ceilings", module("gpu.describe", "--ceilings"), 15.0),
    ]
    for suite, limit in SUITE_LIMITS.items():
        options = [suite, "--out", str(args.out), "--seconds", str(args.seconds), "--budget", "{budget}"]
        planned.append(step(suite, module("gpu", *options), limit, again=75))
    tune = module("gpu.tune", "--out", str(work), *within)
    planned.append(step("tune", tune, 30.0, says=12))
    command = pytest_command(whole, work / "all-tests.xml", workers, False)
    planned.append(step(EVERYTHING, command, args.budget, log))
    return [item for item in planned if not args.steps or item.name in args.steps]


def stretched(step: Step, later: Sequence[Step], left: float) -> Step:
    """The step with a longer limit where it and the later steps together would leave time unused."""
    total = step.limit + sum(other.limit for other in later if other.name != EVERYTHING)
    return replace(step, limit=step.limit * max(1.0, left / total))


def judged(outcome: Outcome, report: Path) -> Outcome:
    """The outcome of a test run with the counts of its report and the names of its failures; a run that timed
    out without a failure is "partial"."""
    try:
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return outcome
    names = ("tests", "failures", "errors", "skipped")
    count = {name: sum(int(s.get(name, 0)) for s in suites) for name in names}
    counts_text = ", ".join(f"{number} {name}" for name, number in count.items())
    clean = count["tests"] and not count["failures"] and not count["errors"]
    status = PARTIAL if outcome.status == steps.TIMED_OUT and clean else outcome.status
    wrong = [
        f"{test.get('classname')}::{test.get('name')}: {(flaw.get('message') or '').splitlines()[:1]}"
        for s in suites
        for test in s.iter("testcase")
        for flaw in (*test.findall("failure"), *test.findall("error"))
    ]
    detail = f"{counts_text}; {outcome.detail}".removesuffix("; ")
    notes = tuple(line[:200] for line in wrong[:20]) or (() if clean else outcome.notes)
    return replace(outcome, status=status, detail=detail, notes=notes)


def not_reached(suite: str, results: Sequence[dict[str, Any]], rehearsal: bool) -> int:
    """How many cases of a suite have no record."""
    from .gpu.__main__ import done, planned

    return sum(not done(workload, results) for workload in planned(suite, rehearsal))


def report(args: argparse.Namespace, outcomes: Sequence[Outcome]) -> tuple[str, int]:
    """The text of the summary and the exit status."""
    from .goals import goals
    from .gpu.__main__ import broken

    suites = {name: records.read(args.out / f"{name}.jsonl") for name in SUITE_LIMITS}
    lines = summary.tables(suites)
    wrong = [r for results in suites.values() for r in broken(results)]
    lines += ["", *summary.unavailable(suites), f"failures of ours: {len(wrong)}"]
    lines += [f"  {summary.label(r)[:60]}: {r['provider']}: {r['failed'][:200]}" for r in wrong[:30]]
    wanted = [goal for goal in goals() if not args.steps or goal.suite in args.steps]
    rows, verdicts = summary.targets(wanted, suites)
    lines += rows if not args.rehearse else ["", "a rehearsal has no targets"]
    lines += ["", "steps"]
    for outcome in outcomes:
        lines += [f"  {outcome}", *(f"      {note}" for note in outcome.notes)]
    run = {outcome.name for outcome in outcomes}
    for name, results in suites.items():
        if name in run and (missing := not_reached(name, results, args.rehearse)):
            lines.append(f"  {name}: {missing} cases were not reached")
    fine = (steps.OK, PARTIAL, steps.SKIPPED)
    status = 1 if wrong or any(outcome.status not in fine for outcome in outcomes) else 0
    if not status and not args.rehearse and not args.steps and set(verdicts) != {PASS}:
        status = 2
    return "\n".join([*lines, "", f"exit status {status}"]) + "\n", status


def shorten(path: Path, largest: int = LARGEST) -> None:
    """Cuts the middle out of a file that is too long."""
    if path.exists() and path.stat().st_size > largest:
        text = path.read_bytes()
        half = largest // 2 - 100
        path.write_bytes(text[:half] + b"\n[... cut ...]\n" + text[-half:])


def pack(args: argparse.Namespace, work: Path, outcomes: Sequence[Outcome]) -> int:
    """Writes summary.txt and details.tar.gz again; returns the exit status."""
    text, status = report(args, outcomes)
    (args.out / "summary.txt").write_text(text)
    shorten(args.out / "tests.log")
    with tarfile.open(args.out / "details.tar.gz", "w:gz") as archive:
        for path in sorted(work.iterdir()):
            if path.is_file():
                shorten(path)
                archive.add(path, path.name)
    return status


def check(args: argparse.Namespace, todo: Callable[[argparse.Namespace, Path], list[Step]] = plan) -> int:
    """Runs the steps and writes the report; returns the exit status."""
    deadline = Deadline(args.budget)
    args.out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    status = 1
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        work = Path(folder)
        try:
            left = list(todo(args, work))
            while left:
                step = left.pop(0)
                outcome = steps.run(stretched(step, left, deadline.left()), deadline, ROOT)
                outcome = judged(outcome, work / f"{step.name.replace(' ', '-')}.xml")
                outcomes.append(outcome)
                print(outcome, flush=True)
                try:
                    status = pack(args, work, outcomes)
                except Exception:  # in the report: the remaining steps still run
                    traceback.print_exc()
                    status = 1
                if step.name == "environment" and outcome.detail == NO_GPU:
                    print("no CUDA device; --rehearse runs everything on the CPU")
                    break
        except KeyboardInterrupt:
            outcomes.append(Outcome("the run", steps.TIMED_OUT, 0.0, "was ended from outside"))
            status = pack(args, work, outcomes)
    if (args.out / "summary.txt").exists():
        print((args.out / "summary.txt").read_text(), end="", flush=True)
    return status


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    workers = min(8, (os.cpu_count() or 2) // 2)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a folder without results of earlier runs")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--cache", type=Path, default=CACHE, help="kernels compiled by make gpu-cache")
    parser.add_argument("--seconds", type=float, default=0.06, help="timing per provider and case")
    parser.add_argument("--workers", type=int, default=workers, help="test processes, with pytest-xdist")
    parser.add_argument("--steps", nargs="*", choices=NAMES, default=[], help="only these")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU, with Triton's interpreter")
    args = parser.parse_args(argv)
    args.out, args.cache = args.out.resolve(), args.cache.resolve()
    if any((args.out / f"{name}.jsonl").exists() for name in SUITE_LIMITS):
        parser.error(f"--out {args.out}: holds records of an earlier run")
    return args


def main() -> int:
    """Entry point."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    return check(arguments())


if __name__ == "__main__":
    raise SystemExit(main())
