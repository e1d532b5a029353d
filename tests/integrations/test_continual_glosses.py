# SPDX-License-Identifier: Apache-2.0
"""Definitions whose subject a language model writes: SmolLM2's files, the T5 pretrained here, the stream."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
import torch
from tiny_wordnet import LARGE, SHARED, SMALL, write_wordnet

from benchmarks.continual import configuration, denoising, gguf, glosses, problems, smollm, wordnet
from benchmarks.continual.run import execute
from benchmarks.continual.stream import Problem, loader
from fused_ewclora.demo.formats import DataError

SIZES: dict[str, Any] = {
    "tasks": 2,
    "classes_per_task": 2,
    "train_per_class": 8,
    "test_per_class": 4,
    "max_length": 40,
}
CONFIGURED = {"t5": "language-seq2seq", "smollm2": "language-causal"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("data")
    write_wordnet(made)
    folder = made / "wordnet-base/usr/share/wordnet"
    for part in ("adj", "adv"):
        number = wordnet.LEXICOGRAPHER_FILES.index(f"{part}.all")
        lines = [f"{n:08d} {number:02d} {part[0]} 01 w 0 000 | {part} {n} ba be" for n in range(20)]
        (folder / f"data.{part}").write_text("\n".join(lines) + "\n")
    tiny_gguf.write_wheel(made, tiny_gguf.content(tiny_gguf.network()))
    return made


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    for cached in (glosses._definitions, glosses._t5, glosses._smollm):
        cached.cache_clear()


def load(root: Path, model: str, seed: int = 0, **changes: Any) -> Problem:
    steps = {"steps": 2} if model == "t5" else {}
    return problems.load({"kind": "glosses", "model": model, **SIZES, **steps, **changes}, root, seed, "cpu")


@pytest.mark.parametrize("kinds", [(0, 1), (1, 0), (8, 3)], ids=str)
def test_same_network(kinds: tuple[int, int], tmp_path: Path) -> None:
    """A file gives the logits of the network that it was written from, with the values that it says."""
    made = tiny_gguf.network()
    tiny_gguf.write_wheel(tmp_path, tiny_gguf.content(made, kinds=kinds))
    backbone, vocabulary = smollm.load(tmp_path)
    tokens = torch.tensor([vocabulary.tokenizer.encode("World abc 12, more").ids])
    assert vocabulary.tokenizer.decode(tokens[0].tolist()) == "World abc 12, more" and tokens.shape[1] > 4
    torch.testing.assert_close(backbone.network(tokens).logits, made(tokens).logits, rtol=1e-5, atol=1e-6)
    first, _ = smollm.load(tmp_path, blocks=1)
    made.model.layers = made.model.layers[:1]
    torch.testing.assert_close(first.network(tokens).logits, made(tokens).logits, rtol=1e-5, atol=1e-6)


def test_bad_files(tmp_path: Path) -> None:
    """Damaged and other files are refused in words."""
    made = tiny_gguf.network()
    whole, values = tiny_gguf.content(made), tiny_gguf.settings(made)
    for data, message in (
        (b"GGML" + whole[4:], "expected b'GGUF' at the beginning, got b'GGML'"),
        (whole[:4] + struct.pack("<I", 2) + whole[8:], "expected version 3, got 2"),
        (whole[:200], "not readable as GGUF: expected .* found the end"),
        (whole[:-4000], r"blk\.1\..*: expected \d+ bytes, found \d+: truncated"),
        (
            tiny_gguf.content(made, {**values, "general.architecture": "bert"}),
            "architecture llama, got 'bert'",
        ),
        (
            tiny_gguf.content(made, {k: v for k, v in values.items() if "freq" not in k}),
            "'llama.rope.freq_base'",
        ),
        (tiny_gguf.content(made, {**values, "llama.block_count": 3}), r"expected a tensor blk\.2\.attn_norm"),
        (tiny_gguf.content(made, {**values, "llama.feed_forward_length": 32}), "the weights do not fit"),
    ):
        tiny_gguf.write_wheel(tmp_path, data)
        with pytest.raises(DataError, match=message):
            smollm.load(tmp_path)
    for member, content, message in (
        ("other.txt", b"", r"expected one file \*.gguf, found 0"),
        (tiny_gguf.MEMBER, whole, "blocks: expected 1 to 2, got 3"),
    ):
        tiny_gguf.write_wheel(tmp_path, content, member)
        with pytest.raises(DataError, match=message):
            smollm.load(tmp_path, blocks=3)
    (tmp_path / tiny_gguf.WHEEL).write_bytes(b"no zip")
    with pytest.raises(DataError, match="cannot be read, remove it"):
        smollm.load(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        gguf.read(tmp_path / "none.gguf")


@pytest.mark.parametrize("model", glosses.MODELS)
def test_stream(model: str, root: Path) -> None:
    """Tasks have the largest classes; no text is in both splits, or in two classes."""
    problem = load(root, model)
    tasks = problem.stream.tasks
    assert sorted(name for task in tasks for name in task.classes) == sorted(LARGE)
    made = problem.learner(problem.backbone)  # type: ignore[misc]
    assert made.words == {
        "noun.act": "act",
        "noun.animal": "animal",
        "noun.food": "food",
        "verb.motion": "motion",
    }
    seen: list[str] = []
    for task in tasks:
        assert (len(task.train), len(task.test)) == (16, 8)  # type: ignore[arg-type]
        for data in (task.train, task.test):
            (prompt, mask, _), _ = next(iter(loader(data, 100)))
            seen += [
                made.vocabulary.tokenizer.decode(p[m].tolist()) for p, m in zip(prompt, mask, strict=True)
            ]
    assert len(set(seen)) == len(seen) and all(text.strip().startswith("Definition: ") for text in seen)
    assert not any(SHARED in text.removesuffix("\nTopic:") and text.count(" ") == 3 for text in seen)
    other = load(root, model, seed=1)
    assert other.backbone is problem.backbone
    assert [t.classes for t in other.stream.tasks] != [t.classes for t in tasks]


def test_base_reads_other_classes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The T5 is pretrained on texts of classes that are not in the stream, the same in all runs."""
    given = []
    real = denoising.pretrain

    def noted(texts: Any, subjects: Any, *rest: Any) -> Any:
        given.append(set(zip(texts, subjects, strict=True)))
        return real(texts, subjects, *rest)

    monkeypatch.setattr(denoising, "pretrain", noted)
    state = torch.random.get_rng_state()
    problem = load(root, "t5")
    assert torch.equal(state, torch.random.get_rng_state())
    first = [p.clone() for p in problem.backbone.parameters()]
    names = {subject for _, subject in given[0]}
    assert names == {name.replace(".", " ") for name in (*SMALL, "adj.all", "adv.all")}
    assert problem.facts["pretraining_classes"] == 4 and problem.facts["pretraining_steps"] == 2
    glosses._t5.cache_clear()
    again = list(load(root, "t5", seed=1).backbone.parameters())
    assert all(map(torch.equal, first, again)) and not any(p.requires_grad for p in again)


