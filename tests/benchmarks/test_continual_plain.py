# SPDX-License-Identifier: Apache-2.0
"""What is said of methods that do not beat plain LoRA."""

from __future__ import annotations

import continual_records as records
import pytest

from benchmarks.continual import plain
from benchmarks.continual.groups import group


def made(accuracies: dict[str, list[float]]) -> list[str]:
    """The sentences for methods with these final accuracies by seed."""
    found = []
    for method, values in accuracies.items():
        kind = "LoRA" if method == "LoRA" else "SDLoRA"
        for seed, value in enumerate(values):
            record = records.run(method, seed, kind=kind)
            record["metrics"]["class_incremental"]["A_last_sample_weighted"] = value
            found.append(record)
    return plain.sentences(group(found))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([52.0, 53.0, 54.0], "X beats LoRA by 3.0 (3 seeds)."),
        ([56.0, 50.0, 51.5], "X is not shown to beat LoRA: +2.5 ± 3.9 (3 seeds)."),
        ([48.0, 49.0, 50.5], "X does not beat LoRA: -0.8 ± 0.3 (3 seeds)."),
        ([49.0, 51.0], "X is not shown to beat LoRA: +0.5 ± 0.7 (2 seeds)."),
        ([52.0], "X is not shown to beat LoRA: +3.0 (1 seed)."),
    ],
)
def test_sentences(values: list[float], told: str) -> None:
    """Differences are taken seed by seed, and one below its deviation is no improvement."""
    assert made({"LoRA": [49.0, 50.0, 51.0], "X": values}) == [told]


def test_without_plain() -> None:
    """Nothing is said without LoRA, or without a common seed."""
    assert made({"X": [50.0]}) == [] and made({"LoRA": [50.0]}) == []
    assert plain.markdown(group([records.run("LoRA", 0)])) == []
