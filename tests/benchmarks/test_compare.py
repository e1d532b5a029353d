# SPDX-License-Identifier: Apache-2.0
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


def test_records_match_schema():
    """The records made for these tests follow the schema."""
    assert [v for one in run() for v in records.violations(one)] == []


@pytest.mark.parametrize("factor", [1.3, 1 / 1.3])
def test_large_change_found(factor: float):
    """A change of a third is found."""
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


def test_unchanged_no_regression():
    """At a scatter of 2 % between runs, none of 300 unchanged results is called slower."""
    found = [
        compare.compare(run(jitter=0.02, seed=2 * n), run(jitter=0.02, seed=2 * n + 1)) for n in range(100)
    ]
    assert sum(len(one.regressions) for one in found) == 0


def test_slow_machine_normalised():
    """A slower machine is not a regression."""
    found = compare.compare(run(), run(machine=1.4))
    assert found.regressions == [] and found.status == 0
    assert found.machine == pytest.approx(1.4)
    assert found.changes[0].ratio == pytest.approx(1.4)
    assert found.changes[0].normalised == pytest.approx(1.0)


def test_slow_machine_regression():
    """A regression shows on a slower machine."""
    found = compare.compare(run(), run(ours=1.3, machine=1.4))
    assert len(found.regressions) == 3
    assert found.regressions[0].normalised == pytest.approx(1.3)


def test_faster_peers():
    """Peers that get faster are not a regression of ours."""
    after = run()
    for one in after:
        if one["provider"] in PEERS and one["shape"]["width"] == 8:
            one["seconds"] = {name: value / 1.5 for name, value in one["seconds"].items()}
    assert compare.compare(run(), after).regressions == []


def test_busy_neighbour():
    """A neighbour on the machine who is busy during one case is not a regression."""
    after = run()
    for one in after:
        if one["shape"]["width"] == 8:
            one["seconds"] = {name: value * 1.5 for name, value in one["seconds"].items()}
    assert compare.compare(run(), after).regressions == []


def test_scattered_rounds():
    """Rounds that scatter hide what quiet rounds show."""
    quiet = compare.compare(run(spread=0.02), run(ours=1.2, spread=0.02))
    wild = compare.compare(run(spread=0.9, rounds=7), run(ours=1.2, spread=0.9, rounds=7))
    assert len(quiet.regressions) == 3 and wild.regressions == []


def test_no_controls():
    """Without controls the ratio is judged as measured."""
    alone = [[one for one in run(ours=t) if one["provider"] == OURS] for t in (1.0, 1.3)]
    found = compare.compare(*alone)
    assert [c.normalised for c in found.regressions] == [None] * 3
    assert "no control" in compare.render(found)


def test_median_error():
    """The estimated error of a median is the one found by sampling."""
    draw = np.random.default_rng(0)
    samples = np.exp(0.05 * draw.standard_normal((2000, 40)))
    p20, p80 = np.exp(0.05 * np.array([-0.8416, 0.8416]))
    made = {"seconds": {"p20": p20, "p50": 1.0, "p80": p80}, "rounds": 40}
    assert compare.median_error(made) == pytest.approx(np.log(np.median(samples, axis=1)).std(), rel=0.05)


def test_the_newest_record_counts():
    old = run(ours=2.0, time="2025-01-01T00:00:00+00:00")
    assert compare.compare([*run(), *old], run()).of(compare.FASTER) == []


def test_repeat_gives_scatter():
    """A second measurement of the same code that is 20 % off shows what a change of 25 % is worth."""
    few = (OURS, "eager")
    before, after = ([one for one in run(ours=t) if one["provider"] in few] for t in (1.0, 1.25))
    assert len(compare.compare(before, after).regressions) == 3
    for found, seconds in ((before, 1.2e-3), (after, 1.5e-3)):
        found += [record(compare.AGAIN, seconds, width, role="variant") for width in (8, 16, 32)]
    found = compare.compare(before, after)
    assert found.regressions == [] and found.scatter["penalty"] > 0.1


def test_floor_not_control():
    """A computed floor is not a control."""
    floors = [record("floor", t, role="floor", timing="computed") for t in (1.0, 9.0)]
    found = compare.compare([*run(), floors[0]], [*run(), floors[1]])
    assert all(c.provider != "floor" and c.normalised == pytest.approx(1.0) for c in found.changes)


def failed(one: dict) -> dict:
    kept = ("op", "shape", "dtype", "provider", "role", "environment", "time")
    return {**{name: one[name] for name in kept}, "failed": "RuntimeError: no"}


@pytest.mark.parametrize(("who", "status"), [(OURS, 1), ("eager", 0)])
def test_new_failure_named(who: str, status: int):
    """A provider that newly fails is named."""
    after = [failed(one) if one["provider"] == who else one for one in run()]
    found = compare.compare(run(), after)
    assert len(found.newly_failing) == 3 and found.status == status
    assert f"{who}: RuntimeError: no" in compare.render(found)
    assert compare.compare(after, after).newly_failing == []
    assert len(compare.compare(after, run()).working_again) == 3


def test_unmatched_listed():
    """Cases and providers that only one side has are listed."""
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
def test_incomparable_refused(change: dict, words: str):
    """What cannot be compared is refused in one sentence."""
    with pytest.raises(collection.Unusable, match=words):
        compare.compare(run(), run(**change))


def test_gpu_host_threads():
    """The number of host threads does not matter on a GPU."""
    sides = [run(environment={**ENVIRONMENT, "cuda": "13.0", "threads": n}) for n in (2, 8)]
    assert compare.compare(*sides).status == 0


def test_torch_version_noted():
    """A different version of torch is noted."""
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
def test_bad_file_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, words: str
):
    """Files that cannot be used end the command with status 2 and a sentence."""
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


def test_minimal_labels():
    """Labels hold no more than what tells cases apart."""
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
