# SPDX-License-Identifier: Apache-2.0
"""A small T5 that is pretrained here: on spans left out of texts, and on writing the subjects of texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import writers
from .prompts import IGNORED, Template, padded

PAD, END, SPAN = "<pad>", "</s>", "<span>"
SPECIAL = [PAD, END, SPAN]  # in the order of their numbers
LONGEST_SPAN = 4


@dataclass(frozen=True)
class Recipe:
    """Sizes of the model and of its training; a quarter of a batch are spans, the rest subjects."""

    steps: int = 400
    batch_size: int = 32
    lr: float = 3e-3
    tokens: int = 4096  # at most, in the vocabulary
    dim: int = 128
    blocks: int = 2
    longest: int = 24  # tokens of a prompt


def pretrain(texts: Sequence[str], subjects: Sequence[str], form: Template, recipe: Recipe, seed: int) -> Any:
    """(network, tokenizer, loss) of a T5 that has read texts, each of which has a subject; loss: the mean of
    the last tenth of the steps. The global random state stays as it is."""
    library = writers.transformers()
    tokens = tokenizer([form.of(text) for text in texts], recipe.tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = library.T5ForConditionalGeneration(settings(library, tokens.get_vocab_size(), recipe))
        optimizer = torch.optim.Adam(network.parameters(), lr=recipe.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.lr, total_steps=recipe.steps, pct_start=0.1
        )
        losses = []
        for prompt, mask, answer in batches(tokens, texts, subjects, form, recipe):
            optimizer.zero_grad()
            logits = network(input_ids=prompt, attention_mask=mask.long(), labels=answer).logits
            loss = F.cross_entropy(logits.flatten(0, 1), answer.flatten(), ignore_index=IGNORED)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    last = losses[-max(1, recipe.steps // 10) :]
    return network.eval(), tokens, sum(last) / len(last)


def settings(library: Any, tokens: int, recipe: Recipe) -> Any:
    """The configuration of the model; without dropout, so that runs do not differ in noise."""
    return library.T5Config(
        vocab_size=tokens,
        d_model=recipe.dim,
        d_kv=recipe.dim // 4,
        d_ff=2 * recipe.dim,
        num_layers=recipe.blocks,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=SPECIAL.index(PAD),
        eos_token_id=SPECIAL.index(END),
        decoder_start_token_id=SPECIAL.index(PAD),
    )


def tokenizer(texts: Sequence[str], size: int) -> Any:
    """Pieces of the words of some texts; a prompt ends with the token that ends texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, SPECIAL.index(END))]
    )
    return made


def batches(
    tokens: Any, texts: Sequence[str], subjects: Sequence[str], form: Template, recipe: Recipe
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(prompt, mask, answer with -100 after its end) of batches drawn from the global random state."""
    end = SPECIAL.index(END)
    plain = [one.ids for one in tokens.encode_batch(list(texts), add_special_tokens=False)]
    asked = [one.ids for one in tokens.encode_batch([form.of(text) for text in texts])]
    told = [
        one.ids for one in tokens.encode_batch([f" {word}" for word in subjects], add_special_tokens=False)
    ]
    # Subjects are equally likely: half of the texts are of a single one.
    counts = Counter(subjects)
    likely = torch.tensor([1.0 / counts[subject] for subject in subjects])
    quarter = recipe.batch_size // 4
    for _ in range(recipe.steps):
        pairs = [
            left_out(plain[row], recipe.longest) for row in torch.randint(len(texts), (quarter,)).tolist()
        ]
        rows = torch.multinomial(likely, recipe.batch_size - quarter, replacement=True).tolist()
        pairs += [([*asked[row][: recipe.longest - 1], end], [*told[row], end]) for row in rows]
        prompt, mask = padded([source for source, _ in pairs], SPECIAL.index(PAD))
        yield prompt, mask, padded([target for _, target in pairs], IGNORED)[0]


def left_out(text: list[int], longest: int) -> tuple[list[int], list[int]]:
    """A text with a span of 1 to 4 tokens replaced by a mark, and the span; both with their end."""
    end, mark = SPECIAL.index(END), SPECIAL.index(SPAN)
    text = text[: longest - 2]
    length = min(int(torch.randint(1, LONGEST_SPAN + 1, ())), len(text))
    start = int(torch.randint(0, len(text) - length + 1, ()))
    return [*text[:start], mark, *text[start + length :], end], [*text[start : start + length], end]
