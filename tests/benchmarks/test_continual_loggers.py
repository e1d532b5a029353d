# SPDX-License-Identifier: Apache-2.0
"""What a run reports while it goes on, and what is refused before it starts."""

from __future__ import annotations

import copy
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from continual_digits import DIGITS

import fused_ewclora as fe
from benchmarks.continual import configuration, development, suite
from benchmarks.continual.loggers import Logger, Loggers, logger_class
from benchmarks.continual.stream import Problem
from fused_ewclora.demo.formats import DataError
from fused_ewclora.methods import LoRA

SAID: list[Any] = []


class Listening(Logger):
    """Keeps everything; named by its path in a test."""

    def step(self, task: int, step: int, values: dict[str, float]) -> None:
        SAID.append(("step", task, step, sorted(values)))

    def task(self, task: int, values: dict[str, float], scores: dict[str, Sequence[float]]) -> None:
        SAID.append(("task", task, values["steps"], {name: len(row) for name, row in scores.items()}))

    def close(self) -> None:
        SAID.append("close")


class OwnMethod(LoRA):
    """A method of a user, with a keyword of its own."""

    def __init__(self, model: torch.nn.Module, config: Any = None, *, strength: float) -> None:
        super().__init__(model, config)
        self.strength = strength


def own_problem(root: Path, seed: int, device: str, *, tasks: int, size: int = 4) -> Problem:
    """Data of a user."""
    return suite.problems.load({**DIGITS["problem"], "tasks": tasks, "dim": size * 2}, root, seed, device)


def test_everything_logged(tmp_path: Path) -> None:
    """Loggers hear of every step and task, a CSV file has them, and a failed run closes its loggers."""
    SAID.clear()
    run = configuration.parse(DIGITS).runs[0]
    place = suite.Place(tmp_path / "out", tmp_path, log=("csv", f"{__name__}:Listening"))
    assert suite.run_all([run], place, lambda text: None, "test") == []
    steps = [said for said in SAID if said[0] == "step"]
    assert steps[0] == ("step", 0, 0, ["loss", "lr", "penalty"]) and steps[-1][1] == 1
    tasks = [said for said in SAID if said[0] == "task"]
    assert [said[3]["class_incremental"] for said in tasks] == [1, 2] and SAID[-1] == "close"
    folder = tmp_path / "out" / "logs" / "digits" / "LoRA-0"
    with (folder / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(steps) and all(float(row["loss"]) > 0 for row in rows)
    with (folder / "tasks.csv").open() as file:
        assert {row["protocol"] for row in csv.DictReader(file)} == {"class_incremental", "task_aware"}


def test_unknown_loggers_refused(tmp_path: Path) -> None:
    """A logger that cannot be is refused before a run begins."""
    for name, message in (
        ("paper", "expected one of csv, tensorboard"),
        ("no.such:Thing", "cannot be imported"),
        ("pathlib:Path", "expected a subclass of Logger"),
    ):
        with pytest.raises(fe.ArgumentError, match=message):
            logger_class(name)
    assert not Loggers((), tmp_path, configuration.parse(DIGITS).runs[0]) and not list(tmp_path.iterdir())


def test_own_method_and_data(tmp_path: Path) -> None:
    """A configuration may name a method and a problem of the user by their paths."""
    data = copy.deepcopy(DIGITS)
    data["methods"] = [{"name": "own", "kind": f"{__name__}:OwnMethod", "options": {"strength": 2.0}}]
    data["problem"] = {"kind": f"{__name__}:own_problem", "tasks": 2}
    run = configuration.parse(data).runs[0]
    place = suite.Place(tmp_path / "out", tmp_path)
    assert suite.run_all([run], place, lambda text: None, "test") == []
    (record,) = suite.read(place.records("digits"))
    assert record["kind"] == f"{__name__}:OwnMethod" and len(record["tasks"]) == 2


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"kind": "EWC"}, "kind: expected one of"),
        ({"kind": "pathlib:Path"}, "expected a subclass of methods.Method"),
        ({"kind": "no.such:Thing"}, "cannot be imported"),
        ({"kind": "EWCLoRA", "options": {"ewc_lamda": 1.0}}, "ewc_lamda"),
        ({"kind": "EWCLoRA", "options": {"ewc_lambda": -1.0}}, "ewc_lambda"),
        ({"kind": "CoDyRA", "options": {"threshold": "hard"}}, "threshold"),
        ({"kind": "LoRA", "options": [1]}, "options: expected an object"),
        ({"kind": "LoRA", "grid": {"lr": [0.1]}}, "expected keys like training.lr"),
        ({"kind": "LoRA", "grid": {"training.lr": []}}, "expected a list of values"),
        ({"kind": "LoRA", "grid": {"training.lr": [0.5]}}, "expected that of the method, 0.001"),
        ({"kind": "LoRA", "adapters": {"rank": 2}}, "rank"),
    ],
)
def test_wrong_methods_refused(method: dict[str, Any], message: str) -> None:
    """Unknown keys and values out of range are refused when the file is read."""
    with pytest.raises(fe.ArgumentError, match=message):
        configuration.parse({**DIGITS, "methods": [{"name": "wrong", **method}]})


