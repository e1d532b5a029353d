# SPDX-License-Identifier: Apache-2.0
"""The demo as a whole: a quick run writes its record and picture, and the words agree with the numbers."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fused_ewclora as fe
from fused_ewclora import demo
from fused_ewclora.demo import job, report
from fused_ewclora.demo.cost import plain_copy, steps
from fused_ewclora.demo.protocol import Recipe, Result, adapted, augment, evaluate, run_method
from fused_ewclora.demo.scenario import Scenario, Split, make_scenario, select
from fused_ewclora.demo.spread import Spread
from fused_ewclora.demo.vit import Classifier, VisionTransformer
from fused_ewclora.metrics import ContinualMetrics

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Output folder, stdout and stderr of one quick run through the command line."""
    output = tmp_path_factory.mktemp("demo") / "nested" / "output"
    done = subprocess.run(
        [sys.executable, "-m", "fused_ewclora", "demo", "--quick", "--json", "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return output, done.stdout, done.stderr


def test_record_and_picture(quick: tuple[Path, str, str]) -> None:
    """A quick run writes a record and a picture."""
    output, stdout, stderr = quick
    data = json.loads(stdout)
    assert data == json.loads((output / "demo.json").read_text())
    assert (output / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(path.name for path in output.iterdir()) == ["demo.json", "demo.png"]
    assert {run["method"] for run in data["runs"]} == {report.PLAIN, report.EWC}
    tasks = data["recipe"]["tasks"]
    assert (
        stderr.count("LoRA ") == 2 * tasks
    )  # one plain line per task and method where stderr is no terminal
    assert "USDT" not in stderr


def test_matrices_recorded(quick: tuple[Path, str, str]) -> None:
    """The record holds the matrices that its metrics come from."""
    data = json.loads(quick[1])
    for run in data["runs"]:
        matrices = run["matrices"]
        metrics = ContinualMetrics.from_matrix(
            matrices["class_incremental"], run["test_sizes"], matrices["task_aware"], scale=100.0
        )
        assert metrics.summary() == run["metrics"]
        for cil, til in zip(matrices["class_incremental"], matrices["task_aware"], strict=True):
            assert all(a <= b for a, b in zip(cil, til, strict=True))  # fewer rivals cannot make it worse


def test_same_until_penalty(quick: tuple[Path, str, str]) -> None:
    """Both methods are the same until the first penalty."""
    plain, ewc = json.loads(quick[1])["runs"]
    assert plain["classes"] == ewc["classes"]
    assert plain["matrices"]["class_incremental"][0] == ewc["matrices"]["class_incremental"][0]
    assert plain["penalties"] == [0.0] * len(plain["penalties"])
    assert ewc["penalties"][0] == 0.0
    assert all(value > 0.0 for value in ewc["penalties"][1:])


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return make_scenario("digits", Path("unused"))


TINY = Recipe(
    tasks=2,
    epochs=1,
    train_per_class=16,
    test_per_class=10,
    base_steps=1,
    dim=16,
    depth=1,
    num_heads=2,
    rank=2,
)


def tiny_backbone() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(28, 7, 1, TINY.dim, TINY.depth, TINY.num_heads)


def test_run_repeats_bitwise(scenario: Scenario) -> None:
    """A run repeats bit for bit and leaves the base model alone."""
    backbone = tiny_backbone()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    runs = [run_method("EWC-LoRA", backbone, scenario, TINY, 3, 50.0, CPU, lambda _: None) for _ in range(2)]
    np.testing.assert_array_equal(runs[0].metrics.matrix(), runs[1].metrics.matrix())
    assert runs[0].penalties == runs[1].penalties
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_trainable_parameters() -> None:
    """Only the adapters and the newest head are trainable."""
    model = adapted(tiny_backbone(), rank=2)
    model.add_head(2)
    model.add_head(3)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        *(f"backbone.blocks.0.attn.qkv.lora_{f}_{s}" for f in "AB" for s in "kv"),
        "heads.1.weight",
        "heads.1.bias",
    }


def test_evaluate_all_heads() -> None:
    """Evaluation scores the class among all heads or only those of its own task."""

    class Fixed(nn.Module):
        def all_logits(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, 0, 0]  # four logits: two tasks of two classes

    def images(*rows: list[float]) -> torch.Tensor:
        return torch.tensor(rows)[:, None, None]

    first = Split(
        images([1.0, 0, 0, 0]),
        torch.tensor([0]),
        images([9.0, 0, 1, 2], [1.0, 2, 9, 0]),
        torch.tensor([0, 1]),
        (5, 6),
    )
    second = Split(
        images([1.0, 0, 0, 0]),
        torch.tensor([0]),
        images([0.0, 0, 3, 1], [0.0, 5, 3, 1]),
        torch.tensor([0, 0]),
        (1, 2),
    )
    model: Any = Fixed()
    cil, til = evaluate(model, [first, second], CPU)
    assert cil == [50.0, 50.0]
    assert til == [100.0, 100.0]


def test_augmentation_generator() -> None:
    """Augmentation keeps the shape and draws from the generator."""
    images = torch.rand(5, 1, 28, 28)
    first, second = (augment(images, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == images.shape
    assert not torch.equal(first, images)


def test_fused_plain_loss() -> None:
    """Fused and plain steps have the same loss."""
    fused, plain = steps(16, 2, 28, 7, 4, 2, CPU)
    assert fused() == pytest.approx(plain(), rel=1e-5)


def test_plain_layers_replace() -> None:
    """Plain layers replace every adapted layer."""
    model = adapted(tiny_backbone(), rank=2)
    twin, layers = plain_copy(model)
    assert len(layers) == TINY.depth
    assert not fe.adapters(model).keys() & {
        n for n, m in twin.named_modules() if isinstance(m, fe.LoRALinear)
    }
    with torch.no_grad():
        for (_, _, b), theirs in zip(
            next(iter(fe.adapters(model).values())).adapter_parameters(), layers[0].pairs[1::2], strict=True
        ):
            theirs.copy_(b.normal_())
    images = torch.rand(3, 1, 28, 28)
    torch.testing.assert_close(model.backbone(images), twin.backbone(images))


def results(plain_last: list[float], ewc_last: list[float]) -> list[Result]:
    out = []
    for method, last in ((report.PLAIN, plain_last), (report.EWC, ewc_last)):
        rows = [[90.0], last]
        metrics = ContinualMetrics.from_matrix(rows, [10, 10], rows, scale=100.0)
        out.append(Result(method, 0, 1.0, [(0, 1), (2, 3)], metrics))
    return out


@pytest.mark.parametrize(
    ("plain", "ewc", "reached", "words"),
    [
        (
            [50.0, 80.0],
            [70.0, 80.0],
            True,
            ["lost 40.0 points", "EWC-LoRA 20.0", "50% smaller", "+10.0 points", "kept"],
        ),
        ([50.0, 80.0], [55.0, 80.0], False, ["12% smaller", "falls short of a backward transfer"]),
        (
            [50.0, 80.0],
            [70.0, 40.0],
            False,
            ["50% smaller", "-10.0 points", "a final accuracy that is not lower"],
        ),
        (
            [50.0, 80.0],
            [30.0, 80.0],
            False,
            ["50% LARGER", "backward transfer at least 30% smaller and of a final"],
        ),
    ],
)
def test_conclusion_follows_numbers(
    plain: list[float], ewc: list[float], reached: bool, words: list[str]
) -> None:
    """The conclusion follows the numbers."""
    summary = report.aggregate(results(plain, ewc))
    assert report.compare(summary)["goal_reached"] is reached
    text = report.conclusion(summary, 2, 1)
    assert all(word in text for word in words), text


def test_mean_std_seeds() -> None:
    """Mean and standard deviation are taken over seeds."""
    assert Spread.of([1.0, 2.0, 3.0])[:2] == (2.0, 1.0)
    assert Spread.of([4.0])[:2] == (4.0, None)


def test_default_lambda() -> None:
    """The default lambda follows the Fisher mode."""
    sample, batch = job.recipe_of(parse()), job.recipe_of(parse("--fisher-mode", "batch"))
    assert batch.ewc_lambda == pytest.approx(sample.ewc_lambda * sample.batch_size)
    assert job.recipe_of(parse("--fisher-mode", "batch", "--ewc-lambda", "7")).ewc_lambda == 7.0
    assert job.recipe_of(parse("--quick", "--tasks", "2", "--rank", "3", "--epochs", "4")).rank == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tasks", "1"],
        ["--rank", "0"],
        ["--epochs", "x"],
        ["--ewc-lambda", "-1"],
        ["--ewc-lambda", "inf"],
        ["--dataset", "z"],
    ],
)
def test_bad_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong usage is refused by the parser."""
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_failure_messages(tmp_path: Path) -> None:
    """Failures are errors with a message."""
    with pytest.raises(fe.ArgumentError, match="--device nonsense: not available here"):
        demo.run(parse("--quick", "--device", "nonsense", "--output", str(tmp_path)))
    with pytest.raises(fe.ArgumentError, match="5 tasks of at least 2 classes need 10 classes, got 6"):
        demo.run(parse("--quick", "--tasks", "5", "--output", str(tmp_path)))


def test_import_is_lazy() -> None:
    """Importing the library does not import the demo."""
    code = "import sys, fused_ewclora; sys.exit(any(m.startswith('fused_ewclora.demo') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_indivisible_sizes() -> None:
    """The transformer refuses sizes that do not divide."""
    with pytest.raises(ValueError, match="5 / 28 and 2 / 16"):
        VisionTransformer(28, 5, 1, 16, 1, 2)
    model = Classifier(tiny_backbone())
    model.add_head(2)
    model.add_head(3)
    assert model(torch.rand(4, 1, 28, 28)).shape == (4, 3)
    assert model.all_logits(torch.rand(4, 1, 28, 28)).shape == (4, 5)


def test_fixed_test_images(scenario: Scenario) -> None:
    """Test images do not depend on the seed."""
    splits = [select(scenario.continual, (4, 5), 10, 10, seed) for seed in (0, 1)]
    assert torch.equal(splits[0].test_images, splits[1].test_images)
    assert not torch.equal(splits[0].train_images, splits[1].train_images)
