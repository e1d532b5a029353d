# SPDX-License-Identifier: Apache-2.0
"""Language models that write label words: losses, scores and prompts on tiny ones; the published problem."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from text_files import write_cl_benchmark, write_json
from tiny_writers import network, tokenizer, write_model
from torch import Tensor

from benchmarks.continual import answers, configuration, problems, writers
from benchmarks.continual.answers import Answers, Prompts
from benchmarks.continual.prompts import IGNORED, Template, normalised
from benchmarks.continual.run import execute
from benchmarks.continual.stream import Problem, Task, loader
from fused_ewclora.demo.formats import DataError

KINDS = ("t5", "llama")
PUBLISHED = {"t5": "published/ewc-lora-t5-large", "llama": "published/ewc-lora-llama-3.2-1b"}
WORDS = ("World", "Science or Technology", "Sports")
FORM = Template("Task:TC\n", "\nAnswer:")
TEXTS = ("abc 1", "abc 2 2 2 , 3", "a", "Dataset abc", "1 2 3 1 2 3")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def learner(kind: str, reduction: str = "mean", longest: int = 12) -> tuple[Answers, Task]:
    """An fp64 model and a task of short and long texts."""
    backbone, vocabulary = writers.made(network(kind).double(), tokenizer(kind))
    given, _ = answers.answers([vocabulary.answer(word) for word in WORDS], backbone)
    rows = [(vocabulary.prompt(FORM, text, 40), n % 3) for n, text in enumerate(TEXTS)]
    data = answers.prompts(rows, given, vocabulary)
    task = Task(tuple(f"x: {word}" for word in WORDS), data, data)
    made = Answers(backbone, vocabulary, {f"x: {word}": word for word in WORDS}, reduction, longest)
    made.begin_task(task)
    return made.eval(), task


def batch(task: Task) -> tuple[Any, Tensor]:
    return next(iter(loader(task.train, len(TEXTS))))


def own_loss(made: Answers, kind: str, prompt: list[int], answer: list[int]) -> Tensor:
    """transformers' own loss of one example without padding: the mean over the tokens of its answer."""
    if kind == "t5":
        return made.backbone.network(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer])).loss
    labels = torch.tensor([[IGNORED] * len(prompt) + answer])
    return made.backbone.network(input_ids=torch.tensor([prompt + answer]), labels=labels).loss


