# SPDX-License-Identifier: Apache-2.0
"""A small CLIP, trained here on few images and their captions, learns five domains one after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ewclora.demo.data import ImageSet, load_dataset, load_digits, load_mnist
from fused_ewclora.demo.formats import DataError

from .clip import learner_of
from .clip_learner import Towers, check_options, classes_to_images
from .clip_models import OpenClip, imported
from .domains import DIGITS
from .stream import Arrays, Problem, Stream, Task
from .vision import FASHION_CLASSES, fashion_folder

SIDE, PATCH, FEATURES, HEADS = 28, 7, 32, 4
RATE, DECAY, BATCH = 3e-3, 0.05, 64  # of AdamW, in training before the first task
BETAS = (0.9, 0.98)
CACHED = 4


@dataclass(frozen=True)
class Domain:
    """An image set as one task sees it: which share of its images, how they are changed, and captions."""

    images: str  # mnist, fashion-mnist, digits
    half: int | None  # 0 or 1 where two domains share a set, so that none has images of the other
    change: Callable[[Tensor], Tensor]
    template: str


def _same(images: Tensor) -> Tensor:
    return images


def _negative(images: Tensor) -> Tensor:
    return 1.0 - images


def _turned(images: Tensor) -> Tensor:
    return images.flip(-1, -2)


DOMAINS = {
    "digits": Domain("mnist", 0, _same, "a photo of the digit {}"),
    "clothes": Domain("fashion-mnist", 0, _same, "a photo of a {}"),
    "scans": Domain("digits", None, _same, "a scan of the digit {}"),
    "negatives": Domain("mnist", 1, _negative, "a negative of the digit {}"),
    "upside down": Domain("fashion-mnist", 1, _turned, "an upside down photo of a {}"),
}


@dataclass(frozen=True)
class Part:
    """Images `[N, 3, 28, 28]` in -1..1 and labels of a domain, for each purpose; none is in two of them."""

    before: Arrays
    train: Arrays
    test: Arrays


def load(
    root: Path,
    seed: int,
    device: str,
    *,
    train_per_class: int = 100,
    test_per_class: int = 100,
    base_per_class: int = 10,
    base_steps: int = 300,
    width: int = 48,
    depth: int = 2,
    rivals: str = "all",
    text_loss: bool = True,
) -> Problem:
    """Five tasks of ten classes: MNIST, Fashion-MNIST, the digits of scikit-learn, negatives of MNIST and
    Fashion-MNIST upside down; files as `vision.load` finds or downloads them.

    The model has the towers of open_clip's CLIP, of `depth` blocks of `width`, and words for tokens. It is
    trained base_steps steps on base_per_class images of every class, with the prompts of all 50 classes, so
    that it names classes that it has hardly seen, as CLIP does. Training images are drawn with the seed from
    the other ones; test images are the first of each class, at most test_per_class. rivals, text_loss: see
    `ImageText`. The global random state stays as it is. Raises `DataError`.

        >>> load(Path("data"), seed=0, device="cpu").backbone.network.visual.transformer.resblocks[0].attn
    """
    check_options(rivals, text_loss)
    for name, value, least in (
        ("train_per_class", train_per_class, 1), ("test_per_class", test_per_class, 1),
        ("base_per_class", base_per_class, 1), ("base_steps", base_steps, 1), ("width", width, HEADS),
        ("depth", depth, 1),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise DataError(f"{name}: expected an integer >= {least}, got {value!r}")
    if width % HEADS:
        raise DataError(f"width: expected a multiple of {HEADS}, got {width}")
    parts = _parts(root.resolve(), seed, base_per_class, train_per_class, test_per_class)
    towers = _base(
        root.resolve(), seed, str(device), (base_per_class, train_per_class, test_per_class), base_steps,
        width, depth,
    )  # fmt: skip
    texts = _texts()
    prompts = dict(zip((name for names in _classes().values() for name in names), words(texts), strict=True))
    tasks = tuple(Task(tuple(_classes()[name]), part.train, part.test) for name, part in parts.items())
    facts = {
        "description": f"{', '.join(DOMAINS)}: {len(texts)} classes; a CLIP of {depth} + {depth} blocks",
        "templates": {name: domain.template for name, domain in DOMAINS.items()},
        "base_images": len(texts) * base_per_class,
        "parameters": sum(p.numel() for p in towers.parameters()),
    }
    return Problem(Stream("small clip", tasks), towers, facts, learner_of(prompts, rivals, text_loss))


def words(texts: Sequence[str]) -> Tensor:
    """Tokens `[K, T]` int64 of texts: a number for each of their words in alphabetical order, from 2 on;
    1 before them, the largest number after them, which the text tower reads, and then zeros."""
    split = [text.lower().split() for text in texts]
    numbers = {word: place for place, word in enumerate(sorted({w for ws in split for w in ws}), 2)}
    rows = torch.zeros(len(split), max(map(len, split)) + 2, dtype=torch.int64)
    for row, text in zip(rows, split, strict=True):
        row[: len(text) + 2] = torch.tensor([1, *(numbers[word] for word in text), len(numbers) + 2])
    return rows


def _names(domain: Domain) -> tuple[str, ...]:
    return FASHION_CLASSES if domain.images == "fashion-mnist" else DIGITS


def _classes() -> dict[str, list[str]]:
    return {name: [f"{name}: {c}" for c in _names(domain)] for name, domain in DOMAINS.items()}


def _texts() -> list[str]:
    return [domain.template.format(c) for domain in DOMAINS.values() for c in _names(domain)]


@functools.lru_cache(maxsize=1)
def _sets(root: Path) -> dict[str, ImageSet]:
    fashion = load_dataset("fashion-mnist", fashion_folder(root))
    if fashion.classes != len(FASHION_CLASSES):
        raise DataError(f"fashion-mnist: expected {len(FASHION_CLASSES)} classes, got {fashion.classes}")
    return {"mnist": load_mnist(root), "fashion-mnist": fashion, "digits": load_digits()}


@functools.lru_cache(maxsize=CACHED)
def _parts(root: Path, seed: int, before: int, train: int, test: int) -> dict[str, Part]:
    sets = _sets(root)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _part(domain, sets[domain.images], (before, train, test), generator)
        for name, domain in DOMAINS.items()
    }


def _part(domain: Domain, images: ImageSet, sizes: tuple[int, int, int], generator: torch.Generator) -> Part:
    before, train, test = sizes
    chosen: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for label in range(images.classes):
        learned, tested = (
            _half((labels == label).nonzero()[:, 0], domain.half)
            for labels in (images.train_labels, images.test_labels)
        )
        if len(learned) < before + train:
            raise DataError(
                f"train_per_class: {images.name}, class {label}: expected {before + train} images, "
                f"{before} of them for training before the first task, found {len(learned)}"
            )
        drawn = learned[torch.randperm(len(learned), generator=generator)]
        for places, kept in zip(
            (drawn[:before], drawn[before : before + train], tested[:test]), chosen, strict=True
        ):
            kept.append(places)

    def arrays(pixels: Tensor, labels: Tensor, places: list[Tensor]) -> Arrays:
        index = torch.cat(places)
        changed = 2.0 * domain.change(pixels[index]) - 1.0
        return Arrays(changed.expand(-1, 3, -1, -1), labels[index])

    learning = images.train_images, images.train_labels
    testing = images.test_images, images.test_labels
    return Part(arrays(*learning, chosen[0]), arrays(*learning, chosen[1]), arrays(*testing, chosen[2]))


def _half(places: Tensor, half: int | None) -> Tensor:
    return places if half is None else places[half::2]


@functools.lru_cache(maxsize=CACHED)
def _base(
    root: Path, seed: int, device: str, sizes: tuple[int, int, int], steps: int, width: int, depth: int
) -> Towers:
    """The trained towers: one per seed, shared by all methods of a suite."""
    parts = _parts(root, seed, *sizes).values()
    images = torch.cat([part.before[:][0] for part in parts])  # type: ignore[index,misc]
    labels = torch.cat([part.before.labels + 10 * number for number, part in enumerate(parts)])
    place = torch.device(device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        towers = small(words(_texts()), width, depth).to(place)
        train(towers, images, labels, words(_texts()).to(place), steps, seed)
    return towers.requires_grad_(False).eval()


def small(tokens: Tensor, width: int, depth: int) -> OpenClip:
    """Towers for images `[N, 3, 28, 28]` and for these tokens, with random weights."""
    image = {
        "layers": depth, "width": width, "head_width": width // HEADS, "patch_size": PATCH,
        "image_size": SIDE,
    }  # fmt: skip
    text = {
        "layers": depth, "width": width, "heads": HEADS, "context_length": tokens.shape[1],
        "vocab_size": int(tokens.max()) + 1,
    }  # fmt: skip
    return OpenClip(imported("open_clip").CLIP(embed_dim=FEATURES, vision_cfg=image, text_cfg=text))


def train(towers: Towers, images: Tensor, labels: Tensor, tokens: Tensor, steps: int, seed: int) -> None:
    """Trains all parameters on images and on the prompts of all classes, with the loss of `ImageText`."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(towers.parameters(), RATE, betas=BETAS, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    place = tokens.device
    for _ in range(steps):
        index = torch.randint(len(labels), (BATCH,), generator=generator)
        x, y = images[index].to(place), labels[index].to(place)
        optimizer.zero_grad()
        logits = towers.logits(x, towers.texts(tokens))
        (F.cross_entropy(logits, y) + classes_to_images(logits, y)).backward()
        optimizer.step()
        schedule.step()
