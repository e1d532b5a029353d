# SPDX-License-Identifier: Apache-2.0
"""Tables and targets of continual runs are what the records say, and say what they do not hold."""

from __future__ import annotations

import numpy as np
import pytest
from continual_records import ENVIRONMENT, changed, cost, ewc, run

from benchmarks import records
from benchmarks.collection import Unusable
from benchmarks.continual import groups, recorded, summary, targets
from fused_ewclora.metrics import TransferMetrics

SEEDS = (0, 1, 2)
LATER = "2026-02-01T00:00:00+00:00"


def three(make=run, *arguments: object, **more: object) -> list:
    return [make(*arguments, **{"seed": seed, **more}) for seed in SEEDS]


def row(found: list, method: str) -> dict:
    (only,) = [one for one in summary.table(found) if one["method"] == method]
    return only


# Records


def test_records_follow_schema():
    """Made records follow the schema."""
    assert [
        v for one in (run(), run(tasks=1), ewc(1e5), cost("LoRA")) for v in recorded.violations(one)
    ] == []


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("seed", None, "seed is missing"),
        ("seed", -1, "-1 < 0"),
        ("surprise", 1, "surprise is not described"),
        ("suite", "vision", "record.run.suite"),
        ("matrices.task_aware.1.0", 100.5, "100.5 > 100"),
        ("matrices.class_incremental.2.2", float("nan"), "record.matrices.class_incremental[2][2]"),
        ("matrices.class_incremental.1", [1.0, 2.0, 3.0], "expected 2 accuracies"),
        ("matrices.task_aware.2", None, "expected 3 entries, one per task, got 2"),
        (
            "matrices.task_aware.2.0",
            12.0,
            "record.metrics.task_aware.A_last_sample_weighted: the matrices give",
        ),
        ("metrics.class_incremental.bwt", 0.0, "record.metrics.class_incremental.bwt: the matrices give"),
        ("metrics.class_incremental.bwt", None, "record.metrics.class_incremental.bwt: the matrices give"),
        ("test_sizes.0", 0, "record.test_sizes[0]: 0 < 1"),
        ("test_sizes", [50, 50], "record.test_sizes: expected 3 entries"),
        ("classes", [], "expected at least 1 items"),
        ("tasks.1.step_ms", None, "record.tasks[1]: step_ms is missing"),
        ("tasks.1.state_bytes", 1.5, "record.tasks[1].state_bytes"),
        ("environment.commit", None, "commit is missing"),
        ("report", "text", "expected object or null"),
    ],
)
def test_bad_run_refused(path: str, value: object, complaint: str):
    """A run that breaks the schema is refused."""
    broken = changed(run(), path, value)
    assert any(complaint in one for one in recorded.violations(broken)), list(recorded.violations(broken))
    with pytest.raises(Unusable):
        recorded.check(broken)


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("cost", "epoch", "none of"),
        ("ratio_to_first.0", 1.1, "expected 1, got 1.1"),
        ("ratio_to_first", [1.0], "record.ratio_to_first: expected 10 entries"),
        ("step_seconds.3.p50", 9.0, "expected 0 < p20 <= p50 <= p80"),
        ("step_seconds.3.p80", None, "record.step_seconds[3]: p80 is missing"),
        ("adapter_parameters.2", "many", "record.adapter_parameters[2]"),
        ("rounds", 0, "0 < 1"),
    ],
)
def test_bad_costs_refused(path: str, value: object, complaint: str):
    """Costs that break the schema are refused."""
    broken = changed(cost("LoRA"), path, value)
    assert any(complaint in one for one in recorded.violations(broken)), list(recorded.violations(broken))


def test_non_record_refused():
    """Anything that is not a record is refused."""
    for thing in ([], "text", {}, None):
        with pytest.raises(Unusable):
            recorded.check(thing)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"items": {"type": "integer"}}, [1, 2], [1, "2"]),
        ({"minItems": 2}, [1, 2], [1]),
        ({"maximum": 3}, 3, 4),
        ({"additionalProperties": {"type": "string"}}, {"a": "b"}, {"a": 1}),
        (
            {"properties": {"a": {}}, "additionalProperties": {"minimum": 1}},
            {"a": 0, "b": 1},
            {"a": 1, "b": 0},
        ),
    ],
)
def test_keywords_of_schemas(schema: dict, good: object, bad: object):
    assert list(records.violations(good, schema)) == []
    assert len(list(records.violations(bad, schema))) == 1


