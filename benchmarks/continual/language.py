# SPDX-License-Identifier: Apache-2.0
"""Classification of WordNet definitions by the upper blocks of MiniLM-L6."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_ewclora.demo.formats import DataError

from . import minilm, wordnet
from .stream import Arrays, Problem, Stream, Task, split_classes

NAME = "WordNet definitions"
ENCODED = 4  # problems in the cache: hidden states of 4,400 examples of 16 tokens take 108 MB


@dataclass(frozen=True)
class Corpus:
    """Definitions that the model can distinguish, as tokens.

    numbers `[N, T]` int64 and mask `[N, T]` bool as from `minilm.Model.tokens`; rows: those of each class, in
    an order that depends only on their tokens. read: number of definitions before duplicates were removed.
    """

    numbers: Tensor
    mask: Tensor
    rows: dict[str, Tensor]
    read: int


def load(
    root: Path,
    seed: int,
    device: str,
    *,
    tasks: int = 5,
    classes_per_task: int = 4,
    train_per_class: int = 160,
    test_per_class: int = 60,
    tokens: int = 16,
    frozen_blocks: int = 3,
) -> Problem:
    """A stream of classes of definitions, named by lexicographer files (noun.animal, verb.motion, ...).

    The largest classes are used. The seed orders them and draws the training examples; test examples are the
    same for every seed, and no text is in both. Definitions with equal tokens are used once, or not at all
    when they belong to different classes.

    Each text is padded or cut to `tokens`. The embedding and the first `frozen_blocks` blocks run here, once
    per text; inputs are their hidden states `[N, T, dim]` and masks `[N, T]`, and the backbone is the rest.
    Its linear layers have the names of BERT (`layer.0.attention.self.key`), its dropout is off. The last
    problems are cached, so that runs with the same arguments encode once per process.

    root: folder with the Debian package wordnet-base and the wheel of MiniLM, downloaded there if missing.
    device: where the blocks run; examples stay on the CPU. Raises `DataError`.
    """
    for name, value, least in (
        ("seed", seed, 0), ("tasks", tasks, 1), ("classes_per_task", classes_per_task, 1),
        ("train_per_class", train_per_class, 1), ("test_per_class", test_per_class, 1),
        ("tokens", tokens, minilm.SHORTEST), ("frozen_blocks", frozen_blocks, 0),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise DataError(f"{name}: expected an integer >= {least}, got {value!r}")
    sizes = (tasks, classes_per_task, train_per_class, test_per_class)
    return _problem(root.resolve(), seed, str(device), sizes, tokens, frozen_blocks)


@functools.lru_cache(maxsize=ENCODED)
def _problem(
    root: Path, seed: int, device: str, sizes: tuple[int, int, int, int], tokens: int, frozen: int
) -> Problem:
    tasks, classes_per_task, train_per_class, test_per_class = sizes
    model, corpus = _model(root), _corpus(root, tokens)
    if frozen >= model.blocks:
        raise DataError(f"frozen_blocks: expected at most {model.blocks - 1} of {model.blocks}, got {frozen}")
    classes = largest(corpus, tasks * classes_per_task, train_per_class + test_per_class)
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: draw(corpus.rows[name], train_per_class, test_per_class, generator) for name in classes}
    order = [classes[i] for i in torch.randperm(len(classes), generator=generator).tolist()]

    def encoded(names: tuple[str, ...], split: int) -> Arrays:
        rows = torch.cat([drawn[name][split] for name in names])
        labels = torch.cat([torch.full((len(drawn[name][split]),), i) for i, name in enumerate(names)])
        mask = corpus.mask[rows]
        return Arrays((model.hidden(corpus.numbers[rows], mask, frozen, device), mask), labels)

    stream = Stream(
        NAME,
        tuple(Task(names, encoded(names, 0), encoded(names, 1)) for names in split_classes(order, tasks)),
    )
    facts: dict[str, Any] = {
        "texts": wordnet.PACKAGE,
        "definitions": corpus.read,
        "distinct_definitions": sum(map(len, corpus.rows.values())),
        "classes_to_choose_from": len(corpus.rows),
        "model": minilm.PACKAGE,
        "parameters": model.parameters,
        "blocks": model.blocks,
        "frozen_blocks": frozen,
        "tokens": tokens,
    }
    return Problem(stream, model.rest(frozen), facts)


def largest(corpus: Corpus, count: int, examples: int) -> list[str]:
    """The `count` classes with most definitions, largest first; raises `DataError` when one of them has fewer
    than `examples`."""
    names = sorted(corpus.rows, key=lambda name: (-len(corpus.rows[name]), name))
    enough = [name for name in names if len(corpus.rows[name]) >= examples]
    if len(enough) < count:
        raise DataError(
            f"train_per_class, test_per_class: expected {count} classes with {examples} distinct "
            f"definitions, found {len(enough)}"
        )
    return enough[:count]


def draw(rows: Tensor, train: int, test: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows for training, drawn from those that are not for testing; and the first rows, for testing."""
    rest = rows[test:]
    return rest[torch.randperm(len(rest), generator=generator)[:train]], rows[:test]


def distinct(numbers: Tensor, names: list[str]) -> Tensor:
    """Rows of numbers `[N, T]` to keep: the first of equal ones, if all of them have the same name."""
    labels = np.unique(names, return_inverse=True)[1]
    _, first, group = np.unique(numbers.numpy(), axis=0, return_index=True, return_inverse=True)
    group = group.reshape(-1)
    lowest, highest = labels[first].copy(), labels[first].copy()
    np.minimum.at(lowest, group, labels)
    np.maximum.at(highest, group, labels)
    return torch.from_numpy(np.sort(first[lowest == highest]))


@functools.lru_cache(maxsize=1)
def _model(root: Path) -> minilm.Model:
    return minilm.load(root)


@functools.lru_cache(maxsize=1)
def _corpus(root: Path, tokens: int) -> Corpus:
    names, texts = map(list, zip(*wordnet.definitions(root), strict=True))
    numbers, mask = _model(root).tokens(texts, tokens)
    rows: dict[str, list[int]] = {}
    # Definitions of a file are sorted by subject; a hash shuffles them reproducibly.
    for row in sorted(distinct(numbers, names).tolist(), key=lambda row: _hash(numbers[row])):
        rows.setdefault(names[row], []).append(row)
    return Corpus(
        numbers, mask, {name: torch.tensor(positions) for name, positions in rows.items()}, len(texts)
    )


def _hash(row: Tensor) -> bytes:
    return hashlib.sha256(row.numpy().astype("<i8").tobytes()).digest()
