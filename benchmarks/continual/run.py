# SPDX-License-Identifier: Apache-2.0
"""One run: a method learns a stream task by task and is tested on all tasks so far after each."""

from __future__ import annotations

import copy
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, MultiStepLR, OneCycleLR
from torch.utils.data import DataLoader

import fused_ewclora as fe
from fused_ewclora.demo.evaluation import PERCENT, check_finite
from fused_ewclora.demo.files import temporary_name
from fused_ewclora.ewc.estimation import to_device
from fused_ewclora.methods import Method
from fused_ewclora.metrics import ContinualMetrics, TransferMetrics

from . import accounting, protocols
from .configuration import Run, Training, method_class
from .learner import Learner, Scores
from .loggers import Loggers
from .stream import Problem, Task, loader, size

Progress = Callable[[str], None]
QUARTER = 0.99 * math.pi / 2  # the angle of the last rate of "quarter-cosine", as in the code of CODA-Prompt


@dataclass
class Results:
    """Results of a run so far, one entry per finished task; accuracies in percent. every_task, of learners
    that have it, begins with the accuracies before the first task."""

    class_incremental: list[list[float]] = field(default_factory=list)
    task_aware: list[list[float]] = field(default_factory=list)
    every_task: list[list[float]] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    report: dict[str, Any] | None = None  # of the method after its last task


