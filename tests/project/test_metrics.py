# SPDX-License-Identifier: Apache-2.0
"""Metrics against matrices worked out by hand, and properties that hold for every matrix."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fused_ewclora.errors import ArgumentError
from fused_ewclora.metrics import ContinualMetrics, TransferMetrics

CIL = [[90.0], [60.0, 80.0], [70.0, 40.0, 50.0]]
TIL = [[90.0], [80.0, 90.0], [85.0, 88.0, 95.0]]
SIZES = [100, 300, 600]
EVERY = [[50.0, 60.0, 70.0], [90.0, 40.0, 66.0], [80.0, 88.0, 44.0], [70.0, 80.0, 99.0]]
Case = tuple[list[list[float]], list[int]]  # rows and test sizes


@pytest.fixture
def metrics() -> ContinualMetrics:
    return ContinualMetrics.from_matrix(CIL, SIZES, TIL, scale=100.0)


@st.composite
def matrices(draw: st.DrawFn) -> Case:
    tasks = draw(st.integers(2, 6))
    unit = st.floats(0.0, 1.0, allow_nan=False)
    rows = [draw(st.lists(unit, min_size=t + 1, max_size=t + 1)) for t in range(tasks)]
    return rows, draw(st.lists(st.integers(1, 5000), min_size=tasks, max_size=tasks))


def test_hand_computed(metrics: ContinualMetrics) -> None:
    """Named metrics match hand computation."""
    assert metrics.curve("task_mean") == pytest.approx([90.0, 70.0, 160.0 / 3])
    assert metrics.curve("sample_weighted") == pytest.approx(
        [90.0, (6000 + 24000) / 400, (7000 + 12000 + 30000) / 1000]
    )
    assert metrics.A_last("sample_weighted") == pytest.approx(49.0)
    assert metrics.A_avg("sample_weighted") == pytest.approx((90 + 75 + 49) / 3)
    assert metrics.bwt() == pytest.approx(((70 - 90) + (40 - 80)) / 2)
    assert metrics.forgetting_max() == pytest.approx(((90 - 70) + (80 - 40)) / 2)
    assert metrics.stability() == pytest.approx(70.0)
    assert metrics.stability_ratio() == pytest.approx((70 / 90 + 40 / 80) / 2)
    assert metrics.plasticity_cil() == pytest.approx((90 + 80 + 50) / 3)
    assert metrics.plasticity_til() == pytest.approx((90 + 90 + 95) / 3)
    assert metrics.bwt("task_aware") == pytest.approx(((85 - 90) + (88 - 90)) / 2)


def test_forgetting_best_row() -> None:
    """`forgetting_max` uses the best row before the last one, not the diagonal."""
    m = ContinualMetrics.from_matrix([[0.5], [0.9, 0.7], [0.6, 0.7, 0.1]], [1, 1, 1])
    assert m.forgetting_max() == pytest.approx(0.15)
    assert m.bwt() == pytest.approx(0.05)


def test_forgetting_negative() -> None:
    """`forgetting_max` is negative when the last row is the best."""
    assert ContinualMetrics.from_matrix([[0.5], [0.8, 0.1]], [1, 1]).forgetting_max() == pytest.approx(-0.3)


@given(matrices())
def test_averages_agree(case: Case) -> None:
    """Equal sizes make both averages agree."""
    rows, _ = case
    m = ContinualMetrics.from_matrix(rows, [7] * len(rows))
    assert m.curve("sample_weighted") == pytest.approx(m.curve("task_mean"))


@given(matrices())
def test_bounds(case: Case) -> None:
    """Forgetting is at least minus BWT, and values are bounded."""
    rows, sizes = case
    m = ContinualMetrics.from_matrix(rows, sizes)
    assert m.forgetting_max() >= -m.bwt() - 1e-12
    assert -1.0 <= m.bwt() <= 1.0
    for average in ("sample_weighted", "task_mean"):
        for t, value in enumerate(m.curve(average)):
            assert min(rows[t]) - 1e-12 <= value <= max(rows[t]) + 1e-12


@given(matrices(), st.floats(1.0, 100.0))
def test_unit_of_accuracy(case: Case, unit: float) -> None:
    """Metrics scale with the unit of accuracy."""
    rows, sizes = case
    small = ContinualMetrics.from_matrix(rows, sizes).summary()["class_incremental"]
    large = ContinualMetrics.from_matrix(
        [[min(v * unit, unit) for v in row] for row in rows], sizes, scale=unit
    ).summary()["class_incremental"]
    for name, value in small.items():
        factor = 1.0 if name == "stability_ratio" else unit
        if name == "stability_ratio" and min(row[-1] for row in rows) < 1e-100:
            continue  # undefined at 0, and overflows just above it
        assert value is not None
        assert large[name] == pytest.approx(value * factor, rel=1e-9, abs=1e-9 * unit), name


@given(matrices())
def test_above_diagonal(case: Case) -> None:
    """Entries above the diagonal are ignored."""
    rows, sizes = case
    square = np.full((len(rows), len(rows)), np.nan)
    for t, row in enumerate(rows):
        square[t, : t + 1] = row
    m = ContinualMetrics.from_matrix(square.tolist(), sizes)
    assert m.summary() == ContinualMetrics.from_matrix(rows, sizes).summary()
    np.testing.assert_array_equal(m.matrix(), square)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1, 1.5, None])
def test_impossible_refused(bad: float | None) -> None:
    """Impossible accuracies are refused and nothing is added."""
    m = ContinualMetrics([10, 10])
    m.add([0.5], [0.5])
    with pytest.raises(ArgumentError, match=r"task_aware: accuracy on task 1 after task 1.*\[0, 1\]"):
        m.add([0.5, 0.5], [0.5, bad])  # type: ignore[list-item]
    assert m.tasks_seen == 1
    assert m.matrix("task_aware").shape == (1, 1)


def test_row_length() -> None:
    """Rows of the wrong length are refused."""
    m = ContinualMetrics([10, 10])
    m.add([0.5])
    with pytest.raises(ArgumentError, match=r"expected 2 accuracies \(tasks 0\.\.1\), got 1"):
        m.add([0.5])
    m.add([0.5, 0.5])
    with pytest.raises(ArgumentError, match="all 2 tasks"):
        m.add([0.5, 0.5, 0.5])


def test_missing_data_is_named(metrics: ContinualMetrics) -> None:
    only_cil = ContinualMetrics.from_matrix(CIL, SIZES, scale=100.0)
    with pytest.raises(ArgumentError, match="no task_aware accuracies"):
        only_cil.plasticity_til()
    with pytest.raises(ArgumentError, match="at least 1 tasks, got 0"):
        ContinualMetrics([5]).A_last()
    with pytest.raises(ArgumentError, match="at least 2 tasks, got 1"):
        ContinualMetrics.from_matrix([[0.5]], [5]).bwt()
    with pytest.raises(ArgumentError, match="every task or for none"):
        mixed = ContinualMetrics([5, 5])
        mixed.add([0.5], [0.5])
        mixed.add([0.5, 0.5])
    with pytest.raises(ArgumentError, match="expected 3 rows"):
        ContinualMetrics.from_matrix(CIL, SIZES, TIL[:2], scale=100.0)
    with pytest.raises(ArgumentError, match="right after training it is 0"):
        ContinualMetrics.from_matrix([[0.0], [0.5, 0.5]], [1, 1]).stability_ratio()


def test_bad_arguments_are_named(metrics: ContinualMetrics) -> None:
    with pytest.raises(ArgumentError, match="protocol"):
        metrics.bwt("cil")
    with pytest.raises(ArgumentError, match="average"):
        metrics.A_last("mean")
    with pytest.raises(ArgumentError, match=r"t: expected a task in 0\.\.2, got 3"):
        metrics.A(3)
    for sizes in ([], [0], [1.5], [-3], [True]):
        with pytest.raises(ArgumentError, match="test_sizes"):
            ContinualMetrics(sizes)
    for scale in (0.0, math.nan, math.inf, -1.0):
        with pytest.raises(ArgumentError, match="scale"):
            ContinualMetrics([1], scale=scale)


def test_one_task() -> None:
    """Summary of one task has no backward transfer."""
    summary = ContinualMetrics.from_matrix([[0.5]], [5]).summary()
    assert list(summary) == ["class_incremental"]
    assert summary["class_incremental"]["bwt"] is None
    assert summary["class_incremental"]["A_last_task_mean"] == 0.5


def test_transfer_hand_computed() -> None:
    """Transfer, Average and Last of a matrix worked out by hand; tasks weigh the same."""
    metrics = TransferMetrics(EVERY, 100.0)
    assert metrics.transfers() == pytest.approx([40.0, (66 + 44) / 2])
    assert metrics.summary() == pytest.approx(
        {
            "transfer": (40 + 55) / 2,
            "average": (90 + 40 + 66 + 80 + 88 + 44 + 70 + 80 + 99) / 9,
            "last": (70 + 80 + 99) / 3,
            "zero_shot": 60.0,
            "zero_shot_transfer": 65.0,
        }
    )
    metrics.matrix[:] = 0.0  # a copy
    assert metrics.last() == pytest.approx(83.0)


@given(st.integers(2, 6).flatmap(lambda n: st.lists(st.floats(0.01, 1.0), min_size=n * n, max_size=n * n)))
def test_transfer_of_triangle(values: list[float]) -> None:
    """The published evaluation: means of the columns of the upper triangle, and of those means."""
    tasks = math.isqrt(len(values))
    after = np.array(values).reshape(tasks, tasks)
    metrics = TransferMetrics([[0.5] * tasks, *after.tolist()])
    columns = np.ma.masked_equal(np.triu(after, k=1), 0.0).mean(axis=0)
    assert metrics.transfer() == pytest.approx(float(columns.mean()))
    assert metrics.average() == pytest.approx(float(after.mean(axis=0).mean()))
    assert metrics.last() == pytest.approx(float(after[-1].mean()))


def test_transfer_published() -> None:
    """The published means over domains of one method and of CLIP, from its accuracies on each domain."""
    zero_shot = [0.0, 88.4, 68.2, 44.6, 54.9, 71.0, 88.5, 59.4, 89.0, 64.7, 65.2]
    learned = [31.6, 95.5, 72.8, 63.5, 85.0, 89.7, 85.0, 94.7, 93.2, 73.6, 73.0]
    metrics = TransferMetrics([*[zero_shot] * 11, learned], 100.0)
    assert round(metrics.zero_shot_transfer(), 1) == round(metrics.transfer(), 1) == 69.4
    assert round(metrics.last(), 1) == 78.0


def test_transfer_needs_tasks() -> None:
    """One task has no transfer; rows of a wrong number or length and values out of range are named."""
    single = TransferMetrics([[0.5], [0.75]])
    assert single.summary() == {
        "transfer": None, "average": 0.75, "last": 0.75, "zero_shot": 0.5, "zero_shot_transfer": None,
    }  # fmt: skip
    for ask in (single.transfer, single.zero_shot_transfer):
        with pytest.raises(ArgumentError, match="at least 2 tasks, got 1"):
            ask()
    for rows, words in (
        ([[0.5]], "one before the first task and one after each, got 1"),
        ([[0.5, 0.5], [0.5]], r"rows\[0\]: expected 1 accuracies"),
        ([[0.5], [1.5]], r"rows\[1\]\[0\]: expected a number in \[0, 1\], got 1.5"),
        ([[math.nan], [0.5]], r"rows\[0\]\[0\]"),
    ):
        with pytest.raises(ArgumentError, match=words):
            TransferMetrics(rows)
    with pytest.raises(ArgumentError, match="scale"):
        TransferMetrics(EVERY, 0.0)