# Tables


def test_mean_and_deviation():
    """Entries are means and sample deviations over seeds."""
    sizes = [10, 20, 70]
    found = three(sizes=sizes)
    cil = np.array([
        [[*line, *[np.nan] * (2 - t)] for t, line in enumerate(r["matrices"]["class_incremental"])]
        for r in found
    ])  # fmt: skip
    til = np.array([r["matrices"]["task_aware"][2] for r in found])
    just = np.array([np.diag(matrix) for matrix in cil])
    expected = {
        "A_last": cil[:, 2] @ sizes / 100.0,
        "A_last_task_mean": cil[:, 2].mean(1),
        "A_avg": (cil[:, 0, 0] + cil[:, 1, :2] @ sizes[:2] / 30.0 + cil[:, 2] @ sizes / 100.0) / 3.0,
        "A_avg_task_mean": np.mean([np.nanmean(cil[:, t], axis=1) for t in range(3)], axis=0),
        "bwt": (cil[:, 2, :2] - just[:, :2]).mean(1),
        "forgetting": (np.nanmax(cil[:, :2, :2], axis=1) - cil[:, 2, :2]).mean(1),
        "new_task": just.mean(1),
        "aware_A_last": til @ sizes / 100.0,
        "aware_A_last_task_mean": til.mean(1),
        "aware_bwt": np.array([np.mean([r["matrices"]["task_aware"][2][i] - r["matrices"]["task_aware"][i][i]
                                        for i in (0, 1)]) for r in found]),
        "step_ms": np.array([91.0, 92.0, 93.0]),
        "end_seconds": np.full(3, 3.0),
        "prepare_seconds": np.zeros(3),
        "state_mib_first": np.ones(3),
        "state_mib_last": np.full(3, 3.0),
        "parameters_first": np.full(3, 1000.0),
        "parameters_last": np.full(3, 3000.0),
    }  # fmt: skip
    made = row(found, "LoRA")
    assert {name for name, value in made.items() if isinstance(value, groups.Spread)} == set(expected)
    for name, values in expected.items():
        assert made[name].mean == pytest.approx(np.mean(values)), name
        assert made[name].deviation == pytest.approx(np.std(values, ddof=1), abs=1e-9), name


def test_mean_of_tasks():
    """The mean over tasks is shown where it differs."""
    same, apart = three(), three(sizes=[10, 20, 70])
    assert "mean of tasks" not in summary.render(summary.table(same))
    text = summary.render(summary.table(apart))
    assert all(f"{name}, mean of tasks" in text for name in ("A_last", "A_avg", "task-aware A_last"))


def test_fewer_seeds():
    """A method with fewer seeds is visible, and its mean is its own."""
    found = [*three(), *three(ewc, 1e5)[:2]]
    made = row(found, "EWC-LoRA 100000")
    assert (made["seeds"], made["seeds_of_suite"], made["A_last"].values) == (
        [0, 1], 3, tuple(r["metrics"]["class_incremental"]["A_last_sample_weighted"] for r in found[3:]),
    )  # fmt: skip
    lines = summary.render(summary.table(found)).splitlines()
    assert [line.split()[1:3] for line in lines if line.startswith("  LoRA ")] == [["3", "3"]] * 2
    assert len([line for line in lines if "EWC-LoRA 100000  2 of 3" in line]) == 2


def test_every_task_table():
    """Suites that are tested on tasks to come have a table of Transfer; others have none."""
    before = summary.render(summary.table(three()))
    assert "Transfer" not in before
    found = three()
    for seed, record in enumerate(found):
        every = [[40.0 + seed, 50.0, 60.0], [90.0, 52.0, 58.0], [80.0, 90.0, 62.0], [70.0, 80.0, 90.0]]
        record["matrices"]["every_task"] = every
        record["metrics"]["every_task"] = TransferMetrics(every, 100.0).summary()
        assert list(recorded.violations(record)) == []
    rows = summary.table(found)
    assert rows[0]["transfer"].mean == 56.0 and rows[0]["zero_shot_transfer"].mean == 55.0
    assert rows[0]["zero_shot"].mean == pytest.approx(50 + 1 / 3)
    assert "Transfer" in summary.render(rows) and "Transfer" in "".join(summary.markdown(rows)[summary.EVERY])


