# SPDX-License-Identifier: Apache-2.0
"""`bench host`: who is called and checked, what is counted, and that records and the page say it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from benchmark_records import GPU, older, results
from interpreters import in_subprocess

from benchmarks import choose, collection, compare, extras, plot, records, report
from benchmarks.case import OURS, Target
from benchmarks.host import __main__ as host
from benchmarks.host import captures, layers, measure, merges, penalties, steps, table
from benchmarks.host.case import CHECKED, NOT_COMPARED, NOT_COMPUTED, Caller, HostCase
from benchmarks.host.clock import HostClock, Timed, small_products
from benchmarks.host.place import HostPlace, place

ROOT = Path(__file__).resolve().parents[2]
CPU = HostPlace("cpu", None, "not here")  # Triton's interpreter is on in the tests
CLOCK = HostClock(sample_seconds=1e-9)
COMPUTING = {f"{OURS} cpu", f"{OURS} reference"}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def measured(case: HostCase, rounds: int = 2) -> dict[str, dict]:
    with small_products("cpu"):
        return {record["provider"]: record for record in measure.measure(case, rounds, CLOCK, CPU)}


def complete(found: dict[str, dict]) -> list[dict]:
    stamp = {"environment": host.described(CPU, CLOCK), "time": "2026-01-01T00:00:00+00:00", "targets": []}
    return [{**record, **stamp} for record in found.values()]


# Cases

SMALL = {
    "layer, fp32": lambda: layers.build("lora_linear", torch.float32, layers.Passes("forward+backward"), CPU),
    "layer, bf16": lambda: layers.build("lora_linear", torch.bfloat16, layers.Passes("inference"), CPU),
    "layer, autocast": lambda: layers.build(
        "lora_linear", torch.float32, layers.Passes("forward+backward", torch.bfloat16), CPU
    ),
    "slices": lambda: layers.build(
        "lora_linear_slices", torch.float32, layers.Passes("forward+backward"), CPU
    ),
    "op": lambda: penalties.build(3, penalties.OP, CPU),
    "penalty": lambda: penalties.build(3, penalties.FUNCTION, CPU),
    "in place": lambda: penalties.build(3, penalties.IN_PLACE, CPU),
    "controller": lambda: penalties.build(3, penalties.MODEL, CPU),
    "capture": lambda: captures.build(torch.float32, CPU),
    "merge": lambda: merges.build(torch.bfloat16, CPU),
}


@pytest.mark.parametrize("name", SMALL)
def test_case_records(name: str):
    """What computes is right, what cannot be had says why, and every record follows the schema."""
    found = measured(SMALL[name]())
    for record in found.values():
        if "failed" in record:
            assert record["provider"] == "peft" or record["provider"].startswith((OURS, f"{OURS} triton"))
            assert record["failed"].startswith("Unavailable: ")
    assert found[OURS]["failed"] == "Unavailable: not here"
    checked = {name for name, record in found.items() if record.get("results") == CHECKED}
    assert checked >= COMPUTING
    assert all(found[name]["error_fp64"] <= found[name]["tolerance"] for name in checked)
    assert [v for record in complete(found) for v in records.violations(record)] == []


def test_step_records(monkeypatch: pytest.MonkeyPatch):
    """A training step is measured with timm, and says why not without it."""
    missing = extras.Unavailable("timm is not installed")
    monkeypatch.setattr(steps.models, "of_timm", lambda *_: (_ for _ in ()).throw(missing))
    found = measured(next(steps.cases(CPU))())
    assert {name: r["failed"] for name, r in found.items()} == dict.fromkeys(
        (OURS, "peft"), "Unavailable: timm is not installed"
    )
    assert [v for record in complete(found) for v in records.violations(record)] == []


def test_step_of_timm():
    """A narrow model is right with the penalty, without it, and under PEFT."""
    pytest.importorskip("timm")
    shallow = steps.RELEASE.base._replace(depth=1)
    found = measured(steps.build(shallow, None, CPU))
    assert {r["shape"]["adapters"] for r in found.values()} == {4}
    assert found[f"{OURS} reference"]["error_fp64"] <= found[f"{OURS} reference"]["tolerance"]
    assert "seconds" in found["frozen base"]
    if "failed" in found["peft"]:
        assert found["peft"]["failed"].startswith("Unavailable: ")


def test_all_cases_differ(monkeypatch: pytest.MonkeyPatch):
    """Every case is listed once, and the targets are those that are promised."""
    monkeypatch.setattr(penalties, "ADAPTERS", (penalties.TARGET_ADAPTERS,))
    built = [
        make() for part in ("layers", "penalties", "captures", "merges") for make in host.PARTS[part](CPU)
    ]
    keys = [records.key(vars(case)) for case in built]
    assert len(set(keys)) == len(keys) == 14 + 4 + 2 + 2
    targets = [(t.peer, t.limit, t.allowance) for case in built for t in case.targets]
    assert sorted(targets, key=str) == sorted(
        [("peft", 0.6, 0.0), ("peft", 0.7, 0.0)] * 2
        + [(None, 0.0, 3e-4), (None, 0.0, 1e-4)]
        + [(captures.WITHOUT, 1.0, 12 * 4e-5)] * 2,
        key=str,
    )


# Measuring


def made(seconds: float, name: str = OURS, **more: object) -> Caller:
    def spin() -> list[torch.Tensor]:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass
        return [torch.ones(2)]

    return Caller(name, lambda: spin, "ours" if name == OURS else "peer", check=spin, **more)


def of(*callers: Caller, value: float = 1.0, targets: tuple[Target, ...] = ()) -> HostCase:
    truth = lambda: [torch.full((2,), value, dtype=torch.float64)]  # noqa: E731
    return HostCase("merge", {"n": 1}, "float32", callers, truth, 1e-6, targets)


def test_thread_time_counts():
    """Time of the thread counts, time in which it sleeps does not."""
    clock = HostClock(sample_seconds=2e-3)
    busy, idle = (
        Timed(made(1e-3).make(), contextlib.nullcontext),
        Timed(lambda: time.sleep(0.01), contextlib.nullcontext),
    )
    assert 1e-3 <= clock.sample(busy) < 0.1
    assert clock.sample(idle) < 5e-3
    clock.prepare(busy)
    assert busy.repeats in (1, 2)


def test_gpu_clock(monkeypatch: pytest.MonkeyPatch):
    """On a GPU the time until calls return counts, and the device is idle before and after."""
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("idle"))

    def call() -> None:
        order.append("call")
        time.sleep(2e-3)

    clock = HostClock("cuda")
    assert clock.sample(Timed(call, contextlib.nullcontext, 2)) >= 2e-3
    assert order == ["call", "idle", "call", "call", "idle"]
    assert clock.kind != CLOCK.kind
    before = torch.backends.cudnn.allow_tf32
    with small_products("cuda"):
        assert not torch.backends.cudnn.allow_tf32 and torch.backends.mkldnn.enabled
    assert torch.backends.cudnn.allow_tf32 == before


def test_rounds_and_turns():
    """Every round samples everyone once, and begins with another one."""
    order: list[int] = []
    everyone = [Timed(lambda i=i: order.append(i), contextlib.nullcontext) for i in range(3)]
    samples = CLOCK.times(everyone, 3)
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert [len(times) for times in samples] == [3, 3, 3] and min(map(min, samples)) > 0.0


def test_wrong_not_timed():
    """A wrong result is recorded as wrong; what is not computed or compared is not checked."""
    others = [made(0.0, name, results=name) for name in (NOT_COMPUTED, NOT_COMPARED)]
    found = measured(of(made(0.0), *others, value=2.0))
    assert "wrong: error" in found[OURS]["failed"]
    for name in (NOT_COMPUTED, NOT_COMPARED):
        assert found[name]["error_fp64"] is None and found[name]["results"] == name
        assert found[name]["rounds"] == 2


def test_truth_of_caller():
    """A caller that computes something else has a truth of its own."""
    own = made(0.0, "other", truth=lambda: [torch.ones(2).double()])
    assert measured(of(own, value=2.0))["other"]["error_fp64"] == 0.0


def test_failure_while_timed():
    """A call that fails later is recorded with its reason."""
    calls: list[int] = []

    def sometimes() -> list[torch.Tensor]:
        calls.append(1)
        if len(calls) > 10:
            raise RuntimeError("no longer")
        return [torch.ones(2)]

    found = measured(of(Caller(OURS, lambda: sometimes, "ours", check=sometimes)), rounds=20)
    assert found[OURS]["failed"] == "RuntimeError: no longer"


def test_targets_evaluated():
    """Targets are evaluated against peers, allowances, and both."""
    targets = (
        Target("slow", 0.5, "half"), Target("slow", 0.001, "far"), Target(None, 0.0, "budget", allowance=1.0),
        Target("slow", 1.0, "with allowance", allowance=1e-3), Target("nobody", 1.0, "missing"),
    )  # fmt: skip
    case = of(made(0.0), made(0.0, "slow"), targets=targets)
    found = measured(case)
    for provider, seconds in ((OURS, 1e-4), ("slow", 1e-3)):  # whatever else the machine does
        found[provider]["seconds"] = dict.fromkeys(("p20", "p50", "p80"), seconds)
    rows = measure.verdicts(case, list(found.values()))
    words = [collection.PASS, collection.SHORT, collection.PASS, collection.PASS, collection.MISSING]
    assert [collection.verdict_of(row) for row in rows] == words
    text = "\n".join(table.lines("title", case, list(found.values()), rows))
    assert "FALL SHORT: far" in text and "p50 us" in text


def test_settings_restored():
    """Threads and oneDNN are as before, also after an error."""
    torch.set_num_threads(2)
    before = torch.backends.mkldnn.enabled
    with pytest.raises(KeyError), small_products("cpu"):
        assert torch.get_num_threads() == 1 and not torch.backends.mkldnn.enabled
        raise KeyError
    assert torch.get_num_threads() == 2 and torch.backends.mkldnn.enabled == before


def test_interpreter_refused():
    """Where Triton's interpreter is on, Triton is not measured, for that reason."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with place() as here:
        entries = {entry.name: entry for entry in here.entries(algorithms=True)}
        if here.refused is None:
            pytest.skip("Triton is not interpreted here")
        with pytest.raises(extras.Unavailable, match="TRITON_INTERPRET"), entries[OURS].using():
            pass
    assert {"triton:full", "triton:concat", "cpu", "reference"} <= {
        entry.backend for entry in entries.values()
    }


