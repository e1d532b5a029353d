# SPDX-License-Identifier: Apache-2.0
"""One run of the continual-learning suite: streams, bad input, resumption, evaluation, the loop itself."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from continual_clusters import CPU, METHODS, Backbone, a_run, examples, interrupted, problem
from torch import Tensor

import fused_ewclora as fe
from benchmarks.continual.configuration import Run, Training
from benchmarks.continual.learner import Heads
from benchmarks.continual.protocols import Protocol
from benchmarks.continual.run import State, evaluate, execute, first, learn, make_optimizer, make_schedule
from benchmarks.continual.stream import Arrays, Stream, Task, loader, split_classes
from fused_ewclora.demo.formats import DataError
from fused_ewclora.metrics import ContinualMetrics


@pytest.mark.parametrize("method", METHODS)
def test_resume_identical(method: str, tmp_path: Path) -> None:
    """An interrupted run, once resumed, ends as if it had never been interrupted."""
    run, file = a_run(method), tmp_path / "state.pt"
    whole = execute(run, problem(), CPU)
    interrupted(run, problem(), file)
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]
    torch.manual_seed(99)  # whatever else the process has drawn
    said: list[str] = []
    resumed = execute(run, problem(), CPU, file, said.append)
    assert ["before the interruption" in text for text in said] == [True, True, False]
    for key in ("matrices", "metrics", "report", "classes", "train_sizes", "test_sizes"):
        assert resumed[key] == whole[key], key
    for name in ("loss", "penalty", "adapter_parameters", "trained_parameters", "state_bytes", "steps"):
        assert [t[name] for t in resumed["tasks"]] == [t[name] for t in whole["tasks"]], name


def test_what_a_run_records() -> None:
    found = problem()
    before = copy.deepcopy(found.backbone.state_dict())
    record = execute(a_run(), found, CPU)
    assert all(torch.equal(value, before[k]) for k, value in found.backbone.state_dict().items())
    assert record["train_sizes"] == [18, 30, 22] and record["facts"] == {"made": "for tests"}
    assert [len(row) for row in record["matrices"]["task_aware"]] == [1, 2, 3]
    metrics = ContinualMetrics.from_matrix(
        record["matrices"]["class_incremental"], record["test_sizes"], record["matrices"]["task_aware"], 100.0
    )
    assert record["metrics"] == metrics.summary()
    assert metrics.A(0) > 90.0  # clusters far apart: a loop that trains learns them
    assert [t["steps"] for t in record["tasks"]] == [9, 12, 9]
    assert record["tasks"][0]["penalty"] == 0.0 and record["tasks"][1]["penalty"] > 0.0
    assert len({t["adapter_parameters"] for t in record["tasks"]}) == 1
    json.dumps(record, allow_nan=False)


def test_many_unequal_tasks() -> None:
    """A run may have more than ten tasks of unequal sizes."""
    sizes = (2, 1, 3, 2, 2, 2, 2, 4, 2, 2, 2, 3)
    training = Training(lr=5e-3, head_lr=5e-2, epochs=1, batch_size=8)
    record = execute(a_run(training=training), problem(sizes, each=3), CPU)
    assert [len(row) for row in record["matrices"]["class_incremental"]] == list(range(1, 13))
    assert [len(names) for names in record["classes"]] == list(sizes)


def test_rank_zero() -> None:
    """A run goes on with a rank of zero, and the next task starts anew."""
    run = a_run("CoDyRA", options={"kappa_max": 50.0, "dense_fraction": 0.0, "schedule": "linear"})
    record = execute(run, problem(), CPU)
    assert record["report"] is not None
    assert record["report"]["summary"]["tasks"] == [0, 0, 0] and record["report"]["summary"]["now"] > 0
    assert record["metrics"]["class_incremental"]["plasticity"] > 50.0  # heads learn without adapters


def test_nan_refused() -> None:
    """NaN is an error, not a result."""
    training = Training(lr=1e30, head_lr=1e30, epochs=3, batch_size=8, optimizer="sgd")
    with pytest.raises(fe.EWCLoRAError, match=r"LoRA.*after task 0|NaN|finite"):
        execute(a_run("LoRA", training=training), problem(), CPU)


def test_evaluation_against_a_loop() -> None:
    found = problem((2, 3))
    torch.manual_seed(0)
    model = Heads(found.backbone)  # type: ignore[arg-type]
    for task in found.stream.tasks:
        model.add_head(len(task.classes))
    training = Training(lr=1.0, head_lr=1.0, test_batch_size=4)
    scores = evaluate(model, found.stream.tasks, 2, training, CPU)
    incremental, aware = scores["class_incremental"], scores["task_aware"]
    offset = 0
    for number, task in enumerate(found.stream.tasks):
        right = [0, 0]
        for index in range(len(task.test)):  # type: ignore[arg-type]
            (x, shift), label = task.test[[index]]
            logits = model.all_logits((x, shift))[0].tolist()  # type: ignore[arg-type]
            own = logits[offset : offset + len(task.classes)]
            right[0] += logits.index(max(logits)) == label + offset
            right[1] += own.index(max(own)) == label
        n = len(task.test)  # type: ignore[arg-type]
        assert incremental[number] == pytest.approx(100 * right[0] / n)
        assert aware[number] == pytest.approx(100 * right[1] / n)
        offset += len(task.classes)


def test_seeds_decide_and_repeat() -> None:
    first_run, again = (execute(a_run("LoRA"), problem(), CPU)["tasks"] for _ in range(2))
    other = execute(replace(a_run("LoRA"), seed=6), problem(), CPU)["tasks"]
    assert [t["loss"] for t in first_run] == [t["loss"] for t in again]
    assert [t["loss"] for t in first_run] != [t["loss"] for t in other]


def test_foreign_state_refused(tmp_path: Path) -> None:
    """The state of another run is refused."""
    file = tmp_path / "state.pt"
    execute(a_run("LoRA"), problem(), CPU, file)
    with pytest.raises(fe.CheckpointError, match="another run"):
        execute(a_run("CoDyRA"), problem(), CPU, file)
    file.write_bytes(b"damaged")
    with pytest.raises(fe.CheckpointError, match="cannot be read"):
        execute(a_run("LoRA"), problem(), CPU, file)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "at least one task"),
        ([Task((), examples(2, 2, 0), examples(2, 2, 0))], "at least one class"),
        ([Task(("a", "b"), examples(2, 0, 0), examples(2, 2, 0))], "expected training examples"),
        ([Task(("a", "b"), examples(2, 2, 0), examples(2, 0, 0))], "expected test examples"),
        ([Task(names, *[examples(2, 2, 0)] * 2) for names in (("a", "b"), ("c", "b"))], "'b'.*again"),
        ([Task(("a", "a"), *[examples(2, 2, 0)] * 2)], "'a'.*again"),
    ],
)
def test_bad_streams_refused(tasks: list[Task], message: str) -> None:
    """Streams that cannot be learned are refused."""
    with pytest.raises(DataError, match=message):
        Stream("bad", tuple(tasks))


def test_inputs_labels_mismatch() -> None:
    """Inputs and labels must match."""
    with pytest.raises(DataError, match="3 examples"):
        Arrays(torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64))


def test_class_split() -> None:
    """Classes are dealt out to tasks."""
    names = list("abcdefg")
    assert list(split_classes(names, 3)) == [("a", "b", "c"), ("d", "e"), ("f", "g")]
    assert list(split_classes(names, [1, 4])) == [("a",), ("b", "c", "d", "e")]
    for tasks in (8, 0, [3, 0]):
        with pytest.raises(DataError, match="at least one class per task"):
            list(split_classes(names, tasks))
    with pytest.raises(DataError, match="8 classes, the data have 7"):
        list(split_classes(names, [5, 3]))


def test_epoch_covers_examples() -> None:
    """Every example comes once per epoch."""
    data = examples(3, 5, 0)
    batches = loader(data, 4, torch.Generator().manual_seed(0))
    labels = torch.cat([y for _, y in batches])
    assert len(labels) == 15 and labels.bincount().tolist() == [5, 5, 5]
    assert [len(y) for _, y in first(batches, 6)] == [4, 4, 4, 3, 4, 4]
    straight = torch.cat([x for (x, _), _ in loader(data, 4)])
    assert torch.equal(straight, data.inputs[0])


def test_rates_follow_the_schedule() -> None:
    model = Heads(Backbone())  # type: ignore[arg-type]
    model.add_head(2)
    training = Training(
        lr=0.1, head_lr=0.2, epochs=4, schedule="multistep", milestones=(1, 3), optimizer="sgd", momentum=0.9
    )
    optimizer = make_optimizer(model, training)
    schedule = make_schedule(optimizer, training, 8)
    seen = []
    for _ in range(4):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert seen == [pytest.approx(v) for v in ([0.1, 0.2], [0.01, 0.02], [0.01, 0.02], [0.001, 0.002])]
    for iterations, length in ((None, 4), (10, 10)):
        cosine = replace(training, schedule="cosine", iterations=iterations)
        schedule = make_schedule(make_optimizer(model, cosine), cosine, 10)
        for _ in range(length):
            schedule.optimizer.step()
            schedule.step()
        assert schedule.get_last_lr() == pytest.approx([0.0, 0.0])
    quarter = replace(training, schedule="quarter-cosine")
    schedule, rates = make_schedule(make_optimizer(model, quarter), quarter, 8), []
    for _ in range(4):
        rates.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.1 * math.cos(99 * math.pi * k / (200 * 3)) for k in range(4)])
    short = replace(quarter, epochs=1)  # one rate, which is the first
    assert make_schedule(make_optimizer(model, short), short, 8).get_last_lr() == [0.1, 0.2]


def test_one_cycle() -> None:
    """Rates rise to those of the configuration and fall again, after every step."""
    training = replace(a_run().training, schedule="one-cycle", epochs=2)
    rates: list[float] = []

    class Watched(Protocol):
        def backward(self, x: Any, y: Tensor, rate: float) -> tuple[Tensor, Tensor]:
            rates.append(rate)
            return super().backward(x, y, rate)

    state = State(a_run("LoRA", training=training), problem(), CPU)
    state.protocol = Watched()
    state.protocol.attach(state.model, state.method)
    steps = learn(state, 0)[0]["steps"]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=steps)
    expected = []
    for _ in range(steps):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected) and max(rates) > 0.9 and rates[0] < 0.05


def test_epochs_of_tasks() -> None:
    """Every task has its own number of epochs, where the configuration gives one."""
    training = replace(a_run().training, epochs_by_task=(1, 3, 2))
    steps = [task["steps"] for task in execute(a_run("LoRA", training=training), problem(), CPU)["tasks"]]
    each = [-(-len(task.train) // 8) for task in problem().stream.tasks]  # type: ignore[arg-type]
    assert steps == [each[0], 3 * each[1], 2 * each[2]]
    short = replace(training, epochs_by_task=(1, 3))
    with pytest.raises(fe.ArgumentError, match="epochs_by_task: expected one for each of 3 tasks, got 2"):
        State(a_run("LoRA", training=short), problem(), CPU)


def test_passes_without_last_batch() -> None:
    """Passes over the data leave a smaller last batch out, where the configuration says so; training does
    not."""
    sizes: list[list[int]] = []

    class Watched(Protocol):
        def after_task(self, number: int, batches: Any, device: torch.device) -> None:
            sizes.append([len(y) for _, y in batches])

    for drop in (False, True):
        training = replace(a_run().training, passes_drop_last=drop)
        state = State(a_run("LoRA", training=training), problem(), CPU)
        state.protocol = Watched()
        state.protocol.attach(state.model, state.method)
        assert learn(state, 0)[0]["steps"] == 9  # 18 examples, 3 epochs
    assert sizes == [[8, 8, 2], [8, 8]]


def test_penalty_schedule_used() -> None:
    """The penalty and the schedule take part in training."""

    def losses(run: Run) -> list[float]:
        return [task["loss"] for task in execute(run, problem(), CPU)["tasks"]]

    ewc, constant = a_run(), a_run("LoRA")
    free = replace(ewc, options={"ewc_lambda": 0.0})
    assert losses(ewc)[0] == losses(free)[0] and losses(ewc)[1] != losses(free)[1]
    training = replace(constant.training, schedule="constant")
    assert losses(constant) != losses(replace(constant, training=training))


def test_matches_handwritten_loop() -> None:
    """A run equals the loop written by hand."""
    run, found = a_run("LoRA"), problem()
    torch.manual_seed(run.seed)
    order = torch.Generator().manual_seed(run.seed)
    model = Heads(copy.deepcopy(found.backbone))  # type: ignore[arg-type]
    method = fe.methods.LoRA(model, run.lora_configs()[0])
    losses = []
    for number, task in enumerate(found.stream.tasks):
        model.add_head(len(task.classes))
        method.begin_task(number)
        optimizer = make_optimizer(model, run.training)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.training.epochs)
        for _ in range(run.training.epochs):
            for x, y in loader(task.train, run.training.batch_size, order):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
            schedule.step()
        losses.append(loss.item())
        method.end_task([])
        evaluate(model, found.stream.tasks, number + 1, run.training, CPU)  # its loaders draw seeds
    assert [task["loss"] for task in execute(run, found, CPU)["tasks"]] == losses


def test_end_pass_shuffled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass after a task takes every example once, in an order drawn by the run."""
    seen: list[Tensor] = []

    def end(self: fe.methods.LoRA, passes: Any, loss_fn: Any) -> None:
        batches = [(x, labels) for (x, _), labels in passes]
        assert all(len(set(labels.tolist())) > 1 for _, labels in batches if len(labels) > 4)
        seen.append(torch.cat([x for x, _ in batches]))

    monkeypatch.setattr(fe.methods.LoRA, "_end", end)
    found = problem()
    execute(a_run("LoRA"), found, CPU)
    for got, task in zip(seen, found.stream.tasks, strict=True):
        expected = task.train.inputs[0]  # type: ignore[attr-defined]
        assert got.shape == expected.shape and not torch.equal(got, expected)
        assert torch.equal(*(x[x[:, 0].argsort()] for x in (got, expected)))