@pytest.mark.parametrize(
    ("change", "told"),
    [({"tasks": 2}, "tasks 2"), ({"epochs": 1}, "epochs 1"), ({"options": {"x": 1}}, "x 1")],
)
def test_other_setting_row(change: dict, told: str):
    """Runs with another setting have a row of their own."""
    found = [*three()[:2], run(seed=2, **change)]
    rows = summary.table(found)
    assert [one["seeds"] for one in rows] == [[0, 1], [2]] and rows[0]["method"] != rows[1]["method"]
    assert told in rows[1]["method"] and told not in rows[0]["method"]
    assert rows[0]["A_last"] == row(found[:2], "LoRA")["A_last"]


def test_newest_repeat_counts():
    """Of runs that were repeated, the newest counts."""
    old, new = run(loss=30.0), run(loss=5.0, time=LATER)
    assert (
        row([new, old], "LoRA")["A_last"] == row([new], "LoRA")["A_last"] == row([old, new], "LoRA")["A_last"]
    )
    assert row([new], "LoRA")["A_last"] != row([old], "LoRA")["A_last"]


def test_machines_not_averaged():
    """Times from several machines are not averaged."""
    found = [*three()[:2], run(seed=2, environment={**ENVIRONMENT, "device": "another CPU"})]
    made = row(found, "LoRA")
    assert made["step_ms"] is made["end_seconds"] is made["prepare_seconds"] is None
    assert made["A_last"] == row(three(), "LoRA")["A_last"] and made["parameters_last"].mean == 3000
    assert "Ran on several machines, hence without times: LoRA." in summary.render(summary.table(found))


def test_single_seed_or_task():
    """One seed has no deviation, and one task has no backward transfer."""
    made = row([run(tasks=1)], "LoRA")
    assert made["bwt"] is made["forgetting"] is made["aware_bwt"] is None and made["A_last"].deviation is None
    text = summary.render([made])
    assert "±" not in text.partition("\n")[2].replace("mean ± standard", "") and "–" in text


def test_method_order():
    """Methods are ordered by kind and lambda, whichever ended first."""
    found = [ewc(1e6), run("CoDyRA", kind="CoDyRA"), ewc(1e4), run("SD-LoRA", kind="SDLoRA"), run(), ewc(1e5)]
    names = ["LoRA", "EWC-LoRA 10000", "EWC-LoRA 100000", "EWC-LoRA 1e+06", "SD-LoRA", "CoDyRA"]
    assert [one["method"] for one in summary.table(found)] == names


def test_markdown_matches_terminal():
    """The Markdown table has the same cells as the terminal."""
    rows = summary.table([*three(), *three(ewc, 1e5)])
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for lines in summary.markdown(rows).values()
        for line in lines
    ]
    (accuracy, costs) = [line for line in cells if line[0] == "EWC-LoRA 100000"]
    assert accuracy[3] == f"{rows[1]['A_last'].mean:.1f} ± {rows[1]['A_last'].deviation:.1f}"
    assert costs[3:5] == ["92.0 ± 1.0", "0.00"]
    assert accuracy[3] in summary.render(rows)


# Targets


def judged(found: list, **more: object) -> list[str]:
    return [targets.verdict(goal) for goal in targets.goals(found, **more)]


def good() -> list:
    """LoRA forgets 20 points in two tasks; lambda makes that less."""
    return [*three(), *(r for value, loss in ((1e4, 8.0), (1e5, 7.0), (1e6, 6.0))
                        for r in three(ewc, value, loss=loss, aware=91.0))]  # fmt: skip


def test_targets_met():
    """Targets that are met are listed with their values."""
    forgetting, gain, monotone = targets.goals(good())
    assert judged(good()) == ["PASS"] * 3
    bwt = {m: np.mean([r["metrics"]["class_incremental"]["bwt"] for r in good() if r["method"] == m])
           for m in ("LoRA", "EWC-LoRA 10000", "EWC-LoRA 100000", "EWC-LoRA 1e+06")}  # fmt: skip
    assert forgetting["value"] == pytest.approx(bwt["EWC-LoRA 100000"] / bwt["LoRA"])
    assert gain["value"] == pytest.approx(1.0) and gain["bound"] == "least"
    assert monotone["value"] == pytest.approx(max(-np.diff(list(bwt.values()))))
    assert "seed by seed: +1.00, +1.00, +1.00; mean 1.00" in gain["details"][-1]
    assert len(monotone["details"]) == 4 + 3


