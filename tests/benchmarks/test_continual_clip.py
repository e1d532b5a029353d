# SPDX-License-Identifier: Apache-2.0
"""CLIP in continual runs, with towers that are single layers: loss, masks, scores; files of image sets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import domain_files
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.continual import clip, configuration, domains, problems
from benchmarks.continual.clip_learner import ImageText, Towers, classes_to_images
from benchmarks.continual.configuration import Run, Training
from benchmarks.continual.image_sets import Examples
from benchmarks.continual.recorded import violations
from benchmarks.continual.run import State, execute
from benchmarks.continual.stream import Arrays, Problem, Stream, Task, loader
from fused_ewclora.demo.formats import DataError
from fused_ewclora.errors import ArgumentError

CPU = torch.device("cpu")
SIZES = (2, 3, 2)
WIDTH, LENGTH, WORDS = 6, 4, 20


class Toy(Towers):
    """One linear layer per tower; a text is the sum of its words."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 5)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))

    def encode_image(self, images: Tensor) -> Tensor:
        features: Tensor = self.image(images)
        return features

    def encode_text(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.text(self.words(tokens).sum(1))
        return features

    def scale(self) -> Tensor:
        return self.logit_scale.exp()


def tasks(seed: int = 0, each: int = 5) -> tuple[Task, ...]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number, size in enumerate(SIZES):
        labels = torch.arange(size).repeat(each)
        images = [torch.randn(len(labels), WIDTH, generator=generator).double() for _ in range(2)]
        names = tuple(f"{number}: {c}" for c in range(size))
        made.append(Task(names, Arrays(images[0], labels), Arrays(images[1], labels)))
    return tuple(made)


def prompts(stream: tuple[Task, ...]) -> dict[str, Tensor]:
    """In the opposite order: the learner has to follow names."""
    generator = torch.Generator().manual_seed(1)
    names = [name for task in reversed(stream) for name in task.classes]
    return {name: torch.randint(WORDS, (LENGTH,), generator=generator) for name in names}


def learner(**options: Any) -> tuple[ImageText, tuple[Task, ...], dict[str, Tensor]]:
    torch.manual_seed(2)
    stream = tasks()
    texts = prompts(stream)
    return ImageText(Toy().double(), texts, **options), stream, texts


def official_loss(
    model: ImageText, images: Tensor, labels: Tensor, seen: list[Tensor], new: list[Tensor]
) -> Tensor:
    """The published loss, literally: earlier classes are encoded without gradients and masked for images; for
    texts the targets are the images of each class, of all classes so far."""
    towers = model.backbone
    with torch.no_grad():
        earlier = [towers.encode_text(torch.stack(seen))] if seen else []
    embeddings = torch.cat([*earlier, towers.encode_text(torch.stack(new))])
    embeddings = embeddings / embeddings.norm(dim=-1, keepdim=True)
    out = towers.encode_image(images)
    out = out / out.norm(dim=-1, keepdim=True)
    scale = towers.scale()
    shifted = labels + len(seen)
    per_image = scale * out @ embeddings.T
    per_image[:, : len(seen)] = float("-inf")
    mask = (shifted[None] == torch.arange(len(embeddings))[:, None]).double()
    per_text = scale * embeddings @ out.T
    return F.cross_entropy(per_image, shifted) + F.cross_entropy(per_text, mask)


@pytest.mark.parametrize("begun", [1, 2, 3])
def test_official_loss(begun: int) -> None:
    """Loss and gradients of every task are those of the published loss over all classes so far."""
    model, stream, texts = learner()
    model.train()
    for task in stream[:begun]:
        model.begin_task(task)
    images, labels = stream[begun - 1].train[:]
    seen = [texts[name] for task in stream[: begun - 1] for name in task.classes]
    new = [texts[name] for name in stream[begun - 1].classes]
    parameters = list(model.parameters())
    found = model.loss(model(images), labels)
    expected = official_loss(model, images, labels, seen, new)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    pairs = zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@settings(max_examples=25)
@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 5), st.integers(0, 2**31))
def test_text_loss(classes: int, images: int, earlier: int, seed: int) -> None:
    """The loss of texts is the cross entropy with the images of each class as targets, at any size."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (images,), generator=generator)
    rows = torch.cat([torch.zeros(earlier, images, dtype=torch.float64), logits.T])
    targets = torch.zeros_like(rows)
    targets[labels + earlier, torch.arange(images)] = 1.0
    torch.testing.assert_close(
        classes_to_images(logits, labels, earlier), F.cross_entropy(rows, targets), rtol=1e-12, atol=1e-15
    )


def test_loss_of_samples() -> None:
    """Without the loss of texts, and in evaluation mode, the loss is the mean over images."""
    for options, training in (({"text_loss": False}, True), ({}, False)):
        model, stream, _ = learner(**options)
        model.train(training).begin_task(stream[0])
        images, labels = stream[0].train[:]
        alone = torch.stack(
            [model.loss(model(x[None]), y[None]) for x, y in zip(images, labels, strict=True)]
        )
        torch.testing.assert_close(model.loss(model(images), labels), alone.mean(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("rivals", ["all", "own"])
def test_scores(rivals: str) -> None:
    """Accuracies among the classes so far, of the task, and of all tasks, from logits made one by one."""
    model, stream, texts = learner(rivals=rivals)
    names = [name for task in stream for name in task.classes]
    model.begin_task(stream[0])
    model.begin_task(stream[1])
    found = model.scores(stream, 2, lambda task: loader(task.test, 4))
    with torch.no_grad():
        features = {name: model.backbone.encode_text(texts[name][None])[0] for name in names}

    def accuracy(task: Task, among: list[str]) -> float:
        right = 0
        for image, label in zip(*task.test[:], strict=True):
            with torch.no_grad():
                out = model.backbone.encode_image(image[None])[0]
                cosines = [float(F.cosine_similarity(out, features[name], dim=0)) for name in among]
            right += among[int(np.argmax(cosines))] == task.classes[label]
        return 100.0 * right / len(task.test)  # type: ignore[arg-type]

    own = [accuracy(task, list(task.classes)) for task in stream]
    everything = [accuracy(task, names) for task in stream]
    assert own != everything
    assert found["every_task"] == (everything if rivals == "all" else own)
    assert found["task_aware"] == own[:2]
    assert found["class_incremental"] == [accuracy(task, names[:5]) for task in stream[:2]]


def test_unknown_class() -> None:
    """A class without a prompt is refused by name, and the current task stays."""
    model, stream, _ = learner()
    model.begin_task(stream[0])
    with pytest.raises(DataError, match="found none of 'a stranger'"):
        model.begin_task(Task(("a stranger",), stream[0].train, stream[0].test))
    assert model(stream[0].train[:][0]).shape[1] == SIZES[0]


def a_run() -> tuple[Run, Problem]:
    stream = tasks()
    torch.manual_seed(2)
    towers = Toy().double().requires_grad_(False)
    problem = Problem(Stream("toy", stream), towers, {}, clip.learner_of(prompts(stream), "all", True))
    adapters = [{"r": 2, "target_modules": ["image"]}, {"r": 1, "target_modules": ["text"]}]
    return Run("toy", "LoRA", "LoRA", 0, {}, adapters, Training(lr=0.02, head_lr=0.02, epochs=2)), problem


SAMPLES: dict[str, dict[str, Any]] = {
    "EWCLoRA": {"ewc_lambda": 1.0},
    "CoDyRA": {"ewc_lambda": 1.0},
    "SDLoRA": {"ewc_lambda": 1.0},
    "FactorEWC": {"ewc_lambda": 1.0},
    "IEL": {"beta": 1.0},
    "ITA": {"alpha": 1.0},
    "PerturbAndMerge": {},
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_fishers_of_samples_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose Fishers are of single images, which rows of texts do not belong to, does not begin; it does
    with adapters of the image tower alone, or in mode batch."""
    run, problem = a_run()
    run = replace(run, kind=kind, options=SAMPLES[kind])
    with monkeypatch.context() as context:
        context.setattr(Towers, "logits", lambda *_: pytest.fail("something was computed"))
        with pytest.raises(ArgumentError, match=rf"^{kind}: .*text tower, where backbone\.text is"):
            execute(run, problem, CPU)
    State(replace(run, adapters=run.adapters[0]), problem, CPU)  # type: ignore[index]
    if "ewc_lambda" in SAMPLES[kind]:
        State(replace(run, options={**SAMPLES[kind], "fisher_mode": "batch"}), problem, CPU)


