# SPDX-License-Identifier: Apache-2.0
"""Text classification sets from their files, as distributed: the examples of a set, checked line by line.

Expected layouts in the data folder, by the name of the setting "layout":

    cl_benchmark   CL_Benchmark/<type>/<set>/{train,test,labels}.json   lists of {"sentence", "label"}
    csv            <release>/{train,test}.csv                           label number from 1, then columns
    jsonl          <set>/{train,test}.jsonl                             {"sentence", "label"} per line
    parquet        <set>/{train,test}*.parquet                          read by the library datasets
"""

from __future__ import annotations

import csv
import importlib
import json
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_ewclora.demo.formats import DataError

from .text_tasks import TASKS, TextTask

UNLABELLED = "-"  # annotators did not agree; such examples of MNLI's test set have no class
_BIGGEST_FIELD = 2**24  # characters in a column of a CSV file


@dataclass(frozen=True)
class Example:
    """A text, and its class as a position in the label words of the set."""

    text: str
    label: int


@dataclass(frozen=True)
class TextSet:
    """The examples of a set; unlabelled: test examples without a class, which are left out.

    Raises `DataError` for a class without training examples, and for a split without any.
    """

    name: str
    words: tuple[str, ...]
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    unlabelled: int = 0

    def __post_init__(self) -> None:
        if not self.test:
            raise DataError(f"{self.name}: expected test examples, found none")
        present = {example.label for example in self.train}
        if lacking := [word for label, word in enumerate(self.words) if label not in present]:
            raise DataError(f"{self.name}: class {lacking[0]!r}: expected training examples, found none")


def read(name: str, root: Path, layout: str) -> TextSet:
    """A set of `text_tasks.TASKS` from the data folder `root`; layout: one of `READERS`.

    Raises `DataError` with the file, the line or entry, and what was expected.

        >>> read("agnews", Path("data"), "csv").words[0]
        'World'
    """
    if name not in TASKS:
        raise DataError(f"sets: expected some of {', '.join(TASKS)}, got {name!r}")
    if layout not in READERS:
        raise DataError(f"layout: expected one of {', '.join(READERS)}, got {layout!r}")
    return READERS[layout](name, TASKS[name], root)


def cl_benchmark(name: str, task: TextTask, root: Path) -> TextSet:
    """The layout of O-LoRA's repository, whose files have texts and label words ready for prompts."""
    folder = root / "CL_Benchmark" / task.type / name
    for file in ("train.json", "test.json", "labels.json"):
        if not (folder / file).is_file():
            raise DataError(
                f"{folder}: expected the files train.json, test.json and labels.json of CL_Benchmark, "
                f"found no {file}"
            )
    words = _listed(folder / "labels.json")
    if not words or not all(isinstance(word, str) and word for word in words) or len(set(words)) < len(words):
        raise DataError(f"{folder / 'labels.json'}: expected a list of distinct label words, got {words!r}")
    splits = {}
    for split in ("train", "test"):
        file = folder / f"{split}.json"
        entries = ((f"{file}, entry {n}", entry) for n, entry in enumerate(_listed(file), 1))
        splits[split] = list(_worded(entries, tuple(words)))
    return _without_unlabelled(name, tuple(words), splits)


def csv_release(name: str, task: TextTask, root: Path) -> TextSet:
    """The release of "Character-level Convolutional Networks for Text Classification"
    (arXiv 1509.01626)."""
    if task.csv is None:
        known = ", ".join(key for key, value in TASKS.items() if value.csv is not None)
        raise DataError(f"layout: csv: sets of this release are {known}, got {name!r}")
    folder = root / task.folder
    splits = {}
    for split in ("train", "test"):
        if not (file := folder / f"{split}.csv").is_file():
            raise DataError(
                f"{folder}: expected the files train.csv and test.csv of {name} (its archive "
                f"{task.folder}.tar.gz, extracted in {root}), found no {split}.csv"
            )
        splits[split] = tuple(_rows(file, task))
    return TextSet(name, task.words, splits["train"], splits["test"])


def json_lines(name: str, task: TextTask, root: Path) -> TextSet:
    """One object {"sentence", "label"} per line; the label is a label word or its number from 0."""
    splits = {}
    for split in ("train", "test"):
        file = root / name / f"{split}.jsonl"
        if not file.is_file():
            raise DataError(f"{root / name}: expected the files train.jsonl and test.jsonl, found no {file}")
        splits[split] = list(_worded(_json_entries(file), task.words))
    return _without_unlabelled(name, task.words, splits)


