# SPDX-License-Identifier: Apache-2.0
"""The published protocol of text classification in sequence: a language model writes the label word."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fused_ewclora.demo.formats import DataError

from . import text_sets, writers
from .answers import REDUCTIONS, Prompts, Writer, answers, learner, prompts
from .prompts import INSTRUCTIONS, Template, Vocabulary, read_instructions, template
from .stream import Problem, Stream, Task
from .text_sets import Example, TextSet
from .text_tasks import ORDERS


def load(
    root: Path,
    seed: int,
    device: str,
    *,
    model: str,
    order: int | Sequence[str],
    tasks: int | None = None,
    layout: str = "cl_benchmark",
    instructions: str | None = None,
    train_per_class: int | None = None,
    test_examples: int | None = None,
    max_length: int = 512,
    answer_length: int = 50,
    reduction: str = "mean",
    separator: str = "",
    dtype: str = "float32",
) -> Problem:
    """A task per data set, in one of the published orders (1 to 6) or that of some names.

    model: a folder below `root`, see `writers.load`, with dtype and separator. tasks: their number, which
    records name; it has to be that of the order. layout: see `text_sets`. instructions: a file below `root`
    with the instructions of prompts, see `prompts.read_instructions`; None uses those of `prompts`.
    train_per_class and test_examples, drawn with the seed, None for all: a class with fewer has all its own.
    Prompts are cut to max_length tokens; answer_length is that of free answers, reduction that of the loss:
    see `answers.Answers`. Raises `DataError` before any weights are read.

        >>> load(Path("data"), 0, "cuda", model="t5-large", order=1)
    """
    names = _names(order, tasks)
    for name, value, least in (
        ("max_length", max_length, 1), ("answer_length", answer_length, 1),
        ("train_per_class", train_per_class, 1), ("test_examples", test_examples, 1),
    ):  # fmt: skip
        optional = value is None and name not in ("max_length", "answer_length")
        if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise DataError(f"{name}: expected an integer >= {least}, got {value!r}")
    if reduction not in REDUCTIONS:
        raise DataError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    wording = INSTRUCTIONS if instructions is None else read_instructions(root / instructions)
    sets = [text_sets.read(name, root, layout) for name in names]
    backbone, vocabulary = writers.load(root, model, dtype, separator)
    generator = torch.Generator().manual_seed(seed)
    stream = Stream(
        f"texts, order {order}" if isinstance(order, int) else "texts",
        tuple(
            _task(one, template(one.name, one.words, wording), backbone, vocabulary, max_length, splits)
            for one in sets
            for splits in [_drawn(one, train_per_class, test_examples, generator)]
        ),
    )
    facts: dict[str, Any] = {
        "description": f"{', '.join(names)}; {model}",
        "model": model,
        "dtype": dtype,
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "unlabelled_test_examples": sum(one.unlabelled for one in sets),
    }
    words = {class_name(one, word): word for one in sets for word in one.words}
    made = learner(vocabulary, words, reduction, answer_length)
    return Problem(stream, backbone.to(device), facts, made)


def class_name(found: TextSet, word: str) -> str:
    """Of a class in the stream: sets share label words."""
    return f"{found.name}: {word}"


def _names(order: int | Sequence[str], tasks: int | None) -> tuple[str, ...]:
    if isinstance(order, bool) or (isinstance(order, int) and order not in ORDERS):
        raise DataError(f"order: expected 1 to {len(ORDERS)} or names of sets, got {order!r}")
    names = ORDERS[order] if isinstance(order, int) else tuple(order)
    if isinstance(order, str) or not names or len(set(names)) < len(names):
        raise DataError(f"order: expected distinct names of sets, got {order!r}")
    if tasks is not None and tasks != len(names):
        raise DataError(f"tasks: expected {len(names)}, the number of sets of the order, got {tasks!r}")
    return names


def _drawn(
    found: TextSet, per_class: int | None, test: int | None, generator: torch.Generator
) -> tuple[list[Example], list[Example]]:
    """Training examples of each class, and test examples of all classes together."""
    train: list[Example] = []
    for label in range(len(found.words)):
        own = [example for example in found.train if example.label == label]
        train += _some(own, per_class, generator)
    return train, _some(found.test, test, generator)


def _some(examples: Sequence[Example], count: int | None, generator: torch.Generator) -> list[Example]:
    if count is None or count >= len(examples):
        return list(examples)
    return [examples[i] for i in torch.randperm(len(examples), generator=generator)[:count].tolist()]


def _task(
    found: TextSet,
    form: Template,
    backbone: Writer,
    vocabulary: Vocabulary,
    longest: int,
    splits: tuple[Sequence[Example], Sequence[Example]],
) -> Task:
    given, _ = answers([vocabulary.answer(word) for word in found.words], backbone)

    def encoded(examples: Sequence[Example]) -> Prompts:
        rows = [(vocabulary.prompt(form, one.text, longest), one.label) for one in examples]
        return prompts(rows, given, vocabulary)

    return Task(tuple(class_name(found, word) for word in found.words), *map(encoded, splits))