def test_run_resumed(tmp_path: Path) -> None:
    """A run goes on after an interruption with the classes that it had."""
    run, problem = a_run()
    record = execute(run, problem, CPU)

    class Interrupted(Exception):
        pass

    def stop(text: str) -> None:
        if text.startswith("task 2"):
            raise Interrupted

    with pytest.raises(Interrupted):
        execute(run, problem, CPU, tmp_path / "state.pt", stop)
    again = execute(run, problem, CPU, tmp_path / "state.pt")
    assert again["matrices"] == record["matrices"]


def test_record_checked() -> None:
    """A record has accuracies on every task and their metrics, which have to agree."""
    run, problem = a_run()
    found = execute(run, problem, CPU)
    assert [len(row) for row in found["matrices"]["every_task"]] == [3] * 4
    environment = {
        "device": "a CPU", "cores": 2, "threads": 1, "torch": "2", "python": "3", "commit": "abc", "jobs": 1,
    }  # fmt: skip
    head = {name: getattr(run, name) for name in ("suite", "method", "kind", "seed")}
    rest = {"environment": environment, "time": "2026-01-01T00:00:00+00:00", "command": "python"}
    record = json.loads(
        json.dumps({**head, "fingerprint": run.fingerprint(), "run": run.to_dict(), **found, **rest})
    )
    assert list(violations(record)) == []
    wrong = {**record, "metrics": {**record["metrics"], "every_task": {"transfer": 101.0}}}
    assert any("metrics.every_task.transfer: the matrices give" in words for words in violations(wrong))
    del record["metrics"]["every_task"]
    assert any("metrics.every_task.last" in words for words in violations(record))
    record["matrices"]["every_task"].pop()
    assert any("expected 4 rows of 3" in words for words in violations(record))


