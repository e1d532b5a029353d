"""Two sets of records are compared: what is a regression, what is noise, what the machine did, and what
cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import collection, compare, records
from benchmarks.case import OURS

PEERS = {"eager": 4.0, "compiled": 2.0, "einsum": 3.0}
ENVIRONMENT = {"device": "a CPU", "threads": 2, "torch": "2.13.0", "python": "3.11.7", "commit": "abc"}


def record(provider: str, seconds: float, width: int = 8, spread: float = 0.02, **more: object) -> dict:
    """A record whose p20 and p80 are `spread` of the median apart."""
    role = "ours" if provider == OURS else "floor" if provider == "product" else "peer"
    quantiles = {"p20": seconds * (1 - spread / 2), "p50": seconds, "p80": seconds * (1 + spread / 2)}
    made = {
        "op": "penalty", "shape": {"width": width}, "dtype": "float32", "provider": provider, "role": role,
        "backend": "", "algorithm": "", "error_fp64": 1e-7, "seconds": quantiles, "rounds": 30,
        "flops": 1e9, "bytes": 1e6, "gflops_per_second": 1 / seconds, "gbytes_per_second": 1e-3 / seconds,
        "environment": ENVIRONMENT, "time": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return {**made, **more}


def run(ours: float = 1.0, machine: float = 1.0, jitter: float = 0.0, seed: int = 0, **more: object) -> list:
    """Records of three cases: ours takes `ours` ms, everything `machine` times as long, give or take."""
    draw = np.random.default_rng(seed)
    times = {OURS: ours, "product": 0.5, **PEERS}
    return [
        record(name, 1e-3 * ms * machine * float(np.exp(jitter * draw.standard_normal())), width, **more)
        for width in (8, 16, 32)
        for name, ms in times.items()
    ]


def write(path: Path, found: list) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in found))
    return path


def test_made_records_follow_the_schema():
    assert [v for one in run() for v in records.violations(one)] == []


@pytest.mark.parametrize("factor", [1.3, 1 / 1.3])
def test_a_change_of_a_third_is_found(factor: float):
    after = run()
    for one in after:
        if one["provider"] == OURS and one["shape"]["width"] == 16:
            one["seconds"] = {name: value * factor for name, value in one["seconds"].items()}
    found = compare.compare(run(jitter=0.01, seed=1), after)
    changed = found.regressions if factor > 1 else found.of(compare.FASTER)
    assert [(c.provider, c.case) for c in changed] == [(OURS, "width 16")]
    assert changed[0].normalised == pytest.approx(factor, rel=0.05)
    assert found.status == (factor > 1)


def test_three_percent_are_noise():
    found = compare.compare(run(), run(ours=1.03))
    assert found.regressions == [] and found.status == 0
    assert found.changes[0].ratio == pytest.approx(1.03)


def test_runs_of_the_same_code_hold_no_regression():
    """At a scatter of 2 % between runs, none of 300 unchanged results is called slower."""
    found = [
        compare.compare(run(jitter=0.02, seed=2 * n), run(jitter=0.02, seed=2 * n + 1)) for n in range(100)
    ]
    assert sum(len(one.regressions) for one in found) == 0


def test_a_slower_machine_is_no_regression():
    found = compare.compare(run(), run(machine=1.4))
    assert found.regressions == [] and found.status == 0
    assert found.machine == pytest.approx(1.4)
    assert found.changes[0].ratio == pytest.approx(1.4)
    assert found.changes[0].normalised == pytest.approx(1.0)


def test_a_regression_shows_on_a_slower_machine():
    found = compare.compare(run(), run(ours=1.3, machine=1.4))
    assert len(found.regressions) == 3
    assert found.regressions[0].normalised == pytest.approx(1.3)


def test_peers_that_get_faster_are_no_regression_of_ours():
    after = run()
    for one in after:
        if one["provider"] in PEERS and one["shape"]["width"] == 8:
            one["seconds"] = {name: value / 1.5 for name, value in one["seconds"].items()}
    assert compare.compare(run(), after).regressions == []


def test_a_neighbour_who_is_busy_during_one_case_is_no_regression():
    after = run()
    for one in after:
        if one["shape"]["width"] == 8:
            one["seconds"] = {name: value * 1.5 for name, value in one["seconds"].items()}
    assert compare.compare(run(), after).regressions == []


def test_rounds_that_scatter_hide_what_quiet_rounds_show():
    quiet = compare.compare(run(spread=0.02), run(ours=1.2, spread=0.02))
    wild = compare.compare(run(spread=0.9, rounds=7), run(ours=1.2, spread=0.9, rounds=7))
    assert len(quiet.regressions) == 3 and wild.regressions == []


def test_without_controls_the_ratio_as_measured_is_judged():
    alone = [[one for one in run(ours=t) if one["provider"] == OURS] for t in (1.0, 1.3)]
    found = compare.compare(*alone)
    assert [c.normalised for c in found.regressions] == [None] * 3
    assert "no control" in compare.render(found)


def test_the_error_of_a_median_is_that_of_samples():
    draw = np.random.default_rng(0)
    samples = np.exp(0.05 * draw.standard_normal((2000, 40)))
    p20, p80 = np.exp(0.05 * np.array([-0.8416, 0.8416]))
    made = {"seconds": {"p20": p20, "p50": 1.0, "p80": p80}, "rounds": 40}
    assert compare.median_error(made) == pytest.approx(np.log(np.median(samples, axis=1)).std(), rel=0.05)


def test_the_newest_record_counts():
    old = run(ours=2.0, time="2025-01-01T00:00:00+00:00")
    assert compare.compare([*run(), *old], run()).of(compare.FASTER) == []


def test_ours_measured_again_tells_the_scatter():
    """A second measurement of the same code that is 20 % off shows what a change of 25 % is worth."""
    few = (OURS, "eager")
    before, after = ([one for one in run(ours=t) if one["provider"] in few] for t in (1.0, 1.25))
    assert len(compare.compare(before, after).regressions) == 3
    for found, seconds in ((before, 1.2e-3), (after, 1.5e-3)):
        found += [record(compare.AGAIN, seconds, width, role="variant") for width in (8, 16, 32)]
    found = compare.compare(before, after)
    assert found.regressions == [] and found.scatter["penalty"] > 0.1


def test_a_computed_floor_is_no_control():
    floors = [record("floor", t, role="floor", timing="computed") for t in (1.0, 9.0)]
    found = compare.compare([*run(), floors[0]], [*run(), floors[1]])
    assert all(c.provider != "floor" and c.normalised == pytest.approx(1.0) for c in found.changes)


def failed(one: dict) -> dict:
    kept = ("op", "shape", "dtype", "provider", "role", "environment", "time")
    return {**{name: one[name] for name in kept}, "failed": "RuntimeError: no"}


@pytest.mark.parametrize(("who", "status"), [(OURS, 1), ("eager", 0)])
def test_a_provider_that_fails_anew_is_named(who: str, status: int):
    after = [failed(one) if one["provider"] == who else one for one in run()]
    found = compare.compare(run(), after)
    assert len(found.newly_failing) == 3 and found.status == status
    assert f"{who}: RuntimeError: no" in compare.render(found)
    assert compare.compare(after, after).newly_failing == []
    assert len(compare.compare(after, run()).working_again) == 3


def test_cases_and_providers_of_one_side_are_listed():
    before, after = run(), [one for one in run() if one["shape"]["width"] != 8]
    found = compare.compare(before, [one for one in after if one["provider"] != "einsum"])
    assert found.only_a == ["penalty width 8", *(f"penalty width {w}: einsum" for w in (16, 32))]
    assert found.only_b == []


def test_regressions_come_first():
    after = [one for one in run(ours=1.5) if one["shape"]["width"] != 8]
    text = compare.render(compare.compare(run(), after))
    assert (
        text.index("regressions")
        < text.index("improvements")
        < text.index("unchanged")
        < text.index("in A only")
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"environment": {**ENVIRONMENT, "device": "another"}}, "different device cannot be compared"),
        ({"environment": {**ENVIRONMENT, "threads": 4}}, "different threads cannot be compared"),
        ({"dtype": "bfloat16"}, "different dtypes cannot be compared: A has float32, B has bfloat16"),
        ({"op": "fisher"}, "no case in common"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_sentence(change: dict, words: str):
    with pytest.raises(collection.Unusable, match=words):
        compare.compare(run(), run(**change))


def test_threads_of_the_host_do_not_matter_on_a_gpu():
    sides = [run(environment={**ENVIRONMENT, "cuda": "13.0", "threads": n}) for n in (2, 8)]
    assert compare.compare(*sides).status == 0


def test_torch_of_another_version_is_noted():
    text = compare.render(compare.compare(run(), run(environment={**ENVIRONMENT, "torch": "2.14.0"})))
    assert "note: torch 2.13.0 in A, 2.14.0 in B" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file or folder"),
        ("", "holds no records"),
        (json.dumps(record(OURS, 1.0)) + '\n{"op": "pen', "line 2 .* truncated"),
        ('{"op": "pen\n' + json.dumps(record(OURS, 1.0)), "line 1 .*not JSON"),
        (json.dumps(record(OURS, 1.0, colour="red")), "line 1 does not follow .*colour is not described"),
        (json.dumps({"op": "penalty"}), "shape is missing"),
        (json.dumps(record(OURS, 1.0)).replace('"p20": 0.99', '"p20": 2.0'), "p20 <= p50"),
        (json.dumps(record(OURS, 1.0)).replace('"p50": 1.0', '"p50": NaN'), "expected number"),
        ("[]", "expected object"),
    ],
)
def test_files_that_cannot_be_used_end_with_status_2_and_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, words: str
):
    good, bad = write(tmp_path / "good.jsonl", run()), tmp_path / "bad.jsonl"
    if content is not None:
        bad.write_text(content)
    assert compare.main([str(good), str(bad)]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    with pytest.raises(collection.Unusable, match=words):
        collection.load(bad)


def test_folders_are_read_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a").mkdir()
    write(tmp_path / "a" / "one.jsonl", run())
    b = write(tmp_path / "b.jsonl", run(ours=1.3))
    assert compare.main([str(tmp_path / "a"), str(b)]) == 1
    assert "regressions (B / A normalised by the controls): 3" in capsys.readouterr().out
    assert compare.main([str(b), str(b)]) == 0
    (tmp_path / "empty").mkdir()
    assert compare.main([str(tmp_path / "empty"), str(b)]) == 2


def test_labels_hold_no_more_than_tells_cases_apart():
    shapes = [
        {"model": "B", "d": 8, "rank": 4},
        {"model": "L", "d": 9, "rank": 4},
        {"model": "L", "d": 9, "rank": 8},
    ]
    cases = [{OURS: record(OURS, 1.0, shape=shape)} for shape in shapes]
    assert collection.labels(cases) == ["B, rank 4", "L, rank 4", "L, rank 8"]
    assert collection.labels(cases[:1]) == ["B"]
    swept = [
        {OURS: record(OURS, 1.0, shape={"sweep": name, "rank": 4, "width": 8})} for name in ("rank", "width")
    ]
    assert collection.labels(swept) == ["rank 4, over rank", "rank 4, over width"]
