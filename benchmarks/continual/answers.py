# SPDX-License-Identifier: Apache-2.0
"""Learners that write the answer: classes are label words, and the loss is that of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_ewclora.demo.evaluation import PERCENT

from .learner import Batches, Learner, Scores
from .prompts import IGNORED, Vocabulary, normalised, padded
from .stream import Arrays, Task

REDUCTIONS = ("mean", "sum")


class Prompts(Arrays):
    """Examples of a language model: inputs are a prompt `[N, T]`, its mask `[N, T]` and the tokens before
    each token of the answer `[N, A]`. A batch has no column that is padding in all its prompts."""

    def __getitem__(self, index: int | list[int]) -> tuple[Any, Tensor]:
        (prompt, mask, given), labels = super().__getitem__(index)
        used = mask.reshape(-1, mask.shape[-1]).any(0)
        return (prompt[..., used].long(), mask[..., used], given), labels


class EncoderDecoder(nn.Module):
    """A sequence-to-sequence model of transformers, such as T5: logits `[N, A, V]` of the answer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.start: int | None = network.config.decoder_start_token_id  # type: ignore[union-attr,assignment]

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        prompt, mask, given = inputs
        return self.logits(self.read(prompt, mask), mask, given)

    def read(self, prompt: Tensor, mask: Tensor) -> Any:
        """What serves several answers to the same prompts."""
        encoder = self.network.get_encoder()  # type: ignore[operator]
        return encoder(input_ids=prompt, attention_mask=mask.long())

    def logits(self, read: Any, mask: Tensor, given: Tensor) -> Tensor:
        """Logits of the next token after each of the given ones."""
        out = self.network(
            encoder_outputs=read, attention_mask=mask.long(), decoder_input_ids=given, use_cache=False
        )
        logits: Tensor = out.logits
        return logits

    def given(self, answer: Sequence[int]) -> list[int]:
        """The tokens before each of an answer."""
        assert self.start is not None
        return [self.start, *answer[:-1]]

    def written(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        """What was written, in the tokens that the model returns for prompts."""
        return tokens[:, 1:]


class DecoderOnly(nn.Module):
    """A causal language model of transformers, such as LLaMA: logits `[N, A, V]` of the answer, which follows
    the prompt. Prompts are padded on the left."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        prompt, mask, given = inputs
        tokens, seen = torch.cat([prompt, given[:, 1:]], 1), _longer(mask, given)
        out = self.network(
            input_ids=tokens,
            attention_mask=seen,
            position_ids=_places(seen),
            use_cache=False,
            logits_to_keep=given.shape[1],
        )
        logits: Tensor = out.logits
        return logits

    def read(self, prompt: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
        """What serves several answers to the same prompts: keys and values, logits of first tokens."""
        seen = mask.long()
        out = self.network(
            input_ids=prompt,
            attention_mask=seen,
            position_ids=_places(seen),
            use_cache=True,
            logits_to_keep=1,
        )
        return out.past_key_values, out.logits

    def logits(self, read: tuple[Any, Tensor], mask: Tensor, given: Tensor) -> Tensor:
        """Logits of the next token after each of the given ones, the first of which ends the prompt."""
        cache, first = read
        if given.shape[1] == 1:
            return first
        seen = _longer(mask, given)
        out = self.network(
            input_ids=given[:, 1:],
            attention_mask=seen,
            position_ids=_places(seen)[:, mask.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        )
        cache.crop(1 - given.shape[1])  # of its end, so that the next answer follows the same prompts
        return torch.cat([first, out.logits], 1)

    def given(self, answer: Sequence[int]) -> list[int]:
        """The tokens before each of an answer; the first one is the last of the prompt, and not read here."""
        return [IGNORED, *answer[:-1]]

    def written(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        """What was written, in the tokens that the model returns for prompts."""
        return tokens[:, prompt.shape[1] :]


Writer = EncoderDecoder | DecoderOnly


def _longer(mask: Tensor, given: Tensor) -> Tensor:
    """The mask of prompts and of what is given after them."""
    return torch.cat([mask, torch.ones_like(given[:, 1:], dtype=torch.bool)], 1).long()


def _places(seen: Tensor) -> Tensor:
    """Positions of tokens, which padding on the left does not shift."""
    return (seen.cumsum(1) - 1).clamp(min=0)


class Answers(Learner):
    """Learns to write the label word of a prompt.

    words: the label word of every class of the stream; classes of different tasks may have the same. The loss
    of an example is the sum or the mean of -log p over the tokens of its answer, the end included, and a
    batch has the mean over its examples.

    "class_incremental": the model writes freely, greedily, up to `longest` tokens, and is right when the
    text is the label word (`prompts.normalised`). "task_aware": the most likely label word of the task's
    own classes, by the sum of log p of its tokens.
    """

    def __init__(
        self,
        backbone: Writer,
        vocabulary: Vocabulary,
        words: Mapping[str, str],
        reduction: str = "mean",
        longest: int = 50,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.vocabulary, self.words, self.reduction, self.longest = vocabulary, words, reduction, longest
        self._targets: Tensor | None = None  # [C, A] of the current task

    def begin_task(self, task: Task) -> None:
        """Makes the answers of a task the targets."""
        device = next(self.backbone.parameters()).device
        self._targets = self._answers(task)[1].to(device)

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        logits: Tensor = self.backbone(inputs)
        return logits

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Logits `[N, A, V]` of the answers, positions of the classes `[N]`."""
        assert self._targets is not None
        return token_losses(outputs, self._targets[labels], self.reduction).mean()

    def scores(self, tasks: Sequence[Task], begun: int, batches: Batches) -> Scores:
        """Exact matches of free answers, and the most likely answers of the own classes."""
        found = [self._right(task, batches) for task in tasks[:begun]]
        return {"class_incremental": [free for free, _ in found], "task_aware": [own for _, own in found]}

    def _right(self, task: Task, batches: Batches) -> tuple[float, float]:
        given, targets = (part.to(next(self.parameters()).device) for part in self._answers(task))
        words = [normalised(self.words[name]) for name in task.classes]
        free = own = count = 0
        for (prompt, mask, _), labels in batches(task):
            written = [normalised(self.vocabulary.text(row)) for row in self._write(prompt, mask)]
            free += sum(text == words[label] for text, label in zip(written, labels.tolist(), strict=True))
            likely = self.likelihoods(prompt, mask, given, targets).argmax(1).cpu()
            own += int((likely == labels).sum())
            count += len(labels)
        return PERCENT * free / count, PERCENT * own / count

    @torch.no_grad()
    def likelihoods(self, prompt: Tensor, mask: Tensor, given: Tensor, targets: Tensor) -> Tensor:
        """log p `[N, C]` of every answer after every prompt."""
        read = self.backbone.read(prompt, mask)
        columns = []
        for before, answer in zip(given, targets, strict=True):
            length = int((answer != IGNORED).sum())
            logits = self.backbone.logits(read, mask, before[:length].expand(len(prompt), -1))
            columns.append(-token_losses(logits, answer[:length].expand(len(prompt), -1), "sum"))
        return torch.stack(columns, 1)

    @torch.no_grad()
    def _write(self, prompt: Tensor, mask: Tensor) -> list[list[int]]:
        tokens = self.backbone.network.generate(  # type: ignore[operator]
            input_ids=prompt,
            attention_mask=mask.long(),
            max_new_tokens=self.longest,
            do_sample=False,
            num_beams=1,
            eos_token_id=self.vocabulary.end,
            pad_token_id=self.vocabulary.pad,
        )
        rows: list[list[int]] = self.backbone.written(tokens, prompt).tolist()
        return rows

    def _answers(self, task: Task) -> tuple[Tensor, Tensor]:
        return answers([self.vocabulary.answer(self.words[name]) for name in task.classes], self.backbone)


def answers(tokens: Sequence[Sequence[int]], backbone: Writer) -> tuple[Tensor, Tensor]:
    """What is given before each token of some answers, and the tokens: `[C, A]`, `[C, A]` with -100 after
    the end."""
    given, _ = padded([backbone.given(answer) for answer in tokens], 0)
    targets, _ = padded(tokens, IGNORED)
    return given.clamp(min=0), targets


def token_losses(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """-log p `[N]` of targets `[N, A]`, summed or averaged over the tokens of each; -100 does not count."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none")
    sums = losses.view(targets.shape).sum(1)
    return sums / (targets != IGNORED).sum(1) if reduction == "mean" else sums


def learner(
    vocabulary: Vocabulary, words: Mapping[str, str], reduction: str, longest: int
) -> Callable[[nn.Module], Learner]:
    """What a run makes of a copy of the backbone."""
    return lambda backbone: Answers(backbone, vocabulary, words, reduction, longest)  # type: ignore[arg-type]


def prompts(
    rows: Iterator[tuple[list[int], int]] | Sequence[tuple[list[int], int]],
    given: Tensor,
    vocabulary: Vocabulary,
) -> Prompts:
    """Examples of (prompt, class) pairs; given `[C, A]`: see `answers`."""
    listed = list(rows)
    numbers, mask = padded([tokens for tokens, _ in listed], vocabulary.pad, vocabulary.left)
    labels = torch.tensor([label for _, label in listed])
    return Prompts((numbers.int(), mask, given[labels]), labels)
