# SPDX-License-Identifier: Apache-2.0
"""Small text sets in the layouts that are distributed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from benchmarks.continual.text_tasks import TASKS


def sentence(label: int, number: int) -> str:
    """Texts say their class and differ."""
    return f"{'abcdefghijklmn'[label] * 3} {number} , more"


def entries(name: str, each: int, first: int = 0) -> list[dict[str, str]]:
    words = TASKS[name].words
    return [
        {"sentence": sentence(label, first + number), "label": word}
        for number in range(each)
        for label, word in enumerate(words)
    ]


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_cl_benchmark(root: Path, name: str, train: int = 3, test: int = 2) -> Path:
    folder = root / "CL_Benchmark" / TASKS[name].type / name
    write_json(folder / "labels.json", list(TASKS[name].words))
    write_json(folder / "train.json", entries(name, train))
    write_json(folder / "test.json", entries(name, test, train))
    return folder


def write_csv(root: Path, name: str, train: int = 3, test: int = 2) -> Path:
    task = TASKS[name]
    assert task.csv is not None
    folder = root / task.folder
    folder.mkdir(parents=True)
    for split, start, count in (("train", 0, train), ("test", train, test)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            rows = csv.writer(file, quoting=csv.QUOTE_ALL)
            for number in range(start, start + count):
                for label in range(len(task.words)):
                    texts = [f'{column} "of" {label},\\n{number}' for column in task.csv[0]]
                    rows.writerow([label + 1, *texts])
    return folder


def write_jsonl(root: Path, name: str, train: int = 3, test: int = 2) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    for split, start, count in (("train", 0, train), ("test", train, test)):
        lines = [json.dumps(entry) for entry in entries(name, count, start)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder


class Table(list[dict[str, Any]]):
    """Rows as a data set of the library datasets: iterable, with names of columns."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        super().__init__(rows)
        self.column_names = list(rows[0]) if rows else []