@pytest.mark.parametrize("before_end", [False, True])
def test_evaluation_before_end(before_end: bool) -> None:
    """Accuracies are those of the adapters before the merge where the configuration asks for it."""
    run = a_run("EWC-LoRA")
    trained: list[bool] = []

    class Watched(Heads):
        def scores(self, tasks: Any, begun: int, batches: Any) -> Any:
            trained.append(bool(self.backbone.up.lora_B.any()))  # type: ignore[union-attr,operator]
            return super().scores(tasks, begun, batches)

    run = replace(run, training=replace(run.training, evaluate_before_end=before_end))
    record = execute(run, replace(problem(), learner=Watched), CPU)
    assert trained == [before_end] * 3 and record["metrics"]["class_incremental"]["plasticity"] > 50.0


def test_every_task_recorded() -> None:
    """A learner that names all classes is also asked before the first task, and after a resumption."""

    class Naming(Heads):
        every_task = True

        def scores(self, tasks: Any, begun: int, batches: Any) -> Any:
            found = super().scores(tasks, begun, batches)
            return {**found, "every_task": [10.0 * begun + number for number in range(len(tasks))]}

    record = execute(a_run("LoRA"), replace(problem(), learner=Naming), CPU)
    assert record["matrices"]["every_task"] == [[10.0 * t + i for i in range(3)] for t in range(4)]
    found = record["metrics"]["every_task"]
    assert found == {
        "transfer": (11 + 17) / 2, "average": 21.0, "last": 31.0, "zero_shot": 1.0, "zero_shot_transfer": 1.5,
    }  # fmt: skip


def test_groups_of_adapters() -> None:
    """A run may have groups of adapters, each with its own rank."""
    groups = [{"r": 3, "target_modules": ["up"]}, {"r": 2, "target_modules": ["down"]}]
    state = State(a_run("LoRA", adapters=groups), problem(), CPU)
    ranks = {name.split(".")[-1]: layer.r for name, layer in state.method.layers.items()}
    assert ranks == {"up": 3, "down": 2}