def touch(file: Path) -> None:
    file.touch()


def test_domains_read(tmp_path: Path) -> None:
    """Every image set is read with its official classes, files and prompts."""
    domain_files.write_all(tmp_path, touch)
    for name, domain in domains.DOMAINS.items():
        found = domains.read(name, tmp_path)
        count = len(found.classes)
        assert [len(found.train.labels), len(found.test.labels)] == [3 * count, 2 * count]
        if domain.split:
            assert found.classes == domain_files.CLASSES
            for path, label in zip(found.train.images, found.train.labels.tolist(), strict=True):
                assert path.is_file() and path.parent.name == found.classes[label]
    assert domains.read("Aircraft", tmp_path).classes == ("707-320", "An-12 B")
    assert domains.read("Aircraft", tmp_path).train.labels.tolist() == [1, 1, 1, 0, 0, 0]
    assert domains.read("CIFAR100", tmp_path).classes == ("aquarium fish", "bear")
    mnist = domains.read("MNIST", tmp_path)
    assert (mnist.train.images[:, 0, 0] == 20 * mnist.train.labels).all()
    texts = [domains.DOMAINS["MNIST"].text(mnist.classes[3]), domains.DOMAINS["EuroSAT"].text("Forest")]
    assert texts == [
        'a photo of the number: "number: "3 - three"".',
        "a centered satellite photo of Forest satellite location.",
    ]


def test_orders() -> None:
    """The orders of X-TAIL and MTIL have ten and eleven sets, each once."""
    sizes = {order: len(set(names)) for order, names in domains.ORDERS.items()}
    assert sizes == {"x-tail": 10, "mtil-1": 11, "mtil-2": 11}
    assert all(len(names) == sizes[order] for order, names in domains.ORDERS.items())
    assert set(domains.ORDERS["mtil-2"]) == set(domains.DOMAINS) == {*domains.ORDERS["x-tail"], "CIFAR100"}


