# SPDX-License-Identifier: Apache-2.0
"""The language problem, on a tiny BERT and a small WordNet in the formats of the real ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from tiny_wordnet import (
    FOLDER,
    LARGE,
    REPEATED,
    SHARED,
    SMALL,
    WHEEL,
    WORDS,
    files,
    settings,
    write_wheel,
    write_wordnet,
)
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import BertModel

import fused_ewclora as fe
from benchmarks.continual import configuration, language, minilm, problems, run, wordnet
from benchmarks.continual.stream import Arrays, Problem, loader
from fused_ewclora.demo.formats import DataError
from fused_ewclora.demo.vit import Classifier
from fused_ewclora.methods import EWCLoRA

SIZES = {
    "tasks": 2, "classes_per_task": 2, "train_per_class": 12, "test_per_class": 8, "tokens": 8,
    "frozen_blocks": 1,
}  # fmt: skip
# Summing in another order: fp32 rounding of features of size 1, far below any real difference.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("data")
    write_wheel(made, files())
    write_wordnet(made)
    return made


@pytest.fixture(autouse=True)
def fresh(known_threads: None) -> Iterator[None]:
    torch.set_num_threads(1)  # matrices this small only wait for each other's threads
    yield
    for cached in (language._problem, language._corpus, language._model):
        cached.cache_clear()


def load(root: Path, seed: int = 0, **changes: int) -> Problem:
    return problems.load({"kind": "language", **SIZES, **changes}, root, seed, "cpu")


def everything(data: Arrays) -> tuple[tuple[Tensor, Tensor], Tensor]:
    (hidden, mask), labels = data[list(range(len(data)))]
    return (hidden, mask), labels


def texts(data: Arrays) -> set[bytes]:
    """Examples by what the embedding makes of them; with frozen_blocks=0 equal only for equal tokens."""
    return {row.numpy().tobytes() for row in everything(data)[0][0]}


def test_stream_largest_classes(root: Path):
    """The stream has the largest classes, in tasks of the sizes asked for."""
    problem = load(root)
    tasks = problem.stream.tasks
    assert sorted(name for task in tasks for name in task.classes) == sorted(LARGE)
    for task in tasks:
        assert len(task.classes) == 2
        for data, count in ((task.train, 12), (task.test, 8)):
            (hidden, mask), labels = everything(data)
            assert hidden.shape == (2 * count, 8, 16) and hidden.dtype == torch.float32
            assert mask.shape == (2 * count, 8) and mask.dtype == torch.bool
            assert labels.dtype == torch.int64 and labels.bincount().tolist() == [count] * 2
    assert problem.backbone.dim == 16
    assert not any(p.requires_grad for p in problem.backbone.parameters())
    assert problem.facts["definitions"] == sum((LARGE | SMALL).values()) + 4
    assert problem.facts["distinct_definitions"] == sum((LARGE | SMALL).values()) + 1
    assert problem.facts["classes_to_choose_from"] == 6
    assert json.loads(json.dumps(problem.facts)) == problem.facts


def test_fewer_classes(root: Path):
    """When fewer classes are asked for, they are the largest ones."""
    classes = {name for task in load(root, classes_per_task=1).stream.tasks for name in task.classes}
    assert classes == {"noun.animal", "noun.act"}


def test_examples_are_definitions(root: Path):
    """Examples are definitions of their class."""
    problem = load(root, frozen_blocks=0)
    model = language._model(root.resolve())
    names, definitions = zip(*wordnet.definitions(root), strict=True)
    by_class: dict[str, set[bytes]] = {name: set() for name in names}
    for name, row in zip(names, model.hidden(*model.tokens(definitions, 8), 0), strict=True):
        by_class[name].add(row.numpy().tobytes())
    for task in problem.stream.tasks:
        for data in (task.train, task.test):
            (hidden, _), labels = everything(data)
            for row, label in zip(hidden, labels.tolist(), strict=True):
                assert row.numpy().tobytes() in by_class[task.classes[label]]


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_blocks_backbone(root: Path, frozen: int):
    """Frozen blocks and backbone together are the whole model."""
    problem = load(root, frozen_blocks=frozen)
    whole = BertModel(settings(), add_pooling_layer=False).eval()
    whole.load_state_dict(language._model(root.resolve()).bert.state_dict())
    corpus = language._corpus(root.resolve(), 8)
    assert len(problem.backbone.layer) == 3 - frozen
    for task in problem.stream.tasks:
        rows = torch.cat([corpus.rows[name][:8] for name in task.classes])
        mask = corpus.mask[rows]
        with torch.no_grad():
            states = whole(input_ids=corpus.numbers[rows], attention_mask=mask.long()).last_hidden_state
            features = problem.backbone(everything(task.test)[0])
        wanted = torch.stack([row[kept].mean(0) for row, kept in zip(states, mask, strict=True)])
        torch.testing.assert_close(features, wanted, **CLOSE)
        assert not mask.all() and features.std() > 0.1  # padding, and features that differ


def test_weights_from_file(root: Path):
    """The weights are those of the file."""
    stored = safetensors.torch.load(files()["model.safetensors"])
    taken = minilm.load(root).bert.state_dict()
    assert len(taken) == len(stored) - 3  # position_ids and the weight and bias of pooling
    for name, value in taken.items():
        torch.testing.assert_close(value, stored[name], rtol=0, atol=0)


def test_padding_invariant(root: Path):
    """Padding does not change features."""
    model = minilm.load(root)
    some = [" ".join(WORDS[i : i + 1 + i % 5]) for i in range(12)]
    outputs = []
    for length in (8, 15):
        numbers, mask = model.tokens(some, length)
        assert numbers.shape == mask.shape == (12, length)
        with torch.no_grad():
            outputs.append(model.rest(2)((model.hidden(numbers, mask, 2), mask)))
    torch.testing.assert_close(*outputs, **CLOSE)


def test_long_texts_are_cut(root: Path):
    numbers, mask = minilm.load(root).tokens([" ".join(WORDS)], 8)
    assert mask.all() and numbers[0, 0] == 2 and numbers[0, -1] == 3


def test_train_test_disjoint(root: Path):
    """No text is in both training and testing, whatever the seeds."""
    problems = [load(root, seed, frozen_blocks=0) for seed in range(3)]
    train = {text for problem in problems for task in problem.stream.tasks for text in texts(task.train)}
    test = {text for problem in problems for task in problem.stream.tasks for text in texts(task.test)}
    assert not train & test
    assert len(test) == 4 * 8  # the same of every seed, all different


def test_text_drawn_once(root: Path):
    """A text is drawn only once."""
    for task in load(root, frozen_blocks=0, train_per_class=24).stream.tasks:
        assert len(texts(task.train)) == len(task.train) == 48


def test_seed_repeats(root: Path):
    """A seed repeats its draw and order, and another seed gives new ones."""
    first = load(root, 3, frozen_blocks=0)
    language._problem.cache_clear()
    again = load(root, 3, frozen_blocks=0)
    assert again is not first
    for task, other in zip(first.stream.tasks, again.stream.tasks, strict=True):
        assert task.classes == other.classes
        for data, same in ((task.train, other.train), (task.test, other.test)):
            for value, equal in zip(everything(data)[0], everything(same)[0], strict=True):
                assert torch.equal(value, equal)
    orders = {tuple(task.classes for task in load(root, seed).stream.tasks) for seed in range(4)}
    assert len(orders) > 1

    def training(problem: Problem) -> set[bytes]:
        return {text for task in problem.stream.tasks for text in texts(task.train)}

    assert training(load(root, 4, frozen_blocks=0)) != training(first)


def test_file_order_invariant(root: Path, tmp_path: Path):
    """The order of definitions in the files does not matter."""
    write_wheel(tmp_path, files())
    write_wordnet(tmp_path, backwards=True)
    assert wordnet.definitions(tmp_path) != wordnet.definitions(root)
    for task, other in zip(load(root).stream.tasks, load(tmp_path).stream.tasks, strict=True):
        assert task.classes == other.classes
        assert torch.equal(everything(task.test)[0][1], everything(other.test)[0][1])
        assert torch.equal(everything(task.test)[0][0], everything(other.test)[0][0])
        torch.testing.assert_close(everything(task.train)[0], everything(other.train)[0], rtol=0, atol=0)


def test_random_state_untouched(root: Path):
    """Loading leaves the random state alone."""
    torch.manual_seed(5)
    load(root)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


def test_duplicate_definitions(root: Path):
    """Equal definitions count once, and ambiguous ones not at all."""
    model = minilm.load(root)
    corpus = language._corpus(root.resolve(), 8)
    shared, repeated = model.tokens([SHARED, REPEATED], 8)[0]
    for text, count in ((shared, 0), (repeated, 1)):
        kept = {name: int((corpus.numbers[rows] == text).all(1).sum()) for name, rows in corpus.rows.items()}
        assert sum(kept.values()) == count
    counts = {name: len(rows) for name, rows in corpus.rows.items()}
    assert counts == LARGE | SMALL | {"noun.act": LARGE["noun.act"] + 1}


def test_names_must_agree():
    """A row counts only where all its names agree."""
    rows = torch.tensor([[1, 2], [3, 4], [1, 2], [7, 8], [3, 4], [5, 6], [5, 6]])
    assert language.distinct(rows, ["b", "a", "a", "c", "b", "a", "a"]).tolist() == [3, 5]


def test_equal_arguments_encode_once(root: Path, monkeypatch):
    first = load(root)
    monkeypatch.setattr(minilm.Model, "hidden", None)
    assert load(root) is first
    with pytest.raises(TypeError):
        load(root, 1)


def test_dropout_is_off(root: Path):
    problem = load(root)
    inputs = everything(problem.stream.tasks[0].test)[0]
    with torch.no_grad():
        assert torch.equal(problem.backbone.train()(inputs), problem.backbone.eval()(inputs))


def test_ewc_protects_task(root: Path):
    """Adapters on keys and values learn a task that EWC then protects."""
    problem = load(root)
    before = copy.deepcopy(problem.backbone.state_dict())
    torch.manual_seed(0)
    model = Classifier(copy.deepcopy(problem.backbone))
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["key", "value"]))
    assert list(fe.adapters(model)) == [
        f"backbone.layer.{block}.attention.self.{name}" for block in range(2) for name in ("key", "value")
    ]
    method = EWCLoRA(model, ewc_lambda=1e3)
    model.add_head(2)
    method.begin_task(0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for inputs, labels in loader(problem.stream.tasks[0].train, 24):
        for _ in range(40):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels) + method.penalty()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(layer.lora_B.detach().abs().max() > 0 for layer in fe.adapters(model).values())
    method.end_task(loader(problem.stream.tasks[0].train, 8), F.cross_entropy)
    method.begin_task(1)
    for layer in fe.adapters(model).values():
        torch.nn.init.ones_(layer.lora_B)
    assert float(method.penalty().detach()) > 0
    assert all(torch.equal(before[name], value) for name, value in problem.backbone.state_dict().items())


def small(name: str, **options: object) -> configuration.Run:
    training = {"lr": 1e-3, "head_lr": 5e-3, "epochs": 1, "batch_size": 8}
    entry = {"name": name, "kind": name, "options": options}
    made = configuration.parse(
        {"name": "tiny", "about": "", "problem": {"kind": "language"}, "training": training, "seeds": [0],
         "adapters": {"r": 2, "target_modules": ["key", "value"]}, "methods": [entry]}
    )  # fmt: skip
    return made.runs[0]


@pytest.mark.parametrize(("kind", "options"), [("InfLoRA", {}), ("CoDyRA", {"gate_init": "normal"})])
def test_methods_masked_states(root: Path, kind: str, options: dict[str, object]):
    """Methods run on pairs of hidden states and masks."""
    record = run.execute(small(kind, **options), load(root), torch.device("cpu"))
    assert [len(row) for row in record["matrices"]["class_incremental"]] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": 3}, "expected 6 classes with 20 distinct definitions, found 4"),
        ({"train_per_class": 33}, "expected 4 classes with 41 distinct definitions, found 2"),
        ({"frozen_blocks": 3}, "frozen_blocks: expected at most 2 of 3, got 3"),
        ({"tokens": 21}, "tokens: expected an integer from 3 to 20, got 21"),
        ({"tokens": 2}, "tokens: expected an integer >= 3, got 2"),
        ({"test_per_class": 0}, "test_per_class: expected an integer >= 1, got 0"),
        ({"classes_per_task": True}, "classes_per_task: expected an integer >= 1, got True"),
        ({"train_per_class": 2.0}, "train_per_class: expected an integer >= 1, got 2.0"),
    ],
)
def test_unmet_arguments(root: Path, changes: dict[str, int], message: str):
    """Arguments that cannot be met are named."""
    with pytest.raises(DataError) as caught:
        load(root, **changes)
    assert message in str(caught.value)


def without(name: str) -> Callable[[dict[str, bytes]], object]:
    return lambda content: content.pop(name)


def replaced(name: str, data: bytes) -> Callable[[dict[str, bytes]], object]:
    return lambda content: content.update({name: data})


def without_a_tensor(content: dict[str, bytes]) -> None:
    weights = safetensors.torch.load(content["model.safetensors"])
    del weights["encoder.layer.2.attention.self.key.weight"]
    content["model.safetensors"] = safetensors.torch.save(weights)


NO_PADDING = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")).to_str().encode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.safetensors"), "expected one file model.safetensors, found 0"),
        (replaced("other/model.safetensors", b""), "expected one file model.safetensors, found 2"),
        (without("config.json"), f"expected a file {FOLDER}/config.json, found none"),
        (without("tokenizer.json"), f"expected a file {FOLDER}/tokenizer.json, found none"),
        (replaced("config.json", b"{"), "config.json, tokenizer.json: not readable"),
        (replaced("config.json", b'{"model_type": "gpt2"}'), "expected a bert, got 'gpt2'"),
        (replaced("tokenizer.json", b"{}"), "config.json, tokenizer.json: not readable"),
        (replaced("tokenizer.json", NO_PADDING), "expected a token [PAD], found none"),
        (replaced("model.safetensors", b"\0" * 64), "model.safetensors: not readable"),
        (without_a_tensor, "does not fit config.json"),
    ],
)
def test_wrong_wheel(tmp_path: Path, change: Callable[[dict[str, bytes]], object], message: str):
    """A wheel whose contents are not the model is refused."""
    content = files()
    change(content)
    write_wheel(tmp_path, content)
    with pytest.raises(DataError) as caught:
        minilm.load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / WHEEL}: ") and message in str(caught.value)


def test_damaged_wheel(tmp_path: Path):
    """A damaged wheel is named."""
    (tmp_path / WHEEL).write_bytes(b"PK")
    with pytest.raises(DataError, match="cannot be read, remove it to fetch it again"):
        minilm.load(tmp_path)
