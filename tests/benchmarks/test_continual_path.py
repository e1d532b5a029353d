# SPDX-License-Identifier: Apache-2.0
"""The loss on the line from one task to the next."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.continual import configuration, path, path_figure, problems
from benchmarks.continual.configuration import Run, Training
from benchmarks.continual.learner import Learner
from benchmarks.continual.run import State, learn
from benchmarks.continual.stream import Arrays, Problem, Stream, Task
from fused_ewclora.errors import ArgumentError

CPU, POINTS = torch.device("cpu"), 3
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoRA", {}),
    "SD-LoRA": ("SDLoRA", {"ranks": [3, 2]}),
    "CoDyRA": ("CoDyRA", {"kappa_max": 0.05}),
}


class Backbone(nn.Module):
    dim = 10

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, self.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def problem(sizes: tuple[int, ...] = (2, 3, 2)) -> Problem:
    """Clusters; every task has other test examples than training examples."""
    tasks = []
    for number, classes in enumerate(sizes):
        generator = torch.Generator().manual_seed(number)
        labels = torch.arange(classes).repeat(9)
        x = 2.0 * torch.randn(classes, 6, generator=generator)[labels]
        noise = 0.3 * torch.randn(2, *x.shape, generator=generator)
        train, test = (Arrays(x + some, labels) for some in noise)
        tasks.append(Task(tuple(f"{number}.{k}" for k in range(classes)), train, test))
    torch.manual_seed(1)
    return Problem(Stream("clusters", tuple(tasks)), Backbone().requires_grad_(False))


def a_run(method: str) -> Run:
    kind, options = METHODS[method]
    training = Training(lr=5e-3, head_lr=5e-2, epochs=1, batch_size=9)
    adapters = {"r": 3, "target_modules": ["up", "down"]}
    return Run("clusters", method, kind, 5, {"kind": "clusters", "tasks": 3}, adapters, training, options)


def literal(state: State, tasks: tuple[Task, ...], split: str) -> tuple[list[float], list[float]]:
    """Losses and accuracies of the model itself, by the head of each task."""
    losses, accuracies = [], []
    for head, task in zip(state.model.heads, tasks, strict=False):
        examples = getattr(task, split)
        logits = head(state.model.backbone(examples.inputs))
        losses.append(F.cross_entropy(logits, examples.labels).item())
        accuracies.append(100.0 * (logits.argmax(1) == examples.labels).double().mean().item())
    return losses, accuracies


@pytest.mark.parametrize("method", METHODS)
def test_ends_are_the_models(method: str):
    """At its ends a way has the losses of the model after the one and after the other task, and in the middle
    those of the mean weights."""
    close = partial(pytest.approx, rel=1e-4, abs=1e-6)
    made = problem()
    tasks = made.stream.tasks
    ways = path.follow(a_run(method), made, CPU, POINTS)
    assert [(way["from"], way["to"]) for way in ways] == [(0, 1), (1, 2)]
    state, weights = State(a_run(method), made, CPU), []
    for number in range(len(tasks)):
        learn(state, number)
        state.model.eval()
        weights.append({name: layer.consolidated_weight() for name, layer in state.method.layers.items()})
        for split in path.SPLITS:
            losses, accuracies = literal(state, tasks, split)
            for way in (way for way in ways if way["from"] == number):
                found = {of: values[split]["loss"][0] for of, values in way["values"].items()}
                assert found[path.FIRST] == close(losses[0])
                assert found[path.EARLIER] == close(sum(losses) / len(losses))
            for way in (way for way in ways if way["to"] == number):
                found = {of: values[split]["loss"][-1] for of, values in way["values"].items()}
                assert found[path.FIRST] == close(losses[0])
                assert found[path.EARLIER] == close(sum(losses[:-1]) / number)
                assert found[path.NEW] == close(losses[-1])
                assert way["values"][path.NEW][split]["accuracy"][-1] == pytest.approx(accuracies[-1])
    with torch.no_grad():
        x, y = tasks[0].test.inputs, tasks[0].test.labels
        up, down = ((weights[1][f"backbone.{n}"] + weights[2][f"backbone.{n}"]) / 2 for n in ("up", "down"))
        hidden = F.gelu(F.linear(x, up, made.backbone.up.bias))
        features = F.linear(hidden, down, made.backbone.down.bias)
        expected = F.cross_entropy(state.model.heads[0](features), y).item()
    assert ways[-1]["values"][path.FIRST]["test"]["loss"][1] == close(expected)


def test_barrier():
    """The height over the chord; 0 where the line is below it."""
    assert path.barrier([1.0, 4.0, 3.0], [0.0, 0.5, 1.0]) == 2.0
    assert path.barrier([1.0, 1.5, 3.0], [0.0, 0.5, 1.0]) == 0.0


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The command writes records and the picture of them."""
    monkeypatch.setattr(problems, "load", lambda *_: problem((2, 2, 2)))
    made: dict[str, Any] = {
        "name": "made", "about": "", "problem": {"tasks": 3}, "seeds": [0, 1],
        "adapters": {"r": 2, "target_modules": ["up"]},
        "training": {"lr": 1e-2, "head_lr": 1e-2, "epochs": 1},
        "methods": [{"name": "LoRA", "kind": "LoRA"}, {"name": "SD-LoRA", "kind": "SDLoRA"}],
    }  # fmt: skip
    file = tmp_path / "made.json"
    file.write_text(json.dumps(made))
    arguments = ["--suite", str(file), "--points", "3", "--out", str(tmp_path / "out")]
    assert path.main(arguments) == 0
    records = json.loads((tmp_path / "out" / "path.json").read_text())
    runs = [("LoRA", 0), ("LoRA", 1), ("SD-LoRA", 0), ("SD-LoRA", 1)]
    assert [(record["method"], record["seed"]) for record in records] == runs
    said = capsys.readouterr().out
    assert said.count("| LoRA |") == 2 and "path.png" in said and (tmp_path / "out" / "path.png").exists()
    figure = path_figure.draw(records)
    (line,) = [one for one in figure.axes[1].lines if one.get_gid() == "LoRA"]
    curves = [path_figure.curve(r, path.EARLIER, "train") for r in records if r["method"] == "LoRA"]
    assert line.get_ydata()[1] == pytest.approx((curves[0][1] + curves[1][1]) / 2)
    assert list(line.get_xdata())[:3] == [1.0, 1.5, 2.0]
    for wrong, words in ((["--points", "1"], "--points"), (["--methods", "none"], "expected some of")):
        assert path.main([*arguments, *wrong]) == 1
        assert words in capsys.readouterr().err


def test_shared_head_refused():
    """Where tasks share what they are learned with, there are no losses apart."""

    class Other(Learner):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone = backbone

    with pytest.raises(ArgumentError, match="learned by Other"):
        path.follow(a_run("LoRA"), replace(problem(), learner=Other), CPU, 2)


def test_configuration():
    """The configuration of the command exists and compares LoRA with SD-LoRA."""
    loaded = configuration.load(configuration.find(path.SUITE))
    assert {"LoRA", "SD-LoRA"} <= {run.method for run in loaded.runs}