class State:
    """The state of a run, which can be saved to a file and loaded."""

    def __init__(self, run: Run, problem: Problem, device: torch.device) -> None:
        torch.manual_seed(run.seed)
        self.order = torch.Generator().manual_seed(run.seed)  # of the examples
        self.run, self.device, self.results = run, device, Results()
        self.tasks = problem.stream.tasks
        if (count := len(run.training.epochs_by_task)) not in (0, len(self.tasks)):
            raise fe.ArgumentError(
                f"training: epochs_by_task: expected one for each of {len(self.tasks)} tasks, got {count}"
            )
        self.protocol = protocols.make(run.kind, run.protocol)
        # Heads are added later, so that configurations may target every linear layer.
        learner = problem.learner or self.protocol.learner
        self.model: Learner = learner(copy.deepcopy(problem.backbone)).to(device)
        for config in run.lora_configs():
            fe.inject(self.model, config)
        self.method: Method = method_class(run.kind)(self.model, None, **run.options)
        self.model.check_method(self.method)
        self.protocol.attach(self.model, self.method)

    def save(self, file: Path) -> None:
        """Writes the state between tasks. An interruption leaves the old file or the new one."""
        held = {
            "fingerprint": self.run.fingerprint(),
            "results": asdict(self.results),
            "model": self.model.state_dict(),
            "method": self.method.state_dict(),
            "protocol": self.protocol.state_dict(),
            "order": self.order.get_state(),
            "random": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            held["random_cuda"] = torch.cuda.get_rng_state(self.device)
        temporary = temporary_name(file)
        torch.save(held, temporary)
        os.replace(temporary, file)

    def load(self, file: Path) -> None:
        """Restores the state from a file of the same run; raises `CheckpointError` for any other."""
        try:
            held = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can raise almost any exception
            raise fe.CheckpointError(f"{file}: cannot be read, remove it to start anew: {error}") from error
        if held.get("fingerprint") != self.run.fingerprint():
            raise fe.CheckpointError(f"{file}: belongs to another run; remove it to start anew")
        self.results = Results(**held["results"])
        for task in self.tasks[: len(self.results.tasks)]:
            self.model.begin_task(task)
        self.method.load_state_dict(held["method"])  # first: ranks may change
        self.model.load_state_dict(held["model"])
        self.protocol.load_state_dict(held.get("protocol", {}))
        self.order.set_state(held["order"])
        torch.set_rng_state(held["random"])
        if "random_cuda" in held:
            torch.cuda.set_rng_state(held["random_cuda"], self.device)


def execute(
    run: Run,
    problem: Problem,
    device: torch.device,
    checkpoint: Path | None = None,
    progress: Progress = lambda text: None,
    loggers: Loggers | None = None,
) -> dict[str, Any]:
    """Learns the whole stream; returns the part of the record that depends on it (record_schema.json).

    The problem's backbone is copied. After each task the state is saved to the file `checkpoint`, if
    there is one; a run that finds the file continues from it, to the same accuracies as without interruption.
    The caller removes the file once the record is written. Raises `EWCLoRAError` when parameters are not
    finite after a task.
    """
    tasks = problem.stream.tasks
    state = State(run, problem, device)
    if checkpoint is not None and checkpoint.exists():
        state.load(checkpoint)
        for number in range(len(state.results.tasks)):
            progress(f"task {number + 1}/{len(tasks)}: done before the interruption")
    results = state.results
    if state.model.every_task and not results.every_task:
        results.every_task.append(evaluate(state.model, tasks, 0, run.training, device)["every_task"])
    for number in range(len(results.tasks), len(tasks)):
        row, scores = learn(state, number, loggers)
        results.tasks.append(row)
        if loggers:
            loggers.task(number, row, scores)  # type: ignore[arg-type]
        for protocol, values in scores.items():
            getattr(results, protocol).append(values)
        report = getattr(state.method, "report", None)
        results.report = None if report is None else report().to_dict()
        if checkpoint is not None:
            state.save(checkpoint)
        seen = statistics.fmean(scores["class_incremental"])
        progress(f"task {number + 1}/{len(tasks)}: {seen:.1f} % of all classes")
    return _record(problem, results)


def learn(state: State, number: int, loggers: Loggers | None = None) -> tuple[dict[str, Any], Scores]:
    """Trains one task and ends it; returns its times and the sizes of the method's state afterwards, and the
    accuracies, which are those before the end of the task where the configuration asks for it."""
    training, device = state.run.training.of_task(number), state.device
    method, model, task, protocol = state.method, state.model, state.tasks[number], state.protocol
    model.begin_task(task)
    batches = loader(task.train, training.batch_size, state.order, training.workers)
    # The passes over all examples before and after training; the methods move batches themselves. Shuffled,
    # as in the official codes: the Fisher of batches of a single class would be several times too large.
    passes = loader(
        task.train,
        training.fisher_batch_size or training.batch_size,
        state.order,
        training.workers,
        training.passes_drop_last,
    )
    method.begin_task(number)
    prepare_seconds = timed(lambda: protocol.before_task(number, passes, device), device)
    prepare_seconds += timed(lambda: protocol.prepare(passes), device)
    optimizer = make_optimizer(model, training)
    steps = training.iterations or training.epochs * len(batches)
    schedule = make_schedule(optimizer, training, steps)
    examples = task.train if task.train_as_test is None else task.train_as_test
    protocol.before_steps(optimizer, loader(examples, training.test_batch_size, workers=training.workers))
    step_seconds: list[float] = []
    loss = penalty = torch.zeros(())
    model.train()
    for step, (inputs, labels) in enumerate(first(batches, steps)):
        start = time.perf_counter()
        x, y = to_device(inputs, device), labels.to(device)
        optimizer.zero_grad()
        loss, penalty = protocol.backward(x, y, optimizer.param_groups[0]["lr"] / training.lr)
        optimizer.step()
        method.after_step(step, steps)
        if training.rates_by_step or (step + 1) % len(batches) == 0:
            schedule.step()
        _finished(device)
        step_seconds.append(time.perf_counter() - start)
        if loggers:
            values = {"loss": loss.item(), "penalty": penalty.item(), "lr": optimizer.param_groups[0]["lr"]}
            loggers.step(number, step, values)
    # Before the task ends, when some methods add a direction for the next one.
    held, trained = accounting.adapter_parameters(method), accounting.trained_parameters(method)
    scores: Scores = {}
    if training.evaluate_before_end:
        scores = evaluate(model, state.tasks, number + 1, training, device)
    end_seconds = timed(lambda: method.end_task(passes, model.loss), device)
    end_seconds += timed(lambda: protocol.after_task(number, passes, device), device)
    check_finite(model, f"{state.run.method}, task {number}")
    if not training.evaluate_before_end:
        scores = evaluate(model, state.tasks, number + 1, training, device)
    row = {
        "steps": steps,
        "train_seconds": sum(step_seconds),
        "step_ms": 1e3 * statistics.median(step_seconds),
        "prepare_seconds": prepare_seconds,
        "end_seconds": end_seconds,
        "adapter_parameters": held,
        "trained_parameters": trained,
        "state_bytes": accounting.state_bytes(method, protocol.kept_tensors()),
        "loss": loss.item(),
        "penalty": penalty.item(),
    }
    return row, scores


@torch.no_grad()
def evaluate(
    model: Learner, tasks: tuple[Task, ...], begun: int, training: Training, device: torch.device
) -> Scores:
    """Accuracies on the test examples of the tasks, after `begun` of them have begun, in percent."""
    model.eval()

    def batches_of(task: Task) -> Iterator[tuple[Any, Tensor]]:
        for inputs, labels in loader(task.test, training.test_batch_size, workers=training.workers):
            yield to_device(inputs, device), labels

    return model.scores(tasks, begun, batches_of)


def make_optimizer(model: Learner, training: Training) -> torch.optim.Optimizer:
    """An optimizer of the adapters and of what the task trains beside them, each with its learning rate."""
    others = model.trained()
    known = {id(p) for p in others}
    adapters = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [{"params": adapters, "lr": training.lr}]
    if others:
        groups.append({"params": others, "lr": training.head_lr})
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=training.momentum, weight_decay=training.weight_decay)
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, betas=training.betas, weight_decay=training.weight_decay)


