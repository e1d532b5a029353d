# SPDX-License-Identifier: Apache-2.0
"""Configurations of continual-learning runs, all runs of a suite, and the command."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from continual_digits import DIGITS

import fused_ewclora as fe
from benchmarks.continual import configuration, problems, suite
from benchmarks.continual.__main__ import main
from benchmarks.continual.recorded import check
from fused_ewclora.demo.formats import DataError


def test_a_configuration_becomes_runs() -> None:
    found = configuration.parse(DIGITS)
    assert [(run.method, run.seed, run.training.epochs) for run in found.runs] == [
        ("LoRA", 0, 1), ("LoRA", 1, 1), ("EWC", 3, 2),
    ]  # fmt: skip
    quick = configuration.parse(DIGITS, quick=True)
    assert [(run.suite, run.method, run.seed, run.training.epochs) for run in quick.runs] == [
        ("digits-quick", "EWC", 7, 1)
    ]
    assert quick.runs[0].problem["train_per_class"] == 6 and found.runs[0].problem["train_per_class"] == 12
    assert len({run.fingerprint() for run in (*found.runs, *quick.runs)}) == 4
    assert [(run.method, run.seed) for run in configuration.with_seeds(found, [4]).runs] == [
        ("LoRA", 4), ("EWC", 4),
    ]  # fmt: skip
    again = configuration.parse(json.loads(json.dumps(DIGITS)))
    assert [run.fingerprint() for run in again.runs] == [run.fingerprint() for run in found.runs]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": None}, "seeds is missing"),
        ({"seed": [0]}, "seed: no such key"),
        ({"seeds": [True]}, "seeds: expected integers"),
        ({"seeds": [1, 1]}, "LoRA, seed 1: expected once"),
        ({"methods": [{"name": "x", "kind": "Adapter"}]}, "kind: expected one of"),
        ({"methods": [{"name": "x"}]}, "kind is missing"),
        ({"training": {"lr": 1.0}}, "head_lr is missing"),
        ({"training": {"lr": -1.0, "head_lr": 1.0}}, "lr: expected a number > 0"),
        ({"training": {"lr": 1.0, "head_lr": 1.0, "epochs": 0}}, "epochs: expected an integer >= 1"),
        ({"training": {"lr": 1.0, "head_lr": 1.0, "optimizer": "lion"}}, "optimizer: expected one of"),
        ({"adapters": {"r": 0, "target_modules": ["qkv"]}}, "r: expected"),
    ],
)
def test_bad_configuration_message(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Wrong configurations are refused with a message that says what is wrong."""
    data = {key: value for key, value in {**DIGITS, **change}.items() if value is not None}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(data))
    with pytest.raises(fe.ArgumentError, match=message) as caught:
        configuration.load(file)
    assert "mine.json" in str(caught.value)


def test_find_configuration(tmp_path: Path) -> None:
    """Configurations are found by name or by path."""
    assert "language" in configuration.available() and "vision" in configuration.available()
    assert configuration.find("language").name == "language.json"
    (tmp_path / "mine.json").write_text(json.dumps({**DIGITS, "quick": {"methods": ["x"]}}))
    with pytest.raises(fe.ArgumentError, match="no method is called 'x'"):
        configuration.load(configuration.find(str(tmp_path / "mine.json")), quick=True)
    with pytest.raises(fe.ArgumentError, match="expected a file or one of"):
        configuration.find("nonsense")
    with pytest.raises(DataError, match="kind"):
        problems.load({"kind": "nonsense"}, tmp_path, 0, "cpu")
    with pytest.raises(DataError, match=r"problem: vision: .*'colour'"):
        problems.load({"kind": "vision", "colour": 1}, tmp_path, 0, "cpu")


@pytest.mark.parametrize("jobs", [1, 2])
def test_runs_recorded_once(jobs: int, tmp_path: Path) -> None:
    """All runs are recorded and not repeated."""
    pytest.importorskip("sklearn")
    runs = configuration.parse(DIGITS).runs[:2]
    bad = replace(runs[0], method="bad", adapters={"r": 2, "target_modules": ["nothing"]})
    place = suite.Place(tmp_path, tmp_path, jobs=jobs)
    said: list[str] = []
    failures = suite.run_all([bad, *runs], place, said.append, "the command")
    assert len(failures) == 1 and "bad, seed 0" in failures[0] and "nothing" in failures[0]
    records = [json.loads(line) for line in (tmp_path / "digits.jsonl").read_text().splitlines()]
    assert sorted((r["method"], r["seed"]) for r in records) == [("LoRA", 0), ("LoRA", 1)]
    assert all(r["command"] == "the command" and r["environment"]["jobs"] == jobs for r in records)
    assert len(said) == 4  # tasks
    assert suite.outstanding([bad, *runs], place) == [bad]
    assert not list(tmp_path.glob("unfinished/*"))
    with pytest.raises(fe.ArgumentError, match="another configuration"):
        suite.outstanding([replace(runs[0], options={"x": 1})], place)


def test_order_of_runs(tmp_path: Path) -> None:
    """Runs that share a problem follow each other, suites stay in their order."""
    runs = configuration.parse(
        {**DIGITS, "methods": [DIGITS["methods"][0], {**DIGITS["methods"][0], "name": "again"}]}
    ).runs
    other = [replace(run, suite="a") for run in runs]
    left = suite.outstanding([*runs, *other], suite.Place(tmp_path, tmp_path))
    expected = [("LoRA", 0), ("again", 0), ("LoRA", 1), ("again", 1)]
    assert [(run.suite, run.method, run.seed) for run in left] == [
        (name, *which) for name in ("digits", "a") for which in expected
    ]