@pytest.mark.parametrize("reduction", answers.REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_own_loss(kind: str, reduction: str) -> None:
    """The loss of a padded batch is that of transformers on each example alone."""
    made, task = learner(kind, reduction)
    inputs, labels = batch(task)
    expected = []
    for text, label in zip(TEXTS, labels.tolist(), strict=True):
        answer = made.vocabulary.answer(WORDS[label])
        loss = own_loss(made, kind, made.vocabulary.prompt(FORM, text, 40), answer)
        expected.append(loss * (len(answer) if reduction == "sum" else 1))
    # transformers computes its loss, and T5 the softmax of its attention, in fp32.
    torch.testing.assert_close(
        made.loss(made(inputs), labels), torch.stack(expected).mean().double(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_literal_scores(kind: str) -> None:
    """Free answers are those of a loop that writes one token after the other; the own classes are compared
    by the sum of log p of each answer."""
    made, task = learner(kind)
    for seed in range(40):  # until some answers are right and others are not
        made.backbone.network.load_state_dict(spoken(kind, made, seed))
        scores = made.scores([task], 1, lambda task: loader(task.test, 2))
        if 0 < scores["class_incremental"][0] < 100:
            break
    free = own = 0
    _, labels = batch(task)
    for text, label in zip(TEXTS, labels.tolist(), strict=True):
        prompt = made.vocabulary.prompt(FORM, text, 40)
        free += normalised(made.vocabulary.text(written(made, kind, prompt, 12))) == normalised(WORDS[label])
        totals = []
        for word in WORDS:
            answer = made.vocabulary.answer(word)
            totals.append(-float(own_loss(made, kind, prompt, answer)) * len(answer))
        own += totals.index(max(totals)) == label
    assert 0 < free < len(TEXTS)
    assert scores["class_incremental"] == [pytest.approx(100 * free / len(TEXTS))]
    assert scores["task_aware"] == [pytest.approx(100 * own / len(TEXTS))]


def spoken(kind: str, made: Answers, seed: int) -> dict[str, Tensor]:
    """Weights of a model that has learned a little, so that it writes label words."""
    made.backbone.network.load_state_dict(network(kind, seed).double().state_dict())
    inputs, labels = next(iter(loader(made_task(made), len(TEXTS))))
    made.backbone.network.requires_grad_(True)
    optimizer = torch.optim.Adam(made.backbone.network.parameters(), lr=0.02)
    for _ in range(12 + seed):
        optimizer.zero_grad()
        made.loss(made(inputs), labels).backward()
        optimizer.step()
    made.backbone.network.requires_grad_(False)
    return made.backbone.network.state_dict()


def made_task(made: Answers) -> Prompts:
    given, _ = answers.answers([made.vocabulary.answer(word) for word in WORDS], made.backbone)
    rows = [(made.vocabulary.prompt(FORM, text, 40), n % 3) for n, text in enumerate(TEXTS)]
    return answers.prompts(rows, given, made.vocabulary)


@torch.no_grad()
def written(made: Answers, kind: str, prompt: list[int], longest: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < longest and (not tokens or tokens[-1] != made.vocabulary.end):
        if kind == "t5":
            out = made.backbone.network(
                input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *tokens]])
            )
        else:
            out = made.backbone.network(input_ids=torch.tensor([prompt + tokens]))
        tokens.append(int(out.logits[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("kind", KINDS)
def test_padding_counts_nothing(kind: str) -> None:
    """Logits of an example do not depend on the others, and no column of a batch is all padding."""
    made, task = learner(kind)
    (prompt, mask, given), _ = batch(task)
    together = made((prompt, mask, given))
    assert torch.isfinite(together).all() and together.shape == (*given.shape, 300)
    for row in range(len(TEXTS)):
        (alone, own, before), _ = task.train[[row]]
        assert own.all() and alone.shape[1] == int(mask[row].sum())
        torch.testing.assert_close(made((alone, own, before))[0], together[row], rtol=1e-5, atol=1e-6)
    single, label = task.train[1]
    assert single[0].shape == (int(mask[1].sum()),) and label.shape == ()


def test_prompt_cut() -> None:
    """A long text loses its end, and the prompt keeps what comes after it."""
    _, vocabulary = writers.made(network("llama"), tokenizer("llama"))
    text = "abc 1 2 3 , " * 20
    whole, bare = vocabulary.prompt(FORM, text, 500), vocabulary.prompt(FORM, "", 500)
    for longest in (len(bare), len(bare) + 1, len(bare) + 7, len(whole) - 1, len(whole)):
        tokens = vocabulary.prompt(FORM, text, longest)
        said = vocabulary.tokenizer.decode(tokens)
        assert longest - 3 <= len(tokens) <= longest
        assert said.startswith(FORM.before) and said.endswith(FORM.after)
        assert text.startswith(said.removeprefix(FORM.before).removesuffix(FORM.after))
    with pytest.raises(DataError, match=f"max_length: expected at least {len(bare)} for the prompt alone"):
        vocabulary.prompt(FORM, text, len(bare) - 1)
    with pytest.raises(DataError, match="label word '-': expected tokens that read the same"):
        vocabulary.answer("-")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("texts")
    for kind in KINDS:
        write_model(made / kind, kind)
    for name in ("agnews", "CB"):
        write_cl_benchmark(made, name, train=4)
    write_json(
        made / "instruction_config.json",
        {
            kind: [{"instruction": f"{kind}? "}]
            for kind in ("TC", "SC", "NLI", "QQP", "BoolQA", "MultiRC", "WiC")
        },
    )
    return made


def load(root: Path, kind: str, **changes: Any) -> Problem:
    settings = configuration.load(configuration.find(PUBLISHED[kind])).runs[0].problem
    small = {"model": kind, "order": ["agnews", "CB"], "tasks": 2, "answer_length": 6}
    return problems.load(settings | small | changes, root, 0, "cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_published_methods_learn(kind: str, root: Path) -> None:
    """Every method of the published configurations learns two sets, and the prompts are as told."""
    problem = load(root, kind)
    task = problem.stream.tasks[0]
    assert task.classes[3] == "agnews: Science or Technology"
    (prompt, mask, _), _ = task.train[[0]]
    made = problem.learner(problem.backbone)  # type: ignore[misc]
    said = made.vocabulary.tokenizer.decode(prompt[0][mask[0]].tolist())  # type: ignore[union-attr]
    assert said == (
        "Task:TC\nDataset:agnews\nTC? Option: World, Sports, Business, Science or Technology \n"
        "aaa 0 , more\nAnswer:"
    )
    for run in configuration.load(configuration.find(PUBLISHED[kind])).runs:
        short = replace(run.training, batch_size=8, fisher_batch_size=4, test_batch_size=4)
        record = execute(replace(run, training=short), problem, torch.device("cpu"))
        assert [len(row) for row in record["matrices"]["class_incremental"]] == [1, 2]
        assert all(math.isfinite(row["loss"]) for row in record["tasks"])
        adapted = 12 if kind == "t5" else 4  # q and v of self- and cross-attention
        assert record["tasks"][0]["adapter_parameters"] >= adapted * 2 * 8 * 8
        penalised = run.kind in ("EWCLoRA", "OLoRA", "NLoRA")
        assert (record["tasks"][1]["penalty"] > 0) == penalised


def test_bad_models(root: Path, tmp_path: Path) -> None:
    """Folders without a model, and weights that lack a parameter, are refused."""
    with pytest.raises(
        DataError, match=r"none: expected config.json, tokenizer.json and .*found no config.json"
    ):
        writers.load(root, "none")
    with pytest.raises(DataError, match="dtype: expected one of float32, bfloat16, got 'int8'"):
        writers.load(root, "t5", dtype="int8")
    write_model(tmp_path / "m", "llama")
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 3}))
    with pytest.raises(DataError, match=r"the weights lack model.layers.2\..* \(9 tensors in all\)"):
        writers.load(tmp_path, "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match="cannot be loaded"):
        writers.load(tmp_path, "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json: not readable"):
        writers.tokenizer(tmp_path / "m" / "tokenizer.json")
    for name, words in (("eos_token_id", "ends texts"), ("decoder_start_token_id", "starts answers")):
        wrong = network("t5")
        setattr(wrong.config, name, None)
        with pytest.raises(DataError, match=f"model: expected a token that {words}"):
            writers.made(wrong, tokenizer("t5"))