# The command


def command(tmp_path: Path, *more: str) -> tuple[int, list[dict]]:
    arguments = ["--rounds", "2", "--seconds", "1e-9", "--out", str(tmp_path), *more]
    return host.main(arguments), records.read(tmp_path / "host.jsonl")


def test_command_appends(tmp_path: Path, capsys):
    """The command prints a table and appends records that are valid and say which host it was."""
    status, found = command(tmp_path, "--part", "merges")
    assert status == 0 and found and collection.load(tmp_path) == found
    assert all(record["environment"]["device"].startswith("host of ") for record in found)
    assert {record["environment"]["threads"] for record in found} == {1}
    assert all(collection.is_host(record) for record in found)
    assert "records appended" in capsys.readouterr().out
    assert compare.compare(found, found).status == 0


def test_dry_command(tmp_path: Path, monkeypatch, capsys):
    """A dry run writes nothing; a missed target is the exit status."""
    monkeypatch.setattr(host, "RESULTS", tmp_path)
    missed = of(made(0.0), targets=(Target(None, 0.0, "too much", allowance=1e-12),))
    monkeypatch.setitem(host.PARTS, "merges", lambda here: iter([lambda: missed]))
    assert host.main(["--dry", "--part", "merges", "--rounds", "2"]) == 1
    assert not list(tmp_path.iterdir()) and "too much" in capsys.readouterr().out


