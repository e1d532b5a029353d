# SPDX-License-Identifier: Apache-2.0
"""Text sets of continual runs: every layout, every refusal, the published orders, prompts and their words."""

from __future__ import annotations

import string
import sys
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from text_files import Table, sentence, write_cl_benchmark, write_csv, write_json, write_jsonl

from benchmarks.continual import configuration, prompts, text_sets, texts
from benchmarks.continual.text_sets import Example, TextSet
from benchmarks.continual.text_tasks import ORDERS, TASKS
from fused_ewclora.demo.formats import DataError

RELEASED = [name for name, task in TASKS.items() if task.csv is not None]


def test_orders_complete() -> None:
    """Orders 1 to 3 hold the four sets, orders 4 to 6 all fifteen."""
    for number, names in ORDERS.items():
        expected = {"dbpedia", "amazon", "yahoo", "agnews"} if number <= 3 else set(TASKS)
        assert set(names) == expected and len(names) == len(expected)
    assert len(set(ORDERS.values())) == 6 and len(TASKS) == 15


@pytest.mark.parametrize("name", ["agnews", "MNLI", "COPA", "yahoo"])
@pytest.mark.parametrize(("layout", "write"), [("cl_benchmark", write_cl_benchmark), ("jsonl", write_jsonl)])
def test_json_layouts(name: str, layout: str, write: Callable[..., Path], tmp_path: Path) -> None:
    """Texts and classes are those of the files, in their order."""
    write(tmp_path, name)
    found = text_sets.read(name, tmp_path, layout)
    count = len(TASKS[name].words)
    assert found.words == TASKS[name].words and found.unlabelled == 0
    assert found.train == tuple(Example(sentence(n % count, n // count), n % count) for n in range(3 * count))
    assert found.test == tuple(
        Example(sentence(n % count, 3 + n // count), n % count) for n in range(2 * count)
    )


@pytest.mark.parametrize("name", RELEASED)
def test_csv_release(name: str, tmp_path: Path) -> None:
    """Columns become a text; line breaks and quotes are read."""
    write_csv(tmp_path, name)
    found = text_sets.read(name, tmp_path, "csv")
    assert Counter(one.label for one in found.train) == dict.fromkeys(range(len(TASKS[name].words)), 3)
    values = {column: f'{column} "of" 1,\n4' for column in TASKS[name].csv[0]}  # type: ignore[index]
    assert found.test[len(found.words) + 1] == Example(TASKS[name].csv[1].format(**values), 1)  # type: ignore[index]


def test_label_order_of_file(tmp_path: Path) -> None:
    """CL_Benchmark's own label words count; a number in a file of lines counts from 0."""
    folder = write_cl_benchmark(tmp_path, "CB")
    write_json(folder / "labels.json", ["neutral", "entailment", "contradiction"])
    found = text_sets.read("CB", tmp_path, "cl_benchmark")
    assert found.words[0] == "neutral" and found.train[0] == Example(sentence(0, 0), 1)
    lines = write_jsonl(tmp_path, "CB") / "train.jsonl"
    lines.write_text("".join(f'{{"sentence": "x {n}", "label": {n}}}\n' for n in range(3)))
    assert [one.label for one in text_sets.read("CB", tmp_path, "jsonl").train] == [0, 1, 2]


def test_unlabelled_left_out(tmp_path: Path) -> None:
    """Test examples without a class are left out and counted; training examples are refused."""
    folder = write_cl_benchmark(tmp_path, "MNLI")
    odd = {"sentence": "sentence 1: x\nsentence 2: y", "label": "-"}
    write_json(folder / "test.json", [odd, {**odd, "label": "neutral"}, odd])
    found = text_sets.read("MNLI", tmp_path, "cl_benchmark")
    assert found.unlabelled == 2 and found.test == (Example(odd["sentence"], 1),)
    write_json(folder / "train.json", [odd])
    with pytest.raises(DataError, match="MNLI: expected a class for every training example"):
        text_sets.read("MNLI", tmp_path, "cl_benchmark")


BAD_JSON: list[tuple[str, Any, str]] = [
    ("labels.json", ["a", "a"], "labels.json: expected a list of distinct label words"),
    ("labels.json", {"a": 1}, "labels.json: expected a list, got dict"),
    ("train.json", [{"sentence": "x", "label": "Wrong"}], r"train.json, entry 1: label: expected one of"),
    ("test.json", [{"sentence": "x", "label": True}], r"test.json, entry 1: label: .* got True"),
    ("test.json", [{"sentence": "x", "label": 4}], r"test.json, entry 1: label: .* got 4"),
    ("train.json", [{"sentence": " ", "label": "World"}], 'train.json, entry 1: expected {"sentence": text'),
    ("train.json", ["x"], "train.json, entry 1: expected"),
    ("train.json", [{"sentence": "x", "label": "World"}], "agnews: class 'Sports': expected training"),
    ("test.json", [], "agnews: expected test examples, found none"),
]


@pytest.mark.parametrize(("file", "content", "message"), BAD_JSON)
def test_bad_json(file: str, content: Any, message: str, tmp_path: Path) -> None:
    """Wrong files are refused with the file, the entry and what was expected."""
    write_json(write_cl_benchmark(tmp_path, "agnews") / file, content)
    with pytest.raises(DataError, match=message):
        text_sets.read("agnews", tmp_path, "cl_benchmark")


BAD_CSV = [
    ('"1","a"\n', r"train.csv, line 1: expected 3 columns \(label, title, content\), got 2"),
    ('"1","a","b"\n"5","a","b"\n', "train.csv, line 2: expected a label from 1 to 4, got '5'"),
    ('"x","a","b"\n', "line 1: expected a label"),
    ('"1",""," "\n', "line 1: expected a text, got none"),
    ('"1","a"x,"b"\n', "train.csv: cannot be read as CSV"),
]


@pytest.mark.parametrize(("content", "message"), BAD_CSV)
def test_bad_csv(content: str, message: str, tmp_path: Path) -> None:
    """Wrong lines are refused with their number."""
    (write_csv(tmp_path, "agnews") / "train.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        text_sets.read("agnews", tmp_path, "csv")


def test_missing_files(tmp_path: Path) -> None:
    """What is expected is named where nothing is."""
    for layout, words in {
        "cl_benchmark": "train.json, test.json and labels.json",
        "csv": "ag_news_csv.tar.gz",
        "jsonl": "train.jsonl and test.jsonl",
        "parquet": r"train\*.parquet and test\*.parquet",
    }.items():
        with pytest.raises(DataError, match=words):
            text_sets.read("agnews", tmp_path, layout)
    with pytest.raises(DataError, match="layout: expected one of cl_benchmark, csv"):
        text_sets.read("agnews", tmp_path, "tsv")
    with pytest.raises(DataError, match="layout: csv: sets of this release are agnews"):
        text_sets.read("CB", tmp_path, "csv")
    with pytest.raises(DataError, match="sets: expected some of agnews"):
        text_sets.read("news", tmp_path, "csv")
    (tmp_path / "agnews").mkdir()
    (tmp_path / "agnews" / "train.jsonl").write_text("{}\n{")
    (tmp_path / "agnews" / "test.jsonl").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r'line 1: expected {"sentence"'):
        text_sets.read("agnews", tmp_path, "jsonl")
    (tmp_path / "agnews" / "train.jsonl").write_text("{")
    with pytest.raises(DataError, match="line 1: not readable as JSON"):
        text_sets.read("agnews", tmp_path, "jsonl")


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    library = types.ModuleType("datasets")
    library.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of tables become the texts of every set."""
    for name, task in TASKS.items():
        columns = columns_of(name)
        folder = tmp_path / name
        folder.mkdir()
        for file in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"):
            (folder / file).touch()
        rows = [
            {**{c: f"{c} {label}" for c in columns}, task.label: label} for label in range(len(task.words))
        ]

        def load(kind: str, data_files: Any, rows: Any = rows, folder: Path = folder) -> dict[str, Table]:
            assert kind == "parquet" and data_files["test"] == [str(folder / "test-00000-of-00001.parquet")]
            return {"train": Table(rows), "test": Table(rows[::-1])}

        fake_datasets(monkeypatch, load)
        found = text_sets.read(name, tmp_path, "parquet")
        assert found.test[-1].label == 0 and [one.label for one in found.train] == [*range(len(task.words))]
        assert all(f"{column} 1" in found.train[1].text for column in columns)


def columns_of(name: str) -> list[str]:
    return [c for _, c, _, _ in string.Formatter().parse(TASKS[name].parquet or "") if c]


def test_bad_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Secret labels, other columns, a damaged file and a missing library are refused."""
    (tmp_path / "RTE").mkdir()
    for file in ("train.parquet", "test.parquet"):
        (tmp_path / "RTE" / file).touch()
    good = {"premise": "a", "hypothesis": "b", "label": 0}
    for row, message in (
        ({**good, "label": -1}, r"RTE, test, row 0: label: expected 0 to 1, got -1 \(-1 marks secret"),
        ({**good, "premise": None}, "row 0: premise: expected a text, got None"),
        ({"premise": "a", "label": 0}, "expected a column hypothesis, found premise, label"),
    ):
        tables = {"train": Table([good, {**good, "label": 1}]), "test": Table([row])}
        fake_datasets(monkeypatch, lambda kind, data_files, tables=tables: tables)
        with pytest.raises(DataError, match=message):
            text_sets.read("RTE", tmp_path, "parquet")

    def damaged(kind: str, data_files: Any) -> Any:
        raise ValueError("no magic bytes")

    fake_datasets(monkeypatch, damaged)
    with pytest.raises(DataError, match="not readable as parquet: ValueError: no magic bytes"):
        text_sets.read("RTE", tmp_path, "parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the library datasets"):
        text_sets.read("RTE", tmp_path, "parquet")


def test_instructions(tmp_path: Path) -> None:
    """Instructions of a file take the place of the own ones; COPA has none."""
    kinds = {task.type for task in TASKS.values()}
    assert set(prompts.INSTRUCTIONS) == kinds
    data = {kind: [{"instruction": f"about {kind}\n"}] for kind in kinds - {"COPA"}}
    write_json(tmp_path / "i.json", data)
    found = prompts.read_instructions(tmp_path / "i.json")
    form = prompts.template("agnews", ("World", "Sports"), found)
    assert form.of("{x}") == "Task:TC\nDataset:agnews\nabout TC\nOption: World, Sports \n{x}\nAnswer:"
    assert prompts.template("COPA", ("A", "B"), found).of("?") == "Task:COPA\nDataset:COPA\n?\nAnswer:"
    for wrong in ({}, {**data, "TC": []}, {**data, "TC": [{"instruction": ""}]}):
        write_json(tmp_path / "i.json", wrong)
        with pytest.raises(DataError, match=r"instructions: .*: expected"):
            prompts.read_instructions(tmp_path / "i.json")
    with pytest.raises(DataError, match="not readable as JSON"):
        prompts.read_instructions(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Science  & Mathematics.", "science mathematics"),
        ("Mean of\nTransportation!", "mean of transportation"),
        ("-", ""),
    ],
)
def test_normalised(text: str, expected: str) -> None:
    """Case, punctuation and spaces do not count."""
    assert prompts.normalised(text) == expected


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=4), st.booleans())
def test_padded(rows: list[list[int]], left: bool) -> None:
    """Rows are found again through the mask, at the end or the beginning."""
    numbers, mask = prompts.padded(rows, -1, left)
    assert [numbers[i][mask[i]].tolist() for i in range(len(rows))] == rows
    assert (numbers[~mask] == -1).all() and bool(mask[:, -1 if left else 0].all())


def test_drawn_examples() -> None:
    """As many per class as asked for, drawn with the seed; a smaller class has all its own."""
    train = tuple(Example(f"t{n}", n % 3 == 0) for n in range(30))
    found = TextSet("x", ("no", "yes"), train, tuple(Example(f"e{n}", 0) for n in range(9)))
    draw = lambda seed: texts._drawn(found, 15, 4, torch.Generator().manual_seed(seed))  # noqa: E731
    drawn, test = draw(0)
    assert Counter(one.label for one in drawn) == {0: 15, 1: 10} and len({one.text for one in test}) == 4
    assert draw(0) == (drawn, test) != draw(1) and set(drawn) <= set(train)
    assert texts._drawn(found, None, None, torch.Generator())[1] == list(found.test)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": 7}, "order: expected 1 to 6 or names of sets, got 7"),
        ({"order": True}, "order: expected 1 to 6"),
        ({"order": ["CB", "CB"]}, "order: expected distinct names"),
        ({"order": "CB"}, "order: expected distinct names"),
        ({"tasks": 5}, "tasks: expected 4, the number of sets"),
        ({"max_length": 0}, "max_length: expected an integer >= 1, got 0"),
        ({"max_length": None}, "max_length: expected"),
        ({"train_per_class": 0}, "train_per_class: expected"),
        ({"test_examples": 1.5}, "test_examples: expected"),
        ({"reduction": "none"}, "reduction: expected one of mean, sum, got 'none'"),
        ({}, "CL_Benchmark/TC/dbpedia: expected the files"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Wrong settings and missing data are refused before a model is looked for."""
    with pytest.raises(DataError, match=message):
        texts.load(tmp_path, 0, "cpu", **({"model": "none", "order": 1} | change))


@pytest.mark.parametrize("name", ["published/ewc-lora-t5-large", "published/ewc-lora-llama-3.2-1b"])
def test_published_settings(name: str, tmp_path: Path) -> None:
    """Published configurations name existing sets, and everything that the loader takes."""
    for run in configuration.load(configuration.find(name)).runs:
        settings = {key: value for key, value in run.problem.items() if key not in ("kind", "instructions")}
        assert run.problem["kind"] == "texts" and run.lora_configs()[0].lora_alpha == 32
        with pytest.raises(DataError, match=r"expected the files train.json"):
            texts.load(tmp_path, 0, "cpu", **settings)
