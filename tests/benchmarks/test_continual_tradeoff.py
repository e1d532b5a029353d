# SPDX-License-Identifier: Apache-2.0
"""Stability against plasticity: the front, the table and the picture show the means of the records, and the
sweeps of lambda are what they are called."""

from __future__ import annotations

import numpy as np
import pytest
from continual_records import ewc, run

from benchmarks.continual import configuration, page, pictures, tradeoff
from benchmarks.continual.groups import group

CIL = "class_incremental"


def found() -> list:
    """LoRA, a line of two lambdas, and a method that is worse than LoRA in both."""
    made = [run(seed=seed, loss=10.0) for seed in (0, 1)]
    made += [ewc(value, seed, loss=loss) for value, loss in ((1e4, 8.0), (1e5, 3.0)) for seed in (0, 1)]
    worse = [run("SD-LoRA", seed, kind="SDLoRA", loss=20.0) for seed in (0, 1)]
    for record in worse:
        record["matrices"][CIL] = [[value - 5.0 for value in row] for row in record["matrices"][CIL]]
        record["metrics"][CIL]["plasticity"] -= 5.0
    return [*made, *worse]


def expected(method: str) -> tuple[float, float]:
    """(forgetting, accuracy on new tasks), means over seeds from the matrices alone."""
    matrices = [np.array([[*row, *[np.nan] * (3 - len(row))] for row in r["matrices"][CIL]])
                for r in found() if r["method"] == method]  # fmt: skip
    forgetting = [np.mean([np.nanmax(m[:-1, i]) - m[-1, i] for i in range(2)]) for m in matrices]
    return float(np.mean(forgetting)), float(np.mean([np.diag(m).mean() for m in matrices]))


def test_front_by_means():
    """Only what no other method dominates is on the front, by forgetting."""
    (some,) = tradeoff.measured(group(found()))
    places = {entry.method: tradeoff.means(entry) for entry in some}
    for method, place in places.items():
        np.testing.assert_allclose(place, expected(method), atol=1e-9)
    best = [entry.method for entry in tradeoff.front(some)]
    literal = [
        name for name, (x, y) in sorted(places.items(), key=lambda one: one[1][0])
        if not any((a < x and b >= y) or (a <= x and b > y) for a, b in places.values())
    ]  # fmt: skip
    assert best == literal and best[0] == "EWC-LoRA 100000" and "SD-LoRA" not in best


def test_equal_methods_stay():
    """Two methods with the same means do not dominate each other."""
    (some,) = tradeoff.measured(
        group([*found()[:6], *[run("again", seed, kind="CoDyRA") for seed in (0, 1)]])
    )
    best = [entry.method for entry in tradeoff.front(some)]
    assert ("LoRA" in best) == ("again" in best)


def test_table_rows():
    """The table is sorted by forgetting and names the front."""
    lines = tradeoff.markdown(group(found()))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][
        1:
    ]
    assert [row[0] for row in rows] == ["EWC-LoRA 100000", "EWC-LoRA 10000", "LoRA", "SD-LoRA"]
    assert [row[1] for row in rows] == ["100,000", "10,000", "–", "–"]
    assert rows[0][-1] == "yes" and rows[-1][-1] == ""
    assert rows[0][3].startswith(f"{expected('EWC-LoRA 100000')[0]:.1f} ±")


@pytest.mark.parametrize("records", [[run(), ewc(1e5)], [run(tasks=1), ewc(1.0, tasks=1), ewc(2.0, tasks=1)]])
def test_nothing_to_compare(records: list):
    """Without a line over lambda, or with a single task, there is neither table nor picture."""
    groups = [entry for some in tradeoff.measured(group(records)) for entry in some]
    assert groups == [] and tradeoff.markdown(group(records)) == []
    assert "tradeoff" not in {one.kind for one in pictures.planned(records)}


def test_picture():
    """Points, the line of lambda and the front are at the means."""
    (picture,) = [one for one in pictures.planned(found()) if one.kind == "tradeoff"]
    assert picture.name == "continual-language-tradeoff"
    axis = picture.draw().axes[-1]
    of = {line.get_gid(): line.get_xydata() for line in axis.lines if line.get_gid()}
    lambdas = ["LoRA", "EWC-LoRA 10000", "EWC-LoRA 100000"]
    np.testing.assert_allclose(of["lambda"], [expected(name) for name in lambdas], atol=1e-9)
    assert len(of["front"]) == len(tradeoff.front(tradeoff.measured(group(found()))[0]))
    points = {c.get_label(): c[0].get_xydata()[0] for c in axis.containers}
    for name in (*lambdas, "SD-LoRA"):
        np.testing.assert_allclose(points[name], expected(name), atol=1e-9)


@pytest.mark.parametrize("name", [n for n in configuration.available() if n.startswith(page.SWEEPS)])
def test_sweep_configuration(name: str):
    """Every sweep has LoRA and five lambdas, a power of ten apart, on the problem that it names, on seeds
    that no reported run has; those of published streams have the published lambda in the middle."""
    loaded = configuration.load(configuration.find(name))
    stem = name.removeprefix(page.SWEEPS)
    published = f"published/ewc-lora-{stem}" in configuration.available()
    source = f"published/ewc-lora-{stem}" if published else stem
    assert source in loaded.about
    reported = configuration.load(configuration.find(source)).runs
    assert {r.seed for r in loaded.runs} == {100, 101} and not {r.seed for r in reported} & {100, 101}
    known = next(one for one in reported if one.method == "EWC-LoRA")
    one_seed = [one for one in loaded.runs if one.seed == 100]
    assert [one.method for one in one_seed if one.kind == "LoRA"] == ["LoRA"]
    for kind in {one.kind for one in one_seed} - {"LoRA"}:
        lambdas = [one.options["ewc_lambda"] for one in one_seed if one.kind == kind]
        np.testing.assert_allclose(np.array(lambdas[1:]) / lambdas[:-1], [10.0] * 4)
    for one in one_seed:
        assert (one.problem, one.adapters) == (known.problem, known.adapters)
        assert not published or one.training == known.training
    line = [one for one in one_seed if one.kind == "EWCLoRA"]
    assert not published or line[2].options == known.options
    for one in line:
        assert {**one.options, "ewc_lambda": 0} == {**known.options, "ewc_lambda": 0}
