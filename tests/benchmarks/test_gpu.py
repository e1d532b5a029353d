# SPDX-License-Identifier: Apache-2.0
"""The GPU preset, records, verdicts and summaries, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import (
    collection,
    goals,
    gpu_check,
    harness,
    large_model,
    predict,
    records,
    report,
    shapes,
    summary,
)  # fmt: skip
from benchmarks.case import OURS, Case, Provider, Target
from benchmarks.clock import WallClock
from benchmarks.continual import recorded
from benchmarks.extras import Unavailable
from benchmarks.gpu.__main__ import NAMES, broken, marker, planned
from benchmarks.place import Place
from benchmarks.suites import SUITES
from benchmarks.workload import LATER, OP, SMALL, matrices
from benchmarks.workloads import label_of

ROOT = Path(__file__).resolve().parents[2]

PARAMETERS = {"ViT-B/16": 14.2e6, "ViT-L/16": 50.3e6, "ViT-H/14": 104.9e6}  # of all k and v together


# Plans


@pytest.mark.parametrize("suite", NAMES)
@pytest.mark.parametrize("rehearsal", [False, True])
def test_plan_lists_once(suite: str, rehearsal: bool):
    """A plan lists every part once."""
    parts = [(records.key(vars(one)), marker(one)) for one in planned(suite, rehearsal)]
    assert parts and len(set(parts)) == len(parts)


def test_same_suites_as_cpu():
    """A GPU runs the same suites as a CPU."""
    assert set(NAMES) == set(gpu_check.SUITE_LIMITS) == set(SUITES) - {"growth"}
    for suite in NAMES:
        kinds = [{(one.op, one.part) for one in planned(suite, rehearsal)} for rehearsal in (False, True)]
        assert kinds[1] <= kinds[0] and {op for op, _ in kinds[1]} == {op for op, _ in kinds[0]}
        assert {part for _, part in kinds[0]} - {part for _, part in kinds[1]} <= {SMALL}


def test_model_shapes():
    """The shapes are those of the models."""
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


def test_targets_find_cases():
    """Every target finds its cases in the plans."""
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


def test_committed_records_schema():
    """The records in the repository fit the schema of their kind."""
    folder = ROOT / "benchmarks" / "results"
    others = {"continual": recorded.violations, "large_model": large_model.violations}
    assert set(others) == set(report.OTHER_PAGES)
    paths = sorted(folder.rglob("*.jsonl"))
    assert paths
    for path in paths:
        violations = others.get(path.relative_to(folder).parts[0], records.violations)
        found = records.read(path)
        assert found and not [v for r in found for v in violations(r)], path


def test_measured_failed_schema(tmp_path: Path):
    """Measured and failed records fit the schema."""

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
def test_bad_record_noticed(change: dict, complaint: str):
    """A record that breaks the schema is noticed."""
    good = records.read(ROOT / "benchmarks" / "results" / "cpu" / "lora_linear.jsonl")[0]
    assert not list(records.violations(good))
    assert any(complaint in v for v in records.violations({**good, **change}))
    assert any("is missing" in v for v in records.violations({k: v for k, v in good.items() if k != "flops"}))


def test_unfinished_last_line(tmp_path: Path):
    """An unfinished last line is left out."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"op": 1}\n{"op": ')
    assert records.read(path) == [{"op": 1}]
    path.write_text('{"op": \n{"op": 1}\n')
    with pytest.raises(json.JSONDecodeError):
        records.read(path)


def test_rotated_buffers():
    """Rotated buffers share one timing sample."""
    calls: list[int] = []
    prepared = WallClock().prepare([lambda: calls.append(0), lambda: calls.append(1)])
    calls.clear()
    prepared.once()
    assert calls == [0, 1] and prepared.share == 2


def test_device_lost():
    """Records are kept when the device is lost."""

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
def test_target_compares_sums(target: Target, ratio: float | None, met: bool):
    """A target compares sums over cases."""
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
def test_summary_targets_met(ours: float, word: str):
    """The summary says which targets are met."""
    found = {"lora_linear": synthetic(ours)}
    text, verdicts = summary.targets(goals.goals(), found)
    line = next(line for line in text if "ViT-L/16 four linears, fwd+bwd, x frozen" in line)
    assert line.split("ViT-L")[0].strip() == word and f"{ours:.3f}" in line
    assert verdicts.count(collection.MISSING) == len(verdicts) - 2  # nothing else was measured
    table = "\n".join(summary.tables(found))
    assert "ViT-L fc1 12608 16 bf16" in table and "ViT-L fc1 12608 bwd 16 bf16" in table
    assert f"frozen {ours:.2f}" in table


def test_summary_missing_peers():
    """The summary names what is not installed, once."""
    why = f"{Unavailable.__name__}: peft is not installed"
    found = synthetic(1.2)
    found += [{**r, "provider": "peft", "failed": why} for r in found if r["provider"] == OURS]
    assert "peft" not in "\n".join(summary.tables({"lora_linear": found}))
    assert summary.unavailable({"lora_linear": found, "merge": []}) == [why]


def test_target_missing_case():
    """A target with a missing case is not met."""
    found = [r for r in synthetic(0.5) if r["shape"]["model"] != "ViT-L fc2"]
    assert collection.PASS not in summary.targets(goals.goals(), {"lora_linear": found})[1]


def test_peer_failures():
    """Failures of peers do not count as ours."""
    found = [{"provider": role, "role": role, "failed": "x"} for role in ("ours", "variant", "floor", "peer")]
    assert [r["role"] for r in broken(found)] == ["ours", "variant", "floor"]
    missing = {"provider": OURS, "role": "ours", "failed": f"{Unavailable.__name__}: timm is not installed"}
    assert not broken([missing])


@pytest.mark.parametrize("suite", NAMES)
def test_prediction_only_ours(suite: str):
    """Only our records carry a prediction."""
    one = predict.filled(SUITES[suite].build(planned(suite, True)[0], Place("cpu", True)))
    for provider in one.providers:
        assert bool(provider.predicted) is (provider.role in ("ours", "variant")), provider.name
