# SPDX-License-Identifier: Apache-2.0
"""Continual-learning metrics of an accuracy matrix; the name of each metric says how it is averaged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import get_args

import numpy as np

from .errors import ArgumentError
from .literals import Average, Protocol

PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
AVERAGES: tuple[Average, ...] = get_args(Average)


class ContinualMetrics:
    """The accuracy matrices of one continual-learning run, and their metrics.

    `a[t][i]` is the accuracy on the test set of task `i` (`n_i` samples) after training task `t`, `i <= t`:
    `class_incremental`, where all heads compete, and optionally `task_aware`, where the task is known.
    Accuracies keep their unit (0..1 or 0..100); `scale` is the value of a perfect score.

    Formulas (Lopez-Paz & Ranzato 2017; Chaudhry et al. 2018), `T` tasks seen, `D_i = a[i][i]`:

        A_t              sample_weighted: sum_{i<=t} n_i a[t][i] / sum_{i<=t} n_i
                         task_mean:       mean_{i<=t} a[t][i]
        A_last, A_avg    A_T, and the mean of A_1 .. A_T
        bwt              mean_{i<T}(a[T][i] - D_i)
        forgetting_max   mean_{i<T}(max_{t<T} a[t][i] - a[T][i])
        stability        scale - forgetting_max
        stability_ratio  mean_{i<T}(a[T][i] / D_i)
        plasticity_cil   mean_i D_i, class-incremental
        plasticity_til   mean_i D_i, task-aware

    Args:
        test_sizes: n_i, the number of test samples of each task, integers >= 1; further tasks are refused.
        scale: the value of a perfect score, finite and > 0.

    Raises:
        ArgumentError: for sizes or a scale out of range; from the methods, for NaN, entries outside
            `[0, scale]`, rows of the wrong length and missing data.

    Examples:
        >>> m = metrics.ContinualMetrics.from_matrix([[0.9], [0.6, 0.8]], test_sizes=[100, 300])
        >>> round(m.bwt(), 4), round(m.A_last("sample_weighted"), 4)
        (-0.3, 0.75)
    """

    def __init__(self, test_sizes: Sequence[int], scale: float = 1.0) -> None:
        if not len(test_sizes):
            raise ArgumentError("test_sizes: expected one size per task, got an empty sequence")
        for i, n in enumerate(test_sizes):
            if isinstance(n, bool) or int(n) != n or n < 1:
                raise ArgumentError(f"test_sizes[{i}]: expected an integer >= 1, got {n!r}")
        if not (math.isfinite(scale) and scale > 0):
            raise ArgumentError(f"scale: expected a finite number > 0, got {scale!r}")
        self.test_sizes = [int(n) for n in test_sizes]
        self.scale = float(scale)
        self._rows: dict[str, list[list[float]]] = {name: [] for name in PROTOCOLS}

    @classmethod
    def from_matrix(
        cls,
        class_incremental: Iterable[Sequence[float]],
        test_sizes: Sequence[int],
        task_aware: Iterable[Sequence[float]] | None = None,
        scale: float = 1.0,
    ) -> ContinualMetrics:
        """Metrics of rows of `t + 1` entries, or of square matrices, whose entries `i > t` are ignored.

        Args:
            class_incremental: `a[t][i]` in [0, scale], one row per task that was trained.
            test_sizes: as in the class.
            task_aware: the same with the task known, as many rows; None where it was not measured.
            scale: as in the class.

        Returns:
            The object with all rows added.

        Raises:
            ArgumentError: as `add`, and for another number of task-aware rows.
        """
        metrics = cls(test_sizes, scale)
        rows = [list(row)[: t + 1] for t, row in enumerate(class_incremental)]
        aware = None if task_aware is None else [list(row)[: t + 1] for t, row in enumerate(task_aware)]
        if aware is not None and len(aware) != len(rows):
            raise ArgumentError(
                f"task_aware: expected {len(rows)} rows as in class_incremental, got {len(aware)}"
            )
        for t, row in enumerate(rows):
            metrics.add(row, None if aware is None else aware[t])
        return metrics

    def add(self, class_incremental: Sequence[float], task_aware: Sequence[float] | None = None) -> None:
        """Append the accuracies after one more task `t`.

        Args:
            class_incremental: `t + 1` accuracies in [0, scale]; entry `i` belongs to task `i`, `i = 0 .. t`.
            task_aware: the same with the task known; given for every task or for none.

        Raises:
            ArgumentError: for a row of another length, NaN, an entry out of range, task-aware accuracies of
                some tasks only, and a task beyond `test_sizes`; nothing is added then.
        """
        t = self.tasks_seen
        if t == len(self.test_sizes):
            raise ArgumentError(f"class_incremental: all {t} tasks of test_sizes already have a row")
        if t and (task_aware is not None) != bool(self._rows["task_aware"]):
            raise ArgumentError("task_aware: give it for every task or for none")
        row = self._checked("class_incremental", class_incremental, t)
        aware = None if task_aware is None else self._checked("task_aware", task_aware, t)
        self._rows["class_incremental"].append(row)
        if aware is not None:
            self._rows["task_aware"].append(aware)

    def _checked(self, name: str, row: Sequence[float], t: int) -> list[float]:
        if len(row) != t + 1:
            raise ArgumentError(
                f"{name}: row of task {t}: expected {t + 1} accuracies (tasks 0..{t}), got {len(row)}"
            )
        values = [math.nan if v is None else float(v) for v in row]
        for i, value in enumerate(values):
            if not 0.0 <= value <= self.scale:
                raise ArgumentError(
                    f"{name}: accuracy on task {i} after task {t}: "
                    f"expected a number in [0, {self.scale:g}], got {row[i]!r}"
                )
        return values

    @property
    def tasks_seen(self) -> int:
        """The number of tasks whose accuracies were added."""
        return len(self._rows["class_incremental"])

    @property
    def has_task_aware(self) -> bool:
        """Whether task-aware accuracies were given."""
        return bool(self._rows["task_aware"])

    def matrix(self, protocol: Protocol = "class_incremental") -> np.ndarray:
        """The accuracies as an array.

        Args:
            protocol: "class_incremental" or "task_aware", the matrix that is used.

        Returns:
            a `[T, T]` in fp64, NaN above the diagonal (for tasks that were not trained yet).

        Raises:
            ArgumentError: where the matrix is missing or empty.
        """
        rows = self._get(protocol)
        out = np.full((len(rows), len(rows)), np.nan)
        for t, row in enumerate(rows):
            out[t, : t + 1] = row
        return out

    def _get(self, protocol: str, minimum: int = 1) -> list[list[float]]:
        if protocol not in PROTOCOLS:
            raise ArgumentError(f"protocol: expected one of {PROTOCOLS}, got {protocol!r}")
        rows = self._rows[protocol]
        if not rows and self.tasks_seen:
            raise ArgumentError(f"{protocol}: no {protocol} accuracies were given to this object")
        if len(rows) < minimum:
            raise ArgumentError(f"{protocol}: this metric needs at least {minimum} tasks, got {len(rows)}")
        return rows

    def A(
        self, t: int, average: Average = "sample_weighted", protocol: Protocol = "class_incremental"
    ) -> float:
        """Accuracy over the tasks seen after task `t`.

        Args:
            t: the task, from 0.
            average: "sample_weighted", every test sample weighing the same, or "task_mean", every task.
            protocol: "class_incremental" or "task_aware", the matrix that is used.

        Returns:
            A_t, in the unit of the accuracies.

        Raises:
            ArgumentError: for a task that was not added, an unknown average, and where the matrix is missing.
        """
        rows = self._get(protocol)
        if average not in AVERAGES:
            raise ArgumentError(f"average: expected one of {AVERAGES}, got {average!r}")
        if not 0 <= t < len(rows):
            raise ArgumentError(f"t: expected a task in 0..{len(rows) - 1}, got {t}")
        weights = self.test_sizes[: t + 1] if average == "sample_weighted" else None
        return float(np.average(rows[t], weights=weights))

    def curve(
        self, average: Average = "sample_weighted", protocol: Protocol = "class_incremental"
    ) -> list[float]:
        """`A` after every task.

        Args:
            average: "sample_weighted", every test sample weighing the same, or "task_mean", every task.
            protocol: "class_incremental" or "task_aware", the matrix that is used.

        Returns:
            `[A_1, .., A_T]`.

        Raises:
            ArgumentError: for an unknown average, and where the matrix is missing or empty.
        """
        return [self.A(t, average, protocol) for t in range(len(self._get(protocol)))]

    def A_last(self, average: Average = "sample_weighted", protocol: Protocol = "class_incremental") -> float:
        """`A_T`, the accuracy after the last task.

        Args:
            average: "sample_weighted", every test sample weighing the same, or "task_mean", every task.
            protocol: "class_incremental" or "task_aware", the matrix that is used.

        Returns:
            A_T, in the unit of the accuracies.

        Raises:
            ArgumentError: for an unknown average, and where the matrix is missing or empty.
        """
        return self.curve(average, protocol)[-1]

    def A_avg(self, average: Average = "sample_weighted", protocol: Protocol = "class_incremental") -> float:
        """Mean of `A_1 .. A_T` (also called average incremental accuracy).

        Args:
            average: "sample_weighted", every test sample weighing the same, or "task_mean", every task.
            protocol: "class_incremental" or "task_aware", the matrix that is used.

        Returns:
            The mean, in the unit of the accuracies.

        Raises:
            ArgumentError: for an unknown average, and where the matrix is missing or empty.
        """
        return float(np.mean(self.curve(average, protocol)))

    def bwt(self, protocol: Protocol = "class_incremental") -> float:
        """Backward transfer `mean_{i<T}(a[T][i] - a[i][i])` (Lopez-Paz & Ranzato 2017).

        Args:
            protocol: "class_incremental" or "task_aware", the matrix that is used.

        Returns:
            The transfer, in the unit of the accuracies; negative when earlier tasks were forgotten.

        Raises:
            ArgumentError: where the matrix is missing or has fewer than 2 tasks.
        """
        rows = self._get(protocol, minimum=2)
        return float(np.mean([rows[-1][i] - rows[i][i] for i in range(len(rows) - 1)]))

    def forgetting_max(self, protocol: Protocol = "class_incremental") -> float:
        """Forgetting `mean_{i<T}(max_{t<T} a[t][i] - a[T][i])` (Chaudhry et al. 2018).

        Args:
            protocol: "class_incremental" or "task_aware", the matrix that is used.

        Returns:
            The mean drop from the best accuracy before the last task, in the unit of the accuracies.

        Raises:
            ArgumentError: where the matrix is missing or has fewer than 2 tasks.
        """
        rows = self._get(protocol, minimum=2)
        last = len(rows) - 1
        return float(np.mean([max(rows[t][i] for t in range(i, last)) - rows[last][i] for i in range(last)]))

    def stability(self, protocol: Protocol = "class_incremental") -> float:
        """`scale - forgetting_max`: the perfect score minus the forgetting.

        Args:
            protocol: "class_incremental" or "task_aware", the matrix that is used.

        Returns:
            The stability, in the unit of the accuracies.

        Raises:
            ArgumentError: where the matrix is missing or has fewer than 2 tasks.
        """
        return self.scale - self.forgetting_max(protocol)

    def stability_ratio(self, protocol: Protocol = "class_incremental") -> float:
        """The share of accuracy that is left, `mean_{i<T}(a[T][i] / a[i][i])`.

        Args:
            protocol: "class_incremental" or "task_aware", the matrix that is used.

        Returns:
            The mean ratio, without a unit; 1 where the accuracies are still those right after training.

        Raises:
            ArgumentError: as `bwt`, and when some `a[i][i]` with i < T is 0.
        """
        rows = self._get(protocol, minimum=2)
        for i in range(len(rows) - 1):
            if rows[i][i] == 0.0:
                raise ArgumentError(f"stability_ratio: accuracy on task {i} right after training it is 0")
        return float(np.mean([rows[-1][i] / rows[i][i] for i in range(len(rows) - 1)]))

    def plasticity_cil(self) -> float:
        """Mean class-incremental accuracy on each task right after learning it, `mean_i a[i][i]`.

        Returns:
            The mean, in the unit of the accuracies.

        Raises:
            ArgumentError: where the matrix is missing or empty.
        """
        return self._diagonal_mean("class_incremental")

    def plasticity_til(self) -> float:
        """Mean task-aware accuracy on each task right after learning it, `mean_i a[i][i]`.

        Returns:
            The mean, in the unit of the accuracies.

        Raises:
            ArgumentError: where the matrix is missing or empty.
        """
        return self._diagonal_mean("task_aware")

    def _diagonal_mean(self, protocol: str) -> float:
        return float(np.mean([row[-1] for row in self._get(protocol)]))

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Every metric of every protocol that was given.

        Returns:
            {protocol: {name of the metric: value}}, None where undefined (one task, or an accuracy of 0).

        Raises:
            ArgumentError: before the first task.
        """
        out: dict[str, dict[str, float | None]] = {}
        for protocol in PROTOCOLS[: 1 + self.has_task_aware]:
            rows = self._get(protocol)
            values: dict[str, float | None] = {}
            for average in AVERAGES:
                values[f"A_last_{average}"] = self.A_last(average, protocol)
                values[f"A_avg_{average}"] = self.A_avg(average, protocol)
            enough = len(rows) > 1
            ratio_defined = enough and all(rows[i][i] for i in range(len(rows) - 1))
            values["bwt"] = self.bwt(protocol) if enough else None
            values["forgetting_max"] = self.forgetting_max(protocol) if enough else None
            values["stability"] = self.stability(protocol) if enough else None
            values["stability_ratio"] = self.stability_ratio(protocol) if ratio_defined else None
            values["plasticity"] = self._diagonal_mean(protocol)
            out[protocol] = values
        return out


