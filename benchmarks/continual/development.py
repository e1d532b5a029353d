# SPDX-License-Identifier: Apache-2.0
"""Which values of its grid were best for each method on the development seeds of a configuration.

`python -m fused_ewclora demo --suite NAME --develop` makes the records, and
`python -m fused_ewclora.benchmarks.continual.development NAME` prints the best values. Every method is
treated alike: the highest mean of A_avg over the development seeds, none of which is reported.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from fused_ewclora.errors import ArgumentError

from ..collection import Record
from ..machine import RESULTS
from ..records import read
from . import configuration
from .targets import CIL

FOLDER = RESULTS / "continual" / "development"
METRIC = "A_avg_sample_weighted"


class Choice(NamedTuple):
    """The values of a method's grid that were best, with the mean of A_avg in percent; and of all others."""

    best: dict[str, Any]
    accuracy: float
    accuracies: dict[str, float]  # by label


def choices(data: Mapping[str, Any], records: Iterable[Record]) -> dict[str, Choice]:
    """By method, for a configuration as read from its file; methods without a grid are left out.

    Raises `ArgumentError` for runs without a record.
    """
    found: dict[str, dict[int, float]] = {}
    for record in records:
        of_method = found.setdefault(record["method"], {})
        of_method[record["seed"]] = record["metrics"][CIL][METRIC]
    chosen = {}
    for entry in data["methods"]:
        if not entry.get("grid"):
            continue
        means = {}
        labels = {configuration.label(entry["name"], p): p for p in configuration.points(entry["grid"])}
        for name in labels:
            missing = [seed for seed in data["development"] if seed not in found.get(name, {})]
            if missing:
                raise ArgumentError(f"{data['name']}: {name}: no record of seed {missing[0]}")
            means[name] = fmean(found[name][seed] for seed in data["development"])
        best = max(means, key=means.__getitem__)
        chosen[entry["name"]] = Choice(labels[best], means[best], means)
    return chosen


def differences(data: Mapping[str, Any], chosen: Mapping[str, Choice]) -> list[str]:
    """Where a configuration has other values than the best, in words."""
    return [
        f"{entry['name']}: {key}: expected {value!r}, the best of its grid, got {own!r}"
        for entry in data["methods"]
        if entry["name"] in chosen
        for key, value in chosen[entry["name"]].best.items()
        if (own := configuration.value_of(data, entry, key)) != value
    ]


def read_both(name: str, folder: Path = FOLDER) -> tuple[dict[str, Any], list[Record]]:
    """A configuration and its records on development seeds."""
    path = configuration.find(name)
    configuration.load(path, develop=True)  # checks it
    data = json.loads(path.read_text())
    return data, read(folder / f"{data['name']}-development.jsonl")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints every choice; exit status 1 where a configuration has other values."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="+", help="configurations")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the records")
    args = parser.parse_args(arguments)
    wrong = []
    for name in args.name:
        data, records = read_both(name, args.results)
        chosen = choices(data, records)
        for choice in chosen.values():
            for text, accuracy in choice.accuracies.items():
                mark = "*" if accuracy == choice.accuracy else " "
                print(f"{mark} {accuracy:5.1f} %  {text}")
        wrong += differences(data, chosen)
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