def test_truncated_line(tmp_path: Path) -> None:
    """A line that was cut off does not spoil the file."""
    file = tmp_path / "x.jsonl"
    file.write_text('{"a": 1}\n{"a": ')
    suite.append(file, {"a": 2})
    assert file.read_text() == '{"a": 1}\n{"a": 2}\n'


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fused_ewclora", "demo", "--suite", *arguments]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A suite from a file of one's own, through the command line."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("suite")
    (folder / "mine.json").write_text(json.dumps(DIGITS))
    done = subprocess.run(
        command(
            str(folder / "mine.json"), "--out", str(folder / "out"), "--jobs", "1", "--data-root", "none"
        ),
        capture_output=True,
        text=True,
        timeout=300,
    )
    return folder, done


def test_command_outputs(
    output: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """The command makes records, a table and pictures."""
    folder, done = output
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (folder / "out" / "digits.jsonl").read_text().splitlines()]
    assert [(r["method"], r["seed"]) for r in records] == [("LoRA", 0), ("LoRA", 1), ("EWC", 3)]
    for record in records:
        check(record)
        assert record["command"].startswith("python -m fused_ewclora demo --suite ")
    assert "3 runs, 3 of them to do" in done.stderr and done.stderr.count("task 2/2") == 3
    assert "LoRA" in done.stdout and "A_last" in done.stdout
    pictures = list((folder / "out").glob("*.png"))
    assert pictures and all(str(path) in done.stdout for path in pictures)


def test_command_idempotent(
    output: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Running the same command again does nothing new."""
    folder, _ = output
    before = (folder / "out" / "digits.jsonl").read_bytes()
    options = [
        "--suite",
        str(folder / "mine.json"),
        "--out",
        str(folder / "out"),
        "--json",
        "--methods",
        "EWC",
    ]
    assert main(options) == 0
    said = capsys.readouterr()
    assert "1 runs, 0 of them to do" in said.err
    assert len(json.loads(said.out)) == 3
    assert (folder / "out" / "digits.jsonl").read_bytes() == before


def test_ctrl_c_resume(tmp_path: Path) -> None:
    """Ctrl-C ends all processes, and the command goes on from there."""
    pytest.importorskip("sklearn")
    data = {**DIGITS, "training": {**DIGITS["training"], "epochs": 10}, "methods": DIGITS["methods"][:1]}
    (tmp_path / "mine.json").write_text(json.dumps({**data, "seeds": [0, 1]}))
    arguments = command(str(tmp_path / "mine.json"), "--out", str(tmp_path / "out"), "--jobs", "2")
    running = subprocess.Popen(
        arguments,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )
    assert running.stderr is not None
    for line in running.stderr:
        if "task 1/2" in line:
            break
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    _, rest = running.communicate(timeout=60)
    assert running.returncode == 130, rest
    assert "continues from here" in rest
    file = tmp_path / "out" / "digits.jsonl"
    before = len(file.read_text().splitlines()) if file.exists() else 0
    assert before < 2
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and f"2 runs, {2 - before} of them to do" in done.stderr, done.stderr
    assert "done before the interruption" in done.stderr
    assert len(file.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "nothing"], "--methods: expected some of .*'EWC'.* got 'nothing'"),
        (["--jobs", "0"], "expected integers >= 1"),
        (["--device", "cuda:99"], "--device cuda:99: not available"),
        (["--seeds", "-1"], "seeds: expected integers >= 0"),
    ],
)
def test_bad_options_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong options are refused with an explanation."""
    (tmp_path / "mine.json").write_text(json.dumps(DIGITS))
    assert main(["--suite", str(tmp_path / "mine.json"), "--out", str(tmp_path / "out"), *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_missing_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing data fails one run, and the message says what to get."""
    data = {**DIGITS, "problem": {**DIGITS["problem"], "dataset": "cifar100"}, "seeds": [0]}
    (tmp_path / "mine.json").write_text(json.dumps(data))
    options = ["--out", str(tmp_path), "--data-root", str(tmp_path / "none"), "--methods", "LoRA"]
    assert main(["--suite", str(tmp_path / "mine.json"), *options]) == 1
    assert re.search(r"FAILED: digits: LoRA, seed 0: .*cifar100", capsys.readouterr().err)


def test_list_configurations(capsys: pytest.CaptureFixture[str]) -> None:
    """The list names every configuration."""
    assert main(["--suite", "--list"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name}\n" in said for name in configuration.available()) and "CoDyRA" in said


def test_costs_of_some_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--suite", "costs", "--quick", "--out", str(tmp_path), "--methods"]
    assert main([*arguments, "InfLoRA"]) == 0
    records = [json.loads(line) for line in (tmp_path / "costs.jsonl").read_text().splitlines()]
    assert [record["method"] for record in records] == ["InfLoRA"]
    assert records[0]["command"] == (
        "python -m fused_ewclora demo --suite costs --quick --methods InfLoRA"  # no folder of this machine
    )
    assert main([*arguments, "EWC"]) == 2
    assert re.search("--methods: expected some of .*'InfLoRA'.* got 'EWC'", capsys.readouterr().err)