def test_wrong_problems_refused(tmp_path: Path) -> None:
    """The keywords of all problems are checked before the first run begins."""
    runs = configuration.parse(DIGITS).runs
    place = suite.Place(tmp_path / "out", tmp_path)
    for problem, message in (
        ({"kind": "vision", "task": 2}, "task"),
        ({"kind": "visions"}, "expected one of"),
        ({"kind": f"{__name__}:own_problem"}, "tasks"),
    ):
        wrong = configuration.replace(runs[1], problem=problem)
        with pytest.raises((DataError, fe.ArgumentError), match=message):
            suite.run_all([runs[0], wrong], place, lambda text: None, "test")
    assert not place.out.exists()


GRID: dict[str, Any] = {
    **DIGITS,
    "development": [100, 101],
    "methods": [
        {
            "name": "EWC", "kind": "EWCLoRA", "options": {"ewc_lambda": 10.0},
            "grid": {"training.lr": [1e-3, 1e-2], "options.ewc_lambda": [1.0, 10.0]},
        },
        {"name": "LoRA", "kind": "LoRA"},
    ],
}  # fmt: skip


def test_values_of_a_grid() -> None:
    """Development runs every combination on its own seeds, and the best mean decides."""
    runs = configuration.parse(copy.deepcopy(GRID), develop=True).runs
    assert len(runs) == 2 * (4 + 1) and {run.seed for run in runs} == {100, 101}
    assert {(run.training.lr, run.options.get("ewc_lambda")) for run in runs} == {
        (1e-3, 1.0), (1e-3, 10.0), (1e-2, 1.0), (1e-2, 10.0), (1e-3, None),
    }  # fmt: skip
    accuracy = {(1e-3, 1.0): (90, 10), (1e-3, 10.0): (50, 51), (1e-2, 1.0): (60, 40), (1e-2, 10.0): (49, 53)}
    records = [
        {
            "method": run.method, "seed": run.seed,
            "metrics": {"class_incremental": {"A_avg_sample_weighted": accuracy[key][run.seed - 100]}},
        }
        for run in runs
        if (key := (run.training.lr, run.options.get("ewc_lambda"))) in accuracy
    ]  # fmt: skip
    chosen = development.choices(GRID, records)
    assert chosen["EWC"].best == {"training.lr": 1e-2, "options.ewc_lambda": 10.0}
    assert chosen["EWC"].accuracy == 51.0 and set(chosen) == {"EWC"}
    assert development.differences(GRID, chosen) == [
        "EWC: training.lr: expected 0.01, the best of its grid, got 0.001"
    ]
    with pytest.raises(fe.ArgumentError, match=r"no record of seed 101"):
        development.choices(GRID, records[:-1])
    with pytest.raises(fe.ArgumentError, match="not reported"):
        configuration.parse({**GRID, "seeds": [1, 101]}, develop=True)


@pytest.mark.parametrize("name", ["language", "vision"])
def test_committed_choices(name: str) -> None:
    """The committed suites have the values that their development seeds chose."""
    data, records = development.read_both(name)
    assert development.differences(data, development.choices(data, records)) == []
