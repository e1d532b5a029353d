# SPDX-License-Identifier: Apache-2.0
"""What a run reports while it goes on: rows in a CSV file, curves for TensorBoard, or a class of your own."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fused_ewclora.errors import ArgumentError

from .configuration import Run
from .dotted import named


class Logger:
    """Receives what happens in a run. `--log` names one of `LOGGERS` or the path "package.module:Class" of a
    subclass; every run has its own, made in its process as `Class(folder, run)`.

    folder: `<out>/logs/<suite>/<method>-<seed>`, which exists. A resumed run appends to what is there.
    """

    def __init__(self, folder: Path, run: Run) -> None:
        self.folder, self.run = folder, run

    def step(self, task: int, step: int, values: dict[str, float]) -> None:
        """After a training step: "loss" without the penalty, "penalty", "lr" of the adapters."""

    def task(self, task: int, values: dict[str, float], scores: dict[str, Sequence[float]]) -> None:
        """After a task: its times and sizes as in records, and accuracies in percent by protocol."""

    def close(self) -> None:
        """At the end of the run, also when it failed."""


class CSVLogger(Logger):
    """steps.csv: task, step, loss, penalty, lr; tasks.csv: task, protocol, on_task, accuracy."""

    def __init__(self, folder: Path, run: Run) -> None:
        super().__init__(folder, run)
        self._files = {
            name: self._opened(f"{name}.csv", columns)
            for name, columns in (
                ("steps", ("task", "step", "loss", "penalty", "lr")),
                ("tasks", ("task", "protocol", "on_task", "accuracy")),
            )
        }

    def _opened(self, name: str, columns: Sequence[str]) -> Any:
        path = self.folder / name
        begun = path.exists() and path.stat().st_size > 0
        file = path.open("a", newline="", encoding="utf-8")
        if not begun:
            csv.writer(file).writerow(columns)
        return file

    def step(self, task: int, step: int, values: dict[str, float]) -> None:
        """A row per step."""
        row = [task, step, values["loss"], values["penalty"], values["lr"]]
        csv.writer(self._files["steps"]).writerow(row)

    def task(self, task: int, values: dict[str, float], scores: dict[str, Sequence[float]]) -> None:
        """A row per accuracy; written at once, so that an interruption loses no task."""
        writer = csv.writer(self._files["tasks"])
        for protocol, accuracies in scores.items():
            for number, accuracy in enumerate(accuracies):
                writer.writerow([task, protocol, number, accuracy])
        for file in self._files.values():
            file.flush()

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()


class TensorBoardLogger(Logger):
    """Scalars over all steps of the stream, and accuracies over tasks; needs the package tensorboard."""

    def __init__(self, folder: Path, run: Run) -> None:
        super().__init__(folder, run)
        try:
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        except ImportError as error:
            raise ArgumentError(f"--log tensorboard: pip install tensorboard ({error})") from error
        self._writer = writer(str(folder))
        self._steps = 0

    def step(self, task: int, step: int, values: dict[str, float]) -> None:
        """Points of the curves, at the number of steps in this process so far."""
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, self._steps)
        self._steps += 1

    def task(self, task: int, values: dict[str, float], scores: dict[str, Sequence[float]]) -> None:
        """A curve per protocol and task."""
        for protocol, accuracies in scores.items():
            for number, accuracy in enumerate(accuracies):
                self._writer.add_scalar(f"{protocol}/task {number}", accuracy, task)
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


LOGGERS: dict[str, type[Logger]] = {"csv": CSVLogger, "tensorboard": TensorBoardLogger}


def logger_class(name: str) -> type[Logger]:
    """The class of a name; raises `ArgumentError` for anything else."""
    if name in LOGGERS:
        return LOGGERS[name]
    if ":" not in name:
        known = ", ".join(LOGGERS)
        raise ArgumentError(f'--log: expected one of {known} or "package.module:Class", got {name!r}')
    found = named(name, "--log")
    if not (isinstance(found, type) and issubclass(found, Logger)):
        raise ArgumentError(f"--log: {name}: expected a subclass of Logger, got {found!r}")
    return found


class Loggers:
    """All loggers of a run; their folder is made when there is one."""

    def __init__(self, names: Sequence[str], out: Path, run: Run) -> None:
        self._all: list[Logger] = []
        if names:
            folder = out / "logs" / run.suite / f"{run.method}-{run.seed}".replace("/", "-")
            folder.mkdir(parents=True, exist_ok=True)
            self._all = [logger_class(name)(folder, run) for name in names]

    def __bool__(self) -> bool:
        return bool(self._all)

    def step(self, task: int, step: int, values: dict[str, float]) -> None:
        """See `Logger.step`."""
        for logger in self._all:
            logger.step(task, step, values)

    def task(self, task: int, values: dict[str, float], scores: dict[str, Sequence[float]]) -> None:
        """See `Logger.task`."""
        for logger in self._all:
            logger.task(task, values, scores)

    def close(self) -> None:
        """See `Logger.close`."""
        for logger in self._all:
            logger.close()
