"""Runs of the continual-learning suite: streams, bad input, resumption, evaluation, the loop itself."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ewclora as fe
from benchmarks.continual import configuration, problems, suite
from benchmarks.continual.__main__ import main
from benchmarks.continual.configuration import Run, Training
from benchmarks.continual.recorded import check
from benchmarks.continual.run import evaluate, execute, first, make_optimizer, make_schedule
from benchmarks.continual.stream import Arrays, Problem, Stream, Task, loader, split_classes
from fused_ewclora.demo.formats import DataError
from fused_ewclora.demo.vit import Classifier
from fused_ewclora.metrics import ContinualMetrics

CPU = torch.device("cpu")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoRA", {}),
    "EWC-LoRA": ("EWCLoRA", {"ewc_lambda": 50.0}),
    "EWC-LoRA, factors": ("EWCLoRA", {"ewc_lambda": 50.0, "merge_mode": "factors", "fisher_mode": "batch"}),
    "SD-LoRA-RR": ("SDLoRA", {"ranks": [3, 2, 1]}),
    "SD-LoRA-KD": ("SDLoRA", {"kd_threshold": 0.9}),
    "EWC + SD-LoRA": ("SDLoRA", {"ewc_lambda": 50.0}),
    "CoDyRA": ("CoDyRA", {"kappa_max": 0.05, "gate_init": "normal"}),
    "EWC + CoDyRA": ("CoDyRA", {"kappa_max": 0.05, "ewc_lambda": 50.0}),
    "InfLoRA": ("InfLoRA", {"epsilon": 0.5}),
}


class Backbone(nn.Module):
    """Of a pair (features, shift), so that inputs of several tensors are exercised."""

    dim = 10

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, self.dim)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        x, shift = inputs
        return self.down(F.gelu(self.up(x + shift)))


def examples(classes: int, each: int, seed: int) -> Arrays:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(each)
    centres = 2.0 * torch.randn(classes, 6, generator=generator)
    x = centres[labels] + 0.1 * torch.randn(len(labels), 6, generator=generator)
    return Arrays((x, torch.zeros_like(x)), labels)


def problem(sizes: tuple[int, ...] = (2, 3, 2), each: int = 9) -> Problem:
    tasks = []
    for number, classes in enumerate(sizes):
        names = tuple(f"{number}.{k}" for k in range(classes))
        data = examples(classes, each + number, number)
        tasks.append(Task(names, data, data))
    torch.manual_seed(1)
    return Problem(Stream("clusters", tuple(tasks)), Backbone(), {"made": "for tests"})


def a_run(method: str = "EWC-LoRA", **changes: Any) -> Run:
    kind, options = METHODS[method]
    settings: dict[str, Any] = {
        "training": Training(lr=5e-3, head_lr=5e-2, epochs=3, batch_size=8),
        "problem": {"kind": "clusters", "tasks": 3},
        "adapters": {"r": 3, "target_modules": ["up", "down"]},
        "options": options,
    }
    return Run("clusters", method, kind, 5, **{**settings, **changes})


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_ends_as_if_it_had_not_been(method: str, tmp_path: Path) -> None:
    run, file = a_run(method), tmp_path / "state.pt"
    whole = execute(run, problem(), CPU)

    def stop(text: str) -> None:
        if text.startswith("task 2/3"):
            raise Interrupted

    with pytest.raises(Interrupted):
        execute(run, problem(), CPU, file, stop)
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]
    torch.manual_seed(99)  # whatever else the process has drawn
    said: list[str] = []
    resumed = execute(run, problem(), CPU, file, said.append)
    assert ["before the interruption" in text for text in said] == [True, True, False]
    for key in ("matrices", "metrics", "report", "classes", "train_sizes", "test_sizes"):
        assert resumed[key] == whole[key], key
    for name in ("loss", "penalty", "adapter_parameters", "trained_parameters", "state_bytes", "steps"):
        assert [t[name] for t in resumed["tasks"]] == [t[name] for t in whole["tasks"]], name


def test_what_a_run_records() -> None:
    found = problem()
    before = copy.deepcopy(found.backbone.state_dict())
    record = execute(a_run(), found, CPU)
    assert all(torch.equal(value, before[k]) for k, value in found.backbone.state_dict().items())
    assert record["train_sizes"] == [18, 30, 22] and record["facts"] == {"made": "for tests"}
    assert [len(row) for row in record["matrices"]["task_aware"]] == [1, 2, 3]
    metrics = ContinualMetrics.from_matrix(
        record["matrices"]["class_incremental"], record["test_sizes"], record["matrices"]["task_aware"], 100.0
    )
    assert record["metrics"] == metrics.summary()
    assert metrics.A(0) > 90.0  # clusters far apart: a loop that trains learns them
    assert [t["steps"] for t in record["tasks"]] == [9, 12, 9]
    assert record["tasks"][0]["penalty"] == 0.0 and record["tasks"][1]["penalty"] > 0.0
    assert len({t["adapter_parameters"] for t in record["tasks"]}) == 1
    json.dumps(record, allow_nan=False)


def test_more_than_ten_tasks_of_unequal_sizes() -> None:
    sizes = (2, 1, 3, 2, 2, 2, 2, 4, 2, 2, 2, 3)
    training = Training(lr=5e-3, head_lr=5e-2, epochs=1, batch_size=8)
    record = execute(a_run(training=training), problem(sizes, each=3), CPU)
    assert [len(row) for row in record["matrices"]["class_incremental"]] == list(range(1, 13))
    assert [len(names) for names in record["classes"]] == list(sizes)


def test_a_rank_of_zero_runs_and_starts_anew() -> None:
    run = a_run("CoDyRA", options={"kappa_max": 50.0, "dense_fraction": 0.0, "schedule": "linear"})
    record = execute(run, problem(), CPU)
    assert record["report"] is not None
    assert record["report"]["summary"]["tasks"] == [0, 0, 0] and record["report"]["summary"]["now"] > 0
    assert record["metrics"]["class_incremental"]["plasticity"] > 50.0  # heads learn without adapters


def test_not_a_number_is_an_error_and_no_result() -> None:
    training = Training(lr=1e30, head_lr=1e30, epochs=3, batch_size=8, optimizer="sgd")
    with pytest.raises(fe.EWCLoRAError, match=r"LoRA.*after task 0|NaN|finite"):
        execute(a_run("LoRA", training=training), problem(), CPU)


def test_evaluation_against_a_loop() -> None:
    found = problem((2, 3))
    torch.manual_seed(0)
    model = Classifier(found.backbone)  # type: ignore[arg-type]
    for task in found.stream.tasks:
        model.add_head(len(task.classes))
    training = Training(lr=1.0, head_lr=1.0, test_batch_size=4)
    incremental, aware = evaluate(model, found.stream.tasks, training, CPU)
    offset = 0
    for number, task in enumerate(found.stream.tasks):
        right = [0, 0]
        for index in range(len(task.test)):  # type: ignore[arg-type]
            (x, shift), label = task.test[[index]]
            logits = model.all_logits((x, shift))[0].tolist()  # type: ignore[arg-type]
            own = logits[offset : offset + len(task.classes)]
            right[0] += logits.index(max(logits)) == label + offset
            right[1] += own.index(max(own)) == label
        n = len(task.test)  # type: ignore[arg-type]
        assert incremental[number] == pytest.approx(100 * right[0] / n)
        assert aware[number] == pytest.approx(100 * right[1] / n)
        offset += len(task.classes)


def test_seeds_decide_and_repeat() -> None:
    first_run, again = (execute(a_run("LoRA"), problem(), CPU)["tasks"] for _ in range(2))
    other = execute(replace(a_run("LoRA"), seed=6), problem(), CPU)["tasks"]
    assert [t["loss"] for t in first_run] == [t["loss"] for t in again]
    assert [t["loss"] for t in first_run] != [t["loss"] for t in other]


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    execute(a_run("LoRA"), problem(), CPU, file)
    with pytest.raises(fe.CheckpointError, match="another run"):
        execute(a_run("CoDyRA"), problem(), CPU, file)
    file.write_bytes(b"damaged")
    with pytest.raises(fe.CheckpointError, match="cannot be read"):
        execute(a_run("LoRA"), problem(), CPU, file)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "at least one task"),
        ([Task((), examples(2, 2, 0), examples(2, 2, 0))], "at least one class"),
        ([Task(("a", "b"), examples(2, 0, 0), examples(2, 2, 0))], "expected training examples"),
        ([Task(("a", "b"), examples(2, 2, 0), examples(2, 0, 0))], "expected test examples"),
        ([Task(names, *[examples(2, 2, 0)] * 2) for names in (("a", "b"), ("c", "b"))], "'b'.*again"),
        ([Task(("a", "a"), *[examples(2, 2, 0)] * 2)], "'a'.*again"),
    ],
)
def test_streams_that_cannot_be_learned(tasks: list[Task], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Stream("bad", tuple(tasks))


def test_inputs_and_labels_must_go_together() -> None:
    with pytest.raises(DataError, match="3 examples"):
        Arrays(torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64))


def test_classes_are_dealt_to_tasks() -> None:
    names = list("abcdefg")
    assert list(split_classes(names, 3)) == [("a", "b", "c"), ("d", "e"), ("f", "g")]
    assert list(split_classes(names, [1, 4])) == [("a",), ("b", "c", "d", "e")]
    for tasks in (8, 0, [3, 0]):
        with pytest.raises(DataError, match="at least one class per task"):
            list(split_classes(names, tasks))
    with pytest.raises(DataError, match="8 classes, the data have 7"):
        list(split_classes(names, [5, 3]))


def test_every_example_comes_once_per_epoch() -> None:
    data = examples(3, 5, 0)
    batches = loader(data, 4, torch.Generator().manual_seed(0))
    labels = torch.cat([y for _, y in batches])
    assert len(labels) == 15 and labels.bincount().tolist() == [5, 5, 5]
    assert [len(y) for _, y in first(batches, 6)] == [4, 4, 4, 3, 4, 4]
    straight = torch.cat([x for (x, _), _ in loader(data, 4)])
    assert torch.equal(straight, data.inputs[0])


def test_rates_follow_the_schedule() -> None:
    model = Classifier(Backbone())  # type: ignore[arg-type]
    model.add_head(2)
    training = Training(
        lr=0.1, head_lr=0.2, epochs=4, schedule="multistep", milestones=(1, 3), optimizer="sgd", momentum=0.9
    )
    optimizer = make_optimizer(model, training)
    schedule = make_schedule(optimizer, training, 8)
    seen = []
    for _ in range(4):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert seen == [pytest.approx(v) for v in ([0.1, 0.2], [0.01, 0.02], [0.01, 0.02], [0.001, 0.002])]
    for iterations, length in ((None, 4), (10, 10)):
        cosine = replace(training, schedule="cosine", iterations=iterations)
        schedule = make_schedule(make_optimizer(model, cosine), cosine, 10)
        for _ in range(length):
            schedule.optimizer.step()
            schedule.step()
        assert schedule.get_last_lr() == pytest.approx([0.0, 0.0])


DIGITS: dict[str, Any] = {
    "name": "digits",
    "about": "for tests",
    "problem": {
        "kind": "vision", "dataset": "digits", "tasks": 2, "train_per_class": 12, "test_per_class": 8,
        "base_steps": 2, "base_per_class": 20, "dim": 8, "depth": 1, "num_heads": 2,
    },
    "adapters": {"r": 2, "target_modules": ["qkv"], "slices": ["k", "v"], "segments": ["q", "k", "v"]},
    "training": {"lr": 1e-3, "head_lr": 5e-3, "epochs": 1, "batch_size": 8},
    "seeds": [0, 1],
    "methods": [
        {"name": "LoRA", "kind": "LoRA"},
        {
            "name": "EWC", "kind": "EWCLoRA", "options": {"ewc_lambda": 10.0},
            "training": {"epochs": 2}, "seeds": [3],
        },
    ],
    "quick": {"methods": ["EWC"], "seeds": [7], "training": {"epochs": 1}, "problem": {"train_per_class": 6}},
}  # fmt: skip


def test_a_configuration_becomes_runs() -> None:
    found = configuration.parse(DIGITS)
    assert [(run.method, run.seed, run.training.epochs) for run in found.runs] == [
        ("LoRA", 0, 1), ("LoRA", 1, 1), ("EWC", 3, 2),
    ]  # fmt: skip
    quick = configuration.parse(DIGITS, quick=True)
    assert [(run.suite, run.method, run.seed, run.training.epochs) for run in quick.runs] == [
        ("digits-quick", "EWC", 7, 1)
    ]
    assert quick.runs[0].problem["train_per_class"] == 6 and found.runs[0].problem["train_per_class"] == 12
    assert len({run.fingerprint() for run in (*found.runs, *quick.runs)}) == 4
    assert [(run.method, run.seed) for run in configuration.with_seeds(found, [4]).runs] == [
        ("LoRA", 4), ("EWC", 4),
    ]  # fmt: skip
    again = configuration.parse(json.loads(json.dumps(DIGITS)))
    assert [run.fingerprint() for run in again.runs] == [run.fingerprint() for run in found.runs]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": None}, "seeds is missing"),
        ({"seed": [0]}, "seed: no such key"),
        ({"seeds": [True]}, "seeds: expected integers"),
        ({"seeds": [1, 1]}, "LoRA, seed 1: expected once"),
        ({"methods": [{"name": "x", "kind": "Adapter"}]}, "kind: expected one of"),
        ({"methods": [{"name": "x"}]}, "kind is missing"),
        ({"training": {"lr": 1.0}}, "head_lr is missing"),
        ({"training": {"lr": -1.0, "head_lr": 1.0}}, "lr: expected a number > 0"),
        ({"training": {"lr": 1.0, "head_lr": 1.0, "epochs": 0}}, "epochs: expected an integer >= 1"),
        ({"training": {"lr": 1.0, "head_lr": 1.0, "optimizer": "lion"}}, "optimizer: expected one of"),
        ({"adapters": {"r": 0, "target_modules": ["qkv"]}}, "r: expected"),
    ],
)
def test_wrong_configurations_say_what_is_wrong(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    data = {key: value for key, value in {**DIGITS, **change}.items() if value is not None}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(data))
    with pytest.raises(fe.ArgumentError, match=message) as caught:
        configuration.load(file)
    assert "mine.json" in str(caught.value)


def test_configurations_are_found_by_name_or_path(tmp_path: Path) -> None:
    assert "language" in configuration.available() and "vision" in configuration.available()
    assert configuration.find("language").name == "language.json"
    (tmp_path / "mine.json").write_text(json.dumps({**DIGITS, "quick": {"methods": ["x"]}}))
    with pytest.raises(fe.ArgumentError, match="no method is called 'x'"):
        configuration.load(configuration.find(str(tmp_path / "mine.json")), quick=True)
    with pytest.raises(fe.ArgumentError, match="expected a file or one of"):
        configuration.find("nonsense")
    with pytest.raises(DataError, match="kind"):
        problems.load({"kind": "nonsense"}, tmp_path, 0, "cpu")
    with pytest.raises(DataError, match=r"problem: vision: .*'colour'"):
        problems.load({"kind": "vision", "colour": 1}, tmp_path, 0, "cpu")


@pytest.mark.parametrize("jobs", [1, 2])
def test_all_runs_are_recorded_and_not_repeated(jobs: int, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    runs = configuration.parse(DIGITS).runs[:2]
    bad = replace(runs[0], method="bad", adapters={"r": 2, "target_modules": ["nothing"]})
    place = suite.Place(tmp_path, tmp_path, jobs=jobs)
    said: list[str] = []
    failures = suite.run_all([bad, *runs], place, said.append, "the command")
    assert len(failures) == 1 and "bad, seed 0" in failures[0] and "nothing" in failures[0]
    records = [json.loads(line) for line in (tmp_path / "digits.jsonl").read_text().splitlines()]
    assert sorted((r["method"], r["seed"]) for r in records) == [("LoRA", 0), ("LoRA", 1)]
    assert all(r["command"] == "the command" and r["environment"]["jobs"] == jobs for r in records)
    assert len(said) == 4  # tasks
    assert suite.outstanding([bad, *runs], place) == [bad]
    assert not list(tmp_path.glob("unfinished/*"))
    with pytest.raises(fe.ArgumentError, match="another configuration"):
        suite.outstanding([replace(runs[0], options={"x": 1})], place)


def test_a_line_that_was_cut_off_does_not_spoil_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"a": 1}\n{"a": ')
    suite.append(file, {"a": 2})
    assert file.read_text() == '{"a": 1}\n{"a": 2}\n'


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fused_ewclora", "demo", "--suite", *arguments]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A suite from a file of one's own, through the command line."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("suite")
    (folder / "mine.json").write_text(json.dumps(DIGITS))
    done = subprocess.run(
        command(
            str(folder / "mine.json"), "--out", str(folder / "out"), "--jobs", "1", "--data-root", "none"
        ),
        capture_output=True,
        text=True,
        timeout=300,
    )
    return folder, done


def test_the_command_makes_records_a_table_and_pictures(
    output: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = output
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (folder / "out" / "digits.jsonl").read_text().splitlines()]
    assert [(r["method"], r["seed"]) for r in records] == [("LoRA", 0), ("LoRA", 1), ("EWC", 3)]
    for record in records:
        check(record)
        assert record["command"].startswith("python -m fused_ewclora demo --suite ")
    assert "3 runs, 3 of them to do" in done.stderr and done.stderr.count("task 2/2") == 3
    assert "LoRA" in done.stdout and "A_last" in done.stdout
    pictures = list((folder / "out").glob("*.png"))
    assert pictures and all(str(path) in done.stdout for path in pictures)


def test_the_same_command_again_does_nothing_new(
    output: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = output
    before = (folder / "out" / "digits.jsonl").read_bytes()
    options = [
        "--suite",
        str(folder / "mine.json"),
        "--out",
        str(folder / "out"),
        "--json",
        "--methods",
        "EWC",
    ]
    assert main(options) == 0
    said = capsys.readouterr()
    assert "1 runs, 0 of them to do" in said.err
    assert len(json.loads(said.out)) == 3
    assert (folder / "out" / "digits.jsonl").read_bytes() == before


def test_ctrl_c_ends_all_processes_and_the_command_goes_on_from_there(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    data = {**DIGITS, "training": {**DIGITS["training"], "epochs": 20}, "methods": DIGITS["methods"][:1]}
    (tmp_path / "mine.json").write_text(json.dumps({**data, "seeds": [0, 1, 2]}))
    arguments = command(str(tmp_path / "mine.json"), "--out", str(tmp_path / "out"), "--jobs", "2")
    running = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert running.stderr is not None
    for line in running.stderr:
        if "task 1/2" in line:
            break
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    _, rest = running.communicate(timeout=60)
    assert running.returncode == 130, rest
    assert "goes on from here" in rest
    file = tmp_path / "out" / "digits.jsonl"
    before = len(file.read_text().splitlines()) if file.exists() else 0
    assert before < 3
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and f"3 runs, {3 - before} of them to do" in done.stderr, done.stderr
    assert "done before the interruption" in done.stderr
    assert len(file.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "nothing"], "--methods: expected some of .*'EWC'.* got 'nothing'"),
        (["--jobs", "0"], "expected integers >= 1"),
        (["--device", "cuda:99"], "--device cuda:99: not available"),
        (["--seeds", "-1"], "seeds: expected integers >= 0"),
    ],
)
def test_wrong_options_are_refused_with_words(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(DIGITS))
    assert main(["--suite", str(tmp_path / "mine.json"), "--out", str(tmp_path / "out"), *options]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_missing_data_fails_one_run_and_says_what_to_get(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {**DIGITS, "problem": {**DIGITS["problem"], "dataset": "cifar100"}, "seeds": [0]}
    (tmp_path / "mine.json").write_text(json.dumps(data))
    options = ["--out", str(tmp_path), "--data-root", str(tmp_path / "none"), "--methods", "LoRA"]
    assert main(["--suite", str(tmp_path / "mine.json"), *options]) == 1
    assert re.search(r"FAILED: digits: LoRA, seed 0: .*cifar100", capsys.readouterr().err)


def test_the_list_names_every_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--suite", "--list"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name}\n" in said for name in configuration.available()) and "CoDyRA" in said
