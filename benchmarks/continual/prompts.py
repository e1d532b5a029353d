# SPDX-License-Identifier: Apache-2.0
"""Texts as prompts and answers as tokens: what a language model reads, and what it should write."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_ewclora.demo.formats import DataError

from .text_tasks import TASKS

IGNORED = -100  # target at positions after the end of an answer
# Own wordings. The published ones are in a file that comes with the data; see `read_instructions`.
INSTRUCTIONS = {
    "TC": "Name the topic of this text. Choose one of the options.\n",
    "SC": "Name the sentiment of this text. Choose one of the options.\n",
    "NLI": 'Name the logical relation of "sentence 1" to "sentence 2". Choose one of the options.\n',
    "QQP": "Do both sentences have the same meaning? Choose one of the options.\n",
    "BoolQA": "Is the answer to the question true or false, by the passage? Choose one of the options.\n",
    "MultiRC": "Is the candidate answer true or false, by the paragraph? Choose one of the options.\n",
    "WiC": "Does the word have the same sense in both sentences? Choose one of the options.\n",
    "COPA": "",  # the text itself asks
}
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without punctuation, with single spaces: how answers are compared."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def read_instructions(path: Path) -> dict[str, str]:
    """Instructions by type from a file {"TC": [{"instruction": "..."}], ...}, as `instruction_config.json` of
    O-LoRA's repository; the first one of a type counts. Raises `DataError`."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"instructions: {path}: not readable as JSON: {error}") from error
    found = dict(INSTRUCTIONS)
    for kind in {task.type for task in TASKS.values()} - {"COPA"}:
        try:
            text = data[kind][0]["instruction"]
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(f'instructions: {path}: {kind}: expected [{{"instruction": text}}]') from error
        if not isinstance(text, str) or not text:
            raise DataError(f"instructions: {path}: {kind}: expected a text, got {text!r}")
        found[kind] = text
    return found


@dataclass(frozen=True)
class Template:
    """What stands before and after the text of an example."""

    before: str
    after: str

    def of(self, text: str) -> str:
        """The prompt."""
        return f"{self.before}{text}{self.after}"


def template(name: str, words: Sequence[str], instructions: Mapping[str, str]) -> Template:
    """The prompt of a set: its type and name, the instruction, and its label words as options."""
    kind = TASKS[name].type
    options = f"Option: {', '.join(words)} \n" if instructions[kind] else ""
    return Template(f"Task:{kind}\nDataset:{name}\n{instructions[kind]}{options}", "\nAnswer:")


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model.

    tokenizer: a `tokenizers.Tokenizer`, which adds what the model expects around a prompt. end: the token
    that ends answers, pad: that of padding. left: prompts are padded on the left, so that answers follow
    them. separator: what stands between a prompt and its answer.
    """

    tokenizer: Any
    end: int
    pad: int
    left: bool
    separator: str = ""

    def prompt(self, form: Template, text: str, longest: int) -> list[int]:
        """The tokens of a prompt, of which there are at most `longest`: the end of the text is cut, not what
        comes after it. Raises `DataError` when the prompt is too long even without a text."""
        tokens: list[int] = self.tokenizer.encode(form.of(text)).ids
        while len(tokens) > longest:
            if not text:
                raise DataError(
                    f"max_length: expected at least {len(tokens)} for the prompt alone, got {longest}: "
                    f"{form.of('')!r}"
                )
            places = self.tokenizer.encode(text, add_special_tokens=False).offsets
            keep = len(places) - (len(tokens) - longest)
            shorter = text[: places[keep][0]] if keep > 0 else ""
            text = shorter if len(shorter) < len(text) else text[:-1]
            tokens = self.tokenizer.encode(form.of(text)).ids
        return tokens

    def answer(self, word: str) -> list[int]:
        """The tokens of an answer, the last one of which ends it; raises `DataError` for a word that
        they do not spell."""
        tokens = [*self.tokenizer.encode(self.separator + word, add_special_tokens=False).ids, self.end]
        if len(tokens) < 2 or normalised(self.text(tokens)) != normalised(word) or not normalised(word):
            raise DataError(
                f"label word {word!r}: expected tokens that read the same, got {self.text(tokens)!r}"
            )
        return tokens

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens say, up to the end of the answer."""
        tokens = list(tokens)
        if self.end in tokens:
            tokens = tokens[: tokens.index(self.end)]
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text


def padded(rows: Sequence[Sequence[int]], fill: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of tokens as `[N, T]` int64 of the longest one, and `[N, T]` bool, true for tokens of the rows."""
    longest = max(map(len, rows))
    numbers = torch.full((len(rows), longest), fill, dtype=torch.int64)
    mask = torch.zeros((len(rows), longest), dtype=torch.bool)
    for row, tokens in enumerate(rows):
        place = slice(longest - len(tokens), None) if left else slice(0, len(tokens))
        numbers[row, place] = torch.tensor(tokens, dtype=torch.int64)
        mask[row, place] = True
    return numbers, mask