def test_command_interrupted(tmp_path: Path, monkeypatch, capsys):
    """An interrupted run keeps what it has measured."""

    def interrupted() -> HostCase:
        raise KeyboardInterrupt

    monkeypatch.setitem(host.PARTS, "merges", lambda here: iter([lambda: of(made(0.0)), interrupted]))
    status, found = command(tmp_path, "--part", "merges")
    assert status == 130 and [record["provider"] for record in found] == [OURS]


@pytest.mark.parametrize("arguments", [["--part", "abacus"], ["--rounds", "1"], ["--seconds", "0"]])
def test_wrong_arguments(arguments: list[str], capsys):
    """Wrong arguments end with a sentence."""
    with pytest.raises(SystemExit) as ended:
        host.main([*arguments, "--dry"])
    assert ended.value.code == 2


def test_pretended_triton(tmp_path: Path):
    """Without a GPU and without the interpreter Triton is measured up to its launches, which are counted."""
    pytest.importorskip("triton")
    arguments = ["--rounds", "2", "--seconds", "1e-9", "--part", "merges", "--out", str(tmp_path)]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from benchmarks.host import __main__ as host; "
    done = in_subprocess(f"{code}sys.exit(host.main({arguments}))", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    ours = [record for record in collection.load(tmp_path) if record["provider"] == OURS]
    for record in ours:
        assert record["results"] == NOT_COMPUTED and record["error_fp64"] is None
        assert record["launches"] > 0 and "Triton" in record["algorithm"]
        assert record["environment"]["stands_in_for"] == "sm_90"
        assert record["environment"]["launcher"].startswith(("plans", "Triton's own"))
    assert len(ours) == 2


# The page


def host_records() -> list[dict]:
    """Made records of a layer and a capture."""
    machine = {"device": "host of a CPU", "threads": 1, "torch": "2", "python": "3", "commit": "abc"}

    def made_record(op: str, name: str, role: str, microseconds: float, shape: dict) -> dict:
        seconds = dict.fromkeys(("p20", "p50", "p80"), 1e-06 * microseconds)
        return {
            "op": op, "shape": shape, "dtype": "float32", "provider": name, "role": role, "timing": "host",
            "backend": "triton", "algorithm": "", "results": NOT_COMPUTED, "launches": 6, "error_fp64": None,
            "seconds": seconds, "rounds": 15, "environment": machine, "time": "2026-01-01T00:00:00+00:00",
            "targets": [{"target": "x", "ratio": 0.5, "limit": 0.6, "met": True}],
        }  # fmt: skip

    layer, model = {"pass": "forward"}, {"layers": 12}
    return [
        made_record("lora_linear", OURS, "ours", 50.0, layer),
        made_record("lora_linear", "peft", "peer", 100.0, layer),
        made_record("lora_linear", "frozen linear", "floor", 20.0, layer),
        made_record("fisher_accumulate", OURS, "ours", 580.0, model),
        made_record("fisher_accumulate", captures.WITHOUT, "variant", 100.0, model),
    ]


def test_host_section(tmp_path: Path):
    """The page has ratios to PEFT and to the frozen layer, launches, capture per layer, and targets."""
    found = host_records()
    assert [v for record in found for v in records.violations(record)] == []
    text = report.generate(results(tmp_path, host_host=found))
    lines = text.split("## The host path")[1].splitlines()
    assert "| case | ours | launches | ours / PEFT | ours / frozen linear |" in lines
    assert "| forward | 50.0 µs [50.0 µs, 50.0 µs] | 6 | 0.50 | 2.50 |" in lines
    assert "| layers 12 | 580 µs [580 µs, 580 µs] | 6 | 40.0 µs |" in lines
    assert "| forward | x | 0.500 | 0.600 | PASS |" in lines
    assert "### Host of a CPU, 1 thread" in lines
    assert "GB/s" not in text.split("## The host path")[1]


def test_host_records_apart(tmp_path: Path):
    """Host times are in no picture and no choice of a backend, and leave other sections as they are."""
    without = report.generate(results(tmp_path / "a", cpu_penalty=older()))
    both = report.generate(results(tmp_path / "b", cpu_penalty=older(), host_host=host_records()))
    start, rest = both.split("## The host path")
    assert without == start + "## GPUs" + rest.split("## GPUs")[1]
    assert plot.planned(host_records()) == []
    on_gpu = [{**record, "environment": {**record["environment"], **GPU}} for record in host_records()]
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "host.jsonl").write_text("".join(json.dumps(record) + "\n" for record in on_gpu))
    with pytest.raises(choose.Refused, match="no records"):
        choose.read(tmp_path / "gpu")