class TransferMetrics:
    """Accuracies of one run on all of its tasks, also on those that it has not learned yet, of models that
    can name classes which they were not trained on.

    `b[t][i]` is the accuracy on task `i = 1 .. T` after `t = 0 .. T` tasks; row 0, before the first task, is
    of the model as it came. Accuracies keep their unit; `scale` is the value of a perfect score. Formulas
    (Zheng et al. 2023, arXiv 2303.06628; Xu et al. 2024, arXiv 2406.18868), every task weighing the same:

        transfer             mean_{i>1} mean_{1<=t<i} b[t][i]: on tasks that are still to come
        average              mean_i mean_{t>=1} b[t][i]
        last                 mean_i b[T][i]
        zero_shot            mean_i b[0][i]
        zero_shot_transfer   mean_{i>1} b[0][i], what transfer would be if nothing were learned or lost

    Args:
        rows: b, `T + 1` rows of `T` accuracies in [0, scale].
        scale: the value of a perfect score, finite and > 0.

    Raises:
        ArgumentError: for rows of the wrong number or length, entries outside `[0, scale]`, and a scale out
            of range.

    Examples:
        >>> m = metrics.TransferMetrics([[0.5, 0.6], [0.9, 0.4], [0.7, 0.8]])
        >>> [round(value, 4) for value in (m.transfer(), m.average(), m.last())]
        [0.4, 0.7, 0.75]
    """

    def __init__(self, rows: Iterable[Sequence[float]], scale: float = 1.0) -> None:
        if not (math.isfinite(scale) and scale > 0):
            raise ArgumentError(f"scale: expected a finite number > 0, got {scale!r}")
        kept = [list(row) for row in rows]
        tasks = len(kept) - 1
        if tasks < 1:
            raise ArgumentError(
                f"rows: expected one before the first task and one after each, got {len(kept)} of them"
            )
        for t, row in enumerate(kept):
            if len(row) != tasks:
                raise ArgumentError(
                    f"rows[{t}]: expected {tasks} accuracies, one per task, as there are {tasks + 1} rows; "
                    f"got {len(row)}"
                )
            for i, value in enumerate(row):
                if value is None or not 0.0 <= float(value) <= scale:
                    raise ArgumentError(f"rows[{t}][{i}]: expected a number in [0, {scale:g}], got {value!r}")
        self._matrix = np.array(kept, dtype=np.float64)

    @property
    def matrix(self) -> np.ndarray:
        """Accuracies `[T + 1, T]` in fp64, a copy."""
        return self._matrix.copy()

    def transfers(self) -> list[float]:
        """The transfer to every task but the first.

        Returns:
            For each of the tasks `2 .. T` the mean accuracy on it after each task before it; empty for
            one task.
        """
        return [float(self._matrix[1 : i + 1, i].mean()) for i in range(1, self._matrix.shape[1])]

    def transfer(self) -> float:
        """The mean of `transfers`: the accuracy on tasks that are still to come.

        Returns:
            The mean, in the unit of the accuracies.

        Raises:
            ArgumentError: where there is only one task.
        """
        if not (values := self.transfers()):
            raise ArgumentError("rows: transfer needs at least 2 tasks, got 1")
        return float(np.mean(values))

    def average(self) -> float:
        """The mean accuracy on all tasks after each of them.

        Returns:
            The mean of all rows but row 0, in the unit of the accuracies.
        """
        return float(self._matrix[1:].mean())

    def last(self) -> float:
        """The mean accuracy on all tasks after the last one.

        Returns:
            The mean of the last row, in the unit of the accuracies.
        """
        return float(self._matrix[-1].mean())

    def zero_shot(self) -> float:
        """The mean accuracy on all tasks before the first one.

        Returns:
            The mean of row 0, in the unit of the accuracies.
        """
        return float(self._matrix[0].mean())

    def zero_shot_transfer(self) -> float:
        """`zero_shot` without the first task, to compare `transfer` with.

        Returns:
            The mean, in the unit of the accuracies.

        Raises:
            ArgumentError: where there is only one task.
        """
        if self._matrix.shape[1] < 2:
            raise ArgumentError("rows: zero_shot_transfer needs at least 2 tasks, got 1")
        return float(self._matrix[0, 1:].mean())

    def summary(self) -> dict[str, float | None]:
        """Every metric by name.

        Returns:
            {name of the metric: value}, None where one task is too few.
        """
        several = self._matrix.shape[1] > 1
        return {
            "transfer": self.transfer() if several else None,
            "average": self.average(),
            "last": self.last(),
            "zero_shot": self.zero_shot(),
            "zero_shot_transfer": self.zero_shot_transfer() if several else None,
        }