@pytest.mark.parametrize(
    ("which", "change"), [(0, {"loss": 7.9}), (1, {"aware": 89.9}), (2, {"loss": 8.1}), (2, {"loss": 5.9})]
)
def test_targets_that_are_missed(which: int, change: dict):
    worse = three(ewc, 1e5, **{"loss": 7.0, "aware": 91.0, **change}, time=LATER)
    assert judged([*good(), *worse])[which] == "FALLS SHORT"


def test_chosen_method():
    """The chosen method is the one of that name, the one of middle lambda, or an argument."""
    named = three(ewc, 1e3, method="EWC-LoRA", loss=9.0)
    values = [
        targets.goals(found, chosen=chosen)[0]["value"]
        for found, chosen in ((good(), None), ([*good(), *named], None), (good(), "EWC-LoRA 1e+06"))
    ]
    assert values[1] > values[0] > values[2]
    assert judged(good(), chosen="nobody") == ["NOT MEASURED"] * 3


@pytest.mark.parametrize("found", [[], three(), three(ewc, 1e5), three(suite="vision"), [cost("LoRA")]])
def test_missing_not_measured(found: list):
    """What is missing counts as not measured."""
    goals = targets.goals(found)
    assert [(goal["value"], goal["met"]) for goal in goals] == [(None, None)] * 3
    assert all(goal["details"] for goal in goals) and judged(found) == ["NOT MEASURED"] * 3


def test_single_lambda():
    """A single lambda shows no order."""
    found = [*three(), *three(ewc, 1e5, loss=7.0)]
    assert judged(found) == ["PASS", "PASS", "NOT MEASURED"]


def test_common_seeds():
    """Only seeds that all compared methods share count."""
    fewer = [r for r in good() if not (r["kind"] == "EWCLoRA" and r["seed"] == 0)]
    without = [r for r in good() if r["seed"] != 0]
    assert [g["value"] for g in targets.goals(fewer)] == [g["value"] for g in targets.goals(without)]
    apart = [r for r in good() if (r["kind"] == "LoRA") == (r["seed"] == 0)]
    assert judged(apart) == ["NOT MEASURED"] * 3


def test_nothing_forgotten():
    """Where nothing is forgotten there is no ratio, but gains count."""
    gains = [r for value in (1e4, 1e5) for r in three(ewc, value, loss=-5.0)]
    assert judged([*three(loss=-2.0), *gains])[0] == "NOT MEASURED"
    assert judged([*three(loss=2.0), *gains])[0] == "PASS"


def test_incomparable_lambdas():
    """Lambdas of another Fisher or another training are not compared."""
    other = []
    for value, loss in ((10.0, 1.0), (1e7, 12.0)):
        other += three(ewc, value, loss=loss, options={"ewc_lambda": value, "fisher_mode": "sample"})
    assert targets.goals([*good(), *other]) == targets.goals(good())
    trained = [*good(), *three(epochs=1), *three(ewc, 1e5, epochs=1, loss=9.9, aware=89.0)]
    assert judged(trained) == ["PASS"] * 3 + ["FALLS SHORT", "FALLS SHORT", "NOT MEASURED"]


def test_costs_have_their_targets():
    def verdicts(growth: float) -> list[str]:
        found = [cost("SD-LoRA", growth), cost("EWC-LoRA", 0.0)]
        return [targets.verdict(goal) for goal in summary.cost_goals(found)]

    assert verdicts(0.03)[0] == "PASS" and verdicts(0.05)[0] == "FALLS SHORT"
    assert {targets.verdict(goal) for goal in summary.cost_goals([])} == {"NOT MEASURED"}


def test_terminal_output():
    """The terminal shows the tables and targets of what was run."""
    text = summary.overview([*good(), cost("SD-LoRA", 0.05)])
    assert "language: accuracy in percent" in text and "language: costs" in text
    assert text.count("PASS") == 3 and text.count("FALLS SHORT") == 1
    assert "targets" not in summary.overview(three(suite="vision")) and summary.overview([]) == ""