@settings(max_examples=25)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 8), st.integers(0, 2**31))
def test_few_shots(counts: list[int], shots: int, seed: int) -> None:
    """Each class gets its number of images, none twice where there are enough; the seed decides them."""
    labels = np.repeat(np.arange(len(counts)), counts)
    examples = Examples([Path(f"{label}/{n}") for n, label in enumerate(labels)], labels)
    found = domains.few(examples, shots, seed)
    assert found.labels.tolist() == np.repeat(np.arange(len(counts)), shots).tolist()
    assert all(int(path.parent.name) == label for path, label in zip(found.images, found.labels, strict=True))
    for label, count in enumerate(counts):
        of_class = {path for path, y in zip(found.images, found.labels, strict=True) if y == label}
        assert len(of_class) == shots if shots <= count else 1 <= len(of_class) <= count
    again = domains.few(Examples(labels.astype(np.uint8), labels), shots, seed)
    assert (again.images == again.labels).all()
    assert domains.few(examples, shots, seed).images == found.images


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": 3}, r'expected \{"train"'),
        ({"test": [["a.png", 0]]}, r"test\[0\]: expected \[path, label >= 0, class\]"),
        ({"test": [["a.png", -1, "x"]]}, r"label >= 0"),
        ({"test": [["../a.png", 0, "snow_leopard"]]}, "expected a path below"),
        ({"test": [["Lotus/none.png", 0, "snow_leopard"]]}, r"none\.png: expected an image"),
        ({"test": [["Lotus/test0.png", 0, "Lotus"]]}, "label 0 is class 'Lotus' here and 'snow_leopard'"),
        ({"test": [["Lotus/test0.png", 3, "Rose"]]}, "expected labels 0, 1, 2 and so on"),
        ({"test": [["Lotus/test0.png", 2, "Lotus"]]}, "two have the name 'Lotus'"),
        ({"test": [["Lotus/test0.png", 1, "Lotus"]]}, "class snow_leopard: expected test images"),
    ],
)
def test_wrong_splits(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Split files that are not what they should be are refused with the file and what was expected."""
    file = domain_files.write_split("Flowers", tmp_path, touch, **changes)
    with pytest.raises(DataError, match=words) as error:
        domains.read("Flowers", tmp_path)
    assert file.name in str(error.value) or "Flowers" in str(error.value)


def test_missing_files(tmp_path: Path) -> None:
    """Missing folders, splits and lists are named."""
    with pytest.raises(DataError, match="expected a folder caltech-101 or caltech101"):
        domains.read("Caltech101", tmp_path)
    (tmp_path / "caltech101").mkdir()
    with pytest.raises(DataError, match=r"split_zhou_Caltech101\.json: expected the published split"):
        domains.read("Caltech101", tmp_path)
    folder = domain_files.write_aircraft(tmp_path, touch)
    (folder / "images_variant_test.txt").write_text("0000001 Concorde\n")
    with pytest.raises(DataError, match=r"images_variant_test\.txt: line 1: .*got '0000001 Concorde'"):
        domains.read("Aircraft", tmp_path)
    (folder / "variants.txt").write_text("\n")
    with pytest.raises(DataError, match=r"variants\.txt: expected a variant per line"):
        domains.read("Aircraft", tmp_path)
    (folder / "variants.txt").unlink()
    with pytest.raises(DataError, match=r"variants\.txt: cannot be read"):
        domains.read("Aircraft", tmp_path)
    (tmp_path / "MNIST").mkdir()
    with pytest.raises(DataError, match="train-images-idx3-ubyte"):
        domains.read("MNIST", tmp_path)
    with pytest.raises(DataError, match=r"expected names of Aircraft, .* got 'ImageNet'"):
        domains.read("ImageNet", tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"datasets": "order"}, "datasets: expected one of x-tail, mtil-1, mtil-2"),
        ({"datasets": []}, "datasets: expected a list"),
        ({"datasets": ["DTD", "MNIST", "DTD"]}, "expected DTD once, got it 2 times"),
        ({"datasets": ["DTD", "Imagenet"]}, "got 'Imagenet'"),
        ({"shots": 0}, "shots: expected an integer >= 1 or null, got 0"),
        ({"rivals": "some"}, "rivals: expected one of all, own"),
        ({"text_loss": 1}, "text_loss: expected true or false"),
        ({"flip": None}, "flip: expected true or false"),
        ({"spaces": "yes"}, "spaces: expected true or false"),
        ({"templates": {}}, "templates"),
    ],
)
def test_wrong_settings(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Wrong settings are refused before data and models are looked for."""
    with pytest.raises(DataError, match=words):
        problems.load({"kind": "clip", **options}, tmp_path, 0, "cpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rivals": "some"}, "rivals"), ({"base_steps": 0}, "base_steps: expected an integer >= 1"),
        ({"width": 30}, "multiple of 4"), ({"depth": True}, "depth"),
    ],
)  # fmt: skip
def test_wrong_small_settings(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    """So are those of the small problem."""
    with pytest.raises(DataError, match=words):
        problems.load({"kind": "clip-small", **options}, tmp_path, 0, "cpu")


def test_published_configurations() -> None:
    """X-TAIL and MTIL are configured with the official hyper-parameters."""
    expected = {"codyra-xtail": ("x-tail", 16, "all"), "codyra-mtil": ("mtil-1", 5, "own")}
    for name, values in expected.items():
        runs = configuration.load(configuration.find(f"published/{name}")).runs
        for run in runs:
            assert tuple(run.problem[key] for key in ("datasets", "shots", "rivals")) == values
            training = run.training
            assert (training.lr, training.iterations, training.batch_size) == (5e-4, 500, 64)
            assert (training.optimizer, training.betas, training.weight_decay) == (
                "adamw",
                (0.9, 0.9999),
                0.0,
            )
            assert training.evaluate_before_end and run.seed == 8
            assert [config.r for config in run.lora_configs()] == [16, 16]
        official = next(run for run in runs if run.method == "CoDyRA, official code")
        assert official.options == {
            "kappa_max": 0.005, "dense_fraction": 0.5, "gate_init": "normal", "threshold": "dead_zone",
            "schedule": "staircase",
        }  # fmt: skip
        assert json.dumps(official.problem)