def parquet(name: str, task: TextTask, root: Path) -> TextSet:
    """Tables as on the dataset hub, read by the library datasets, which is not installed with this one."""
    if task.parquet is None:
        raise DataError(f"layout: parquet: {name} has no such form")
    files = {split: sorted(map(str, (root / name).glob(f"{split}*.parquet"))) for split in ("train", "test")}
    for split, found in files.items():
        if not found:
            raise DataError(
                f"{root / name}: expected files train*.parquet and test*.parquet (of GLUE and SuperGLUE, "
                f"whose test labels are secret, the validation split), found no {split}*.parquet"
            )
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"layout: parquet needs the library datasets (pip install datasets): {error}"
        ) from error
    try:
        tables = library.load_dataset("parquet", data_files=files)
    except Exception as error:  # of a damaged file: the library can raise almost any exception
        raise DataError(f"{root / name}: not readable as parquet: {type(error).__name__}: {error}") from error
    return TextSet(
        name,
        task.words,
        tuple(_formatted(tables["train"], task, f"{root / name}, train")),
        tuple(_formatted(tables["test"], task, f"{root / name}, test")),
    )


READERS: dict[str, Callable[[str, TextTask, Path], TextSet]] = {
    "cl_benchmark": cl_benchmark,
    "csv": csv_release,
    "jsonl": json_lines,
    "parquet": parquet,
}


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _listed(path: Path) -> list[Any]:
    try:
        found = json.loads(_text(path))
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(found, list):
        raise DataError(f"{path}: expected a list, got {type(found).__name__}")
    return found


def _json_entries(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield where, json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not readable as JSON: {error}") from error


def _worded(entries: Iterator[tuple[str, Any]], words: Sequence[str]) -> Iterator[Example | None]:
    """The examples of entries {"sentence", "label"}; None for one without a class."""
    for where, entry in entries:
        text = entry.get("sentence") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise DataError(f'{where}: expected {{"sentence": text, "label": word}}, got {str(entry)[:80]!r}')
        label = entry.get("label")
        if label == UNLABELLED:
            yield None
        elif isinstance(label, str) and label in words:
            yield Example(text, words.index(label))
        elif isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(words):
            yield Example(text, label)
        else:
            raise DataError(f"{where}: label: expected one of {', '.join(words)}, got {label!r}")


def _without_unlabelled(
    name: str, words: tuple[str, ...], splits: dict[str, list[Example | None]]
) -> TextSet:
    train, test = (
        tuple(example for example in splits[split] if example is not None) for split in ("train", "test")
    )
    if len(train) < len(splits["train"]):
        raise DataError(f"{name}: expected a class for every training example, found {UNLABELLED!r}")
    return TextSet(name, words, train, test, len(splits["test"]) - len(test))


def _rows(path: Path, task: TextTask) -> Iterator[Example]:
    assert task.csv is not None
    columns, template = task.csv
    csv.field_size_limit(_BIGGEST_FIELD)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if len(row) != 1 + len(columns):
                    raise DataError(
                        f"{where}: expected {1 + len(columns)} columns (label, {', '.join(columns)}), "
                        f"got {len(row)}"
                    )
                if not row[0].isdecimal() or not 1 <= int(row[0]) <= len(task.words):
                    raise DataError(f"{where}: expected a label from 1 to {len(task.words)}, got {row[0]!r}")
                # The release writes line breaks as a backslash and n.
                values = [value.replace("\\n", "\n").strip() for value in row[1:]]
                if not any(values):
                    raise DataError(f"{where}: expected a text, got none")
                yield Example(template.format(**dict(zip(columns, values, strict=True))), int(row[0]) - 1)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV: {error}") from error


def _formatted(table: Any, task: TextTask, where: str) -> Iterator[Example]:
    assert task.parquet is not None
    columns = [name for _, name, _, _ in string.Formatter().parse(task.parquet) if name]
    if lacking := [name for name in (*columns, task.label) if name not in table.column_names]:
        raise DataError(f"{where}: expected a column {lacking[0]}, found {', '.join(table.column_names)}")
    for number, row in enumerate(table):
        label, values = row[task.label], {name: row[name] for name in columns}
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(task.words):
            raise DataError(
                f"{where}, row {number}: {task.label}: expected 0 to {len(task.words) - 1}, got {label!r} "
                "(-1 marks secret labels: use the validation split)"
            )
        if wrong := [name for name, value in values.items() if not isinstance(value, str)]:
            raise DataError(f"{where}, row {number}: {wrong[0]}: expected a text, got {values[wrong[0]]!r}")
        yield Example(task.parquet.format(**values), label)