def make_schedule(optimizer: torch.optim.Optimizer, training: Training, steps: int) -> LRScheduler:
    """Stepped after every epoch, or after every one of `steps` steps (`Training.rates_by_step`)."""
    length = steps if training.iterations else training.epochs
    if training.schedule == "cosine":
        return CosineAnnealingLR(optimizer, length)
    if training.schedule == "quarter-cosine":
        return LambdaLR(optimizer, lambda now: math.cos(QUARTER * now / max(length - 1, 1)))
    if training.schedule == "one-cycle":
        return OneCycleLR(optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps)
    if training.schedule == "multistep":
        return MultiStepLR(optimizer, list(training.milestones), training.decay)
    return LambdaLR(optimizer, lambda _: 1.0)


def first(batches: DataLoader[Any], steps: int) -> Iterator[Any]:
    """The first `steps` batches, over as many epochs as needed."""
    while steps > 0:
        for batch in batches:
            yield batch
            steps -= 1
            if steps == 0:
                return


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `work` takes, including its work on the device."""
    _finished(device)
    start = time.perf_counter()
    work()
    _finished(device)
    return time.perf_counter() - start


def _finished(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _record(problem: Problem, results: Results) -> dict[str, Any]:
    tasks = problem.stream.tasks
    sizes = [size(task.test) for task in tasks]
    matrices = {"class_incremental": results.class_incremental, "task_aware": results.task_aware}
    metrics = ContinualMetrics.from_matrix(
        results.class_incremental, sizes, results.task_aware, scale=PERCENT
    ).summary()
    if results.every_task:
        matrices["every_task"] = results.every_task
        metrics["every_task"] = TransferMetrics(results.every_task, PERCENT).summary()
    return {
        "facts": problem.facts,
        "classes": [list(task.classes) for task in tasks],
        "train_sizes": [size(task.train) for task in tasks],
        "test_sizes": sizes,
        "matrices": matrices,
        "metrics": metrics,
        "tasks": results.tasks,
        "report": results.report,
    }