def test_left_out() -> None:
    """A span and what is around it are the text."""
    torch.manual_seed(0)
    for length in (1, 2, 9, 30):
        text = list(range(10, 10 + length))
        source, span = denoising.left_out(text, 24)
        at = source.index(denoising.SPECIAL.index(denoising.SPAN))
        assert [*source[:at], *span[:-1], *source[at + 1 : -1]] == text[:22]
        assert source[-1] == span[-1] == 1 and 1 <= len(span) - 1 <= 4 and len(source) <= 24


def test_t5_learns() -> None:
    """Pretraining lowers the loss below that of guessing."""
    texts = [f"{word} {n % 7}" for n in range(70) for word in ("ba", "be")]
    recipe = denoising.Recipe(steps=40, batch_size=16, tokens=280, dim=32, blocks=1, longest=16, lr=3e-2)
    *_, loss = denoising.pretrain(texts, [text[:2] for text in texts], glosses.FORM, recipe, 0)
    assert loss < 3.0 < math.log(280)  # that of guessing


@pytest.mark.parametrize("model", glosses.MODELS)
def test_configured_methods_learn(model: str, root: Path) -> None:
    """Every kind of method of the configuration learns two tasks; its settings are those of the loader."""
    loaded = configuration.load(configuration.find(CONFIGURED[model]))
    quick = configuration.load(configuration.find(CONFIGURED[model]), quick=True)
    for one in (loaded, quick):
        settings = {**one.runs[0].problem, **SIZES, **({"steps": 2} if model == "t5" else {"blocks": 1})}
        problem = problems.load(settings, root, 0, "cpu")
    for run in {run.kind: run for run in loaded.runs}.values():
        short = replace(run.training, epochs=1, batch_size=8)
        options = {**run.options, **({"total_tasks": 2} if "total_tasks" in run.options else {})}
        record = execute(replace(run, training=short, options=options), problem, torch.device("cpu"))
        assert [len(row) for row in record["matrices"]["task_aware"]] == [1, 2]
        assert all(math.isfinite(row["loss"]) for row in record["tasks"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "gpt"}, "model: expected one of t5, smollm2, got 'gpt'"),
        ({"reduction": "max"}, "reduction: expected one of mean, sum"),
        ({"tasks": 0}, "tasks: expected an integer >= 1, got 0"),
        ({"blocks": 1}, "blocks: expected null for t5, got 1"),
        ({"train_per_class": 33}, "expected 4 classes with 37 distinct definitions, found 2"),
        ({"classes_per_task": 4}, "expected 8 classes"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str, root: Path) -> None:
    """Wrong settings are refused by name."""
    with pytest.raises(DataError, match=message):
        load(root, **({"model": "t5"} | change))


def test_repeated_subjects() -> None:
    """Classes with one subject are told apart by their part of speech."""
    found = glosses.subjects(["noun.act", "noun.motion", "verb.motion"])
    assert found == {"noun.act": "act", "noun.motion": "noun motion", "verb.motion": "verb motion"}
