# SPDX-License-Identifier: Apache-2.0
"""What protocols add to runs: when they are called, what they remember, which are refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from continual_clusters import CPU, Backbone, a_run, interrupted, problem
from torch import Tensor

from benchmarks.continual import configuration, protocols
from benchmarks.continual.learner import Heads, Learner
from benchmarks.continual.protocols import Protocol
from benchmarks.continual.run import State, execute
from fused_ewclora import ArgumentError
from fused_ewclora.methods import Method

HERE = f"{__name__}:Recording"


class Recording(Protocol):
    """Writes down its calls, and draws the weights of heads towards 0."""

    made: ClassVar[list[Recording]] = []

    def __init__(self, decay: float = 0.1) -> None:
        self.decay, self.calls, self.rates, self.seen = decay, [], [], 0
        Recording.made.append(self)

    def attach(self, model: Learner, method: Method) -> None:
        super().attach(model, method)
        self.calls.append(("attach", type(method).__name__, len(list(model.parameters()))))

    def before_task(self, number: int, batches: Any, device: torch.device) -> None:
        running = self.method.tasks == number and self.method._running
        self.calls.append(("before", number, running, len({int(y) for _, ys in batches for y in ys})))

    def backward(self, x: Any, y: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        assert all(p.grad is None for p in self.model.parameters() if p.requires_grad)
        self.seen, self.rates = self.seen + len(y), [*self.rates, rate]
        loss, penalty = self.model.loss(self.model(x), y), self.method.penalty()
        decay = self.decay * sum(p.square().sum() for p in self.model.trained())
        (loss + penalty + decay).backward()
        return loss, penalty

    def after_task(self, number: int, batches: Any, device: torch.device) -> None:
        self.calls.append(("after", number, self.method.tasks, len(list(batches))))

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.seen = saved["seen"]


def last_made() -> Recording:
    return Recording.made[-1]


def test_calls_of_a_run() -> None:
    run = a_run(protocol={"kind": HERE, "decay": 0.0})
    recorded = execute(run, problem(), CPU)
    found = last_made()
    assert found.calls[0] == ("attach", "EWCLoRA", 8)  # before heads are added
    assert found.calls[1:3] == [("before", 0, True, 2), ("after", 0, 1, 3)]
    assert found.calls[3:] == [
        ("before", 1, True, 3), ("after", 1, 2, 4), ("before", 2, True, 2), ("after", 2, 3, 3),
    ]  # fmt: skip
    assert found.seen == run.training.epochs * sum(len(t.train) for t in problem().stream.tasks)  # type: ignore[arg-type]
    steps = recorded["tasks"][0]["steps"] // 3
    cosine = [1.0, 0.75, 0.25]  # of three epochs
    assert found.rates[: 3 * steps] == pytest.approx([rate for rate in cosine for _ in range(steps)])


def test_backward_decides_gradients() -> None:
    """With nothing added a protocol's run equals that without one; the decay of heads shows."""

    def losses(protocol: dict[str, Any]) -> list[float]:
        return [task["loss"] for task in execute(a_run("LoRA", protocol=protocol), problem(), CPU)["tasks"]]

    with_passes = losses({"kind": HERE, "decay": 0.0})
    assert losses({"kind": HERE, "decay": 1.0}) != with_passes
    assert losses({"kind": "plain"}) == losses({})


def test_state_resumed(tmp_path: Path) -> None:
    run, file = a_run(protocol={"kind": HERE}), tmp_path / "state.pt"
    whole = execute(run, problem(), CPU)
    seen = last_made().seen
    interrupted(run, problem(), file)
    before = last_made().seen
    resumed = execute(run, problem(), CPU, file)
    assert last_made().seen == seen > before > 0
    assert resumed["matrices"] == whole["matrices"]
    assert [t["loss"] for t in resumed["tasks"]] == [t["loss"] for t in whole["tasks"]]


def test_model_per_task_by_default() -> None:
    """Heads of CL-LoRA see the features of their own task."""
    state = State(a_run("CL-LoRA"), problem(), CPU)
    assert isinstance(state.model, Heads)
    assert state.model.of_task == state.method.task  # type: ignore[attr-defined]
    assert State(a_run("LoRA"), problem(), CPU).model.of_task is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["LoRA", "CL-LoRA"])
def test_model_per_task_refused(method: str) -> None:
    class Headless(Learner):
        def __init__(self, backbone: Backbone) -> None:
            super().__init__()
            self.backbone = backbone

    found = problem() if method == "LoRA" else replace(problem(), learner=Headless)  # type: ignore[arg-type]
    name = "Heads and LoRA" if method == "LoRA" else "Headless and CLLoRA"
    with pytest.raises(ArgumentError, match=f"protocol: expected a problem with a head per task.*{name}"):
        State(a_run(method, protocol={"kind": "model-per-task"}), found, CPU)


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        ({"kind": "tuned"}, "protocol: kind: expected one of plain, .*got 'tuned'"),
        ({"kind": 3}, "protocol: kind: .*got 3"),
        ({"kind": "no.such:Thing"}, "protocol: kind: 'no.such:Thing' cannot be imported"),
        ({"kind": f"{__name__}:last_made"}, "protocol: kind: expected one of"),
        ({"kind": "plain", "decay": 1.0}, "protocol: .*takes no arguments|protocol: .*decay"),
        ({"decay": 1.0}, "protocol: kind: .*got None"),
    ],
)
def test_bad_protocols_refused(protocol: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        protocols.make("LoRA", protocol)


CONFIGURATION: dict[str, Any] = {
    "name": "clusters", "about": "for tests", "problem": {"kind": "clusters"},
    "adapters": {"r": 3, "target_modules": ["up", "down"]}, "training": {"lr": 1e-3, "head_lr": 1e-2},
    "seeds": [0], "protocol": {"kind": HERE, "decay": 0.2},
    "methods": [
        {"name": "own", "kind": "LoRA"},
        {"name": "changed", "kind": "LoRA", "protocol": {"decay": 0.3}},
        {"name": "another", "kind": "LoRA", "protocol": {"kind": "plain"}},
    ],
}  # fmt: skip


def test_configured() -> None:
    """A method's protocol overrides that of the file by key; another kind takes its place."""
    runs = configuration.parse(CONFIGURATION).runs
    assert [run.protocol for run in runs] == [
        {"kind": HERE, "decay": 0.2}, {"kind": HERE, "decay": 0.3}, {"kind": "plain"},
    ]  # fmt: skip
    assert len({run.fingerprint() for run in runs}) == 3
    wrong = copy.deepcopy(CONFIGURATION)
    wrong["methods"][1]["protocol"] = {"strength": 1.0}
    with pytest.raises(ArgumentError, match=r"methods: changed: protocol: .*strength"):
        configuration.parse(wrong)


def test_fingerprints_without_protocol_remain() -> None:
    """Records from before there were protocols belong to the runs that have none."""
    run = a_run()
    assert run.protocol == {} and "protocol" in run.to_dict()
    assert run.fingerprint() != replace(run, protocol={"kind": "plain"}).fingerprint()
    assert run.fingerprint() == "9b8d3d094b3fde56"
