# SPDX-License-Identifier: Apache-2.0
"""CLIP as a learner: images are classified by the text tower's features of the prompts of the classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_ewclora.demo.evaluation import PERCENT
from fused_ewclora.demo.formats import DataError
from fused_ewclora.errors import ArgumentError
from fused_ewclora.ewc.controller import EWC
from fused_ewclora.layers.index import adapter_refs
from fused_ewclora.methods import Method

from .learner import Batches, Learner, Scores
from .stream import Task

RIVALS = ("all", "own")
PROMPT_BATCH = 128  # prompts that are encoded at a time for testing


class Towers(nn.Module):
    """The two towers of a CLIP model: images `[N, C, S, S]` and tokens `[K, T]` int64 to features `[., d]`
    of the same space, and the factor of their cosines, 0-d."""

    def encode_image(self, images: Tensor) -> Tensor:
        """Features `[N, d]`, of any length."""
        raise NotImplementedError

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Features `[K, d]`, of any length."""
        raise NotImplementedError

    def scale(self) -> Tensor:
        """What cosines are multiplied by."""
        raise NotImplementedError

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """`[N, K]` of images and of texts, features of length 1."""
        return self.scale() * F.normalize(self.encode_image(images), dim=-1) @ texts.T

    def texts(self, tokens: Tensor) -> Tensor:
        """Features `[K, d]` of length 1."""
        return F.normalize(self.encode_text(tokens), dim=-1)


class ImageText(Learner):
    """Trains both towers on images and the prompts of the current classes, as the official code of CoDyRA
    (arXiv 2412.01004) does:

        loss = CE(images -> classes) + CE(classes -> images of the batch)

    Images are compared with the classes of the current task alone: earlier ones are masked. The second term
    is the mean over all classes so far of -sum_n 1[y_n = k] log softmax_n(logits[:, k]), of which those of
    earlier tasks have no image in the batch and so no part; text_loss=False leaves it out. It has no share
    for every image, and is no part of -log p(class | image), so that evaluation mode leaves it out as well:
    Fishers are of the first term. Rows of the text tower belong to classes and to no image: Fishers of its
    adapters are those of mode "batch", and a run with mode "sample" is refused before it begins.

    prompts: token rows `[T]` int64 of the prompt of every class of the stream, by the name of the class, as
    tasks have it. rivals: what images are compared with when accuracies on every task are taken, "all"
    classes of the stream (X-TAIL), or the "own" ones of their task (MTIL). Of equal logits the class that
    comes first in `prompts` counts.
    """

    every_task = True

    def __init__(
        self, backbone: Towers, prompts: Mapping[str, Tensor], rivals: str = "all", text_loss: bool = True
    ) -> None:
        super().__init__()
        check_options(rivals, text_loss)
        self.backbone: Towers = backbone
        self.rivals, self.text_loss = rivals, text_loss
        self._places = {name: place for place, name in enumerate(prompts)}
        self._earlier = 0  # classes of earlier tasks
        self._current: list[int] = []
        self.prompts: Tensor
        self.register_buffer("prompts", torch.stack(list(prompts.values())), persistent=False)

    def begin_task(self, task: Task) -> None:
        """From now on images are compared with the classes of this task."""
        places = self._of(task)
        self._earlier, self._current = self._earlier + len(self._current), places

    def check_method(self, method: Method) -> None:
        """Refuses Fishers of samples for adapters of the text tower: the features of a prompt depend on
        them."""
        if not _estimates_by_sample(method):
            return
        if reached := self._of_texts(method):
            raise ArgumentError(
                f"{type(method).__name__}: its Fisher is of single images (fisher_mode 'sample'), and rows "
                f"of the text tower, where {reached[0]} is ({len(reached)} such adapters), belong to "
                "classes and to no image; expected fisher_mode 'batch', where the method has it, or "
                "adapters of the image tower alone"
            )

    def _of_texts(self, method: Method) -> list[str]:
        """The adapters that the features of a prompt depend on."""
        refs = adapter_refs(method.layers)
        composers = {layer: layer.composer for layer in method.layers.values()}
        try:
            for layer in composers:  # between tasks some methods leave the current adapters out
                layer.composer = None
            with torch.enable_grad():
                features = self.backbone.encode_text(self.prompts[:1])
        finally:
            for layer, composer in composers.items():
                layer.composer = composer
        if not features.requires_grad:
            return []
        lora_bs = [ref.parameters()[1] for ref in refs]
        gradients = torch.autograd.grad(features.sum(), lora_bs, allow_unused=True)
        return [ref.key for ref, gradient in zip(refs, gradients, strict=True) if gradient is not None]

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[N, K]` of images and the K classes of the current task."""
        return self.backbone.logits(images, self.backbone.texts(self.prompts[self._current]))

    def loss(self, outputs: Any, labels: Tensor) -> Tensor:
        """Of logits `[N, K]` and labels `[N]`, positions in the classes of the task."""
        of_images = F.cross_entropy(outputs, labels)
        if not (self.text_loss and self.training):
            return of_images
        return of_images + classes_to_images(outputs, labels, self._earlier)

    @torch.no_grad()
    def scores(self, tasks: Sequence[Task], begun: int, batches: Batches) -> Scores:
        """Class-incremental: among the classes of the tasks that have begun; task-aware: among those of the
        own task; every_task: as `rivals` says. All of them take the tasks in their order."""
        places = [self._of(task) for task in tasks]
        stream = [place for of_task in places for place in of_task]
        tokens = self.prompts[stream].split(PROMPT_BATCH)
        texts = torch.cat([self.backbone.texts(part) for part in tokens])
        seen = slice(0, sum(len(of_task) for of_task in places[:begun]))
        found: Scores = {"class_incremental": [], "task_aware": [], "every_task": []}
        start = 0
        for number, task in enumerate(tasks):
            own = slice(start, start + len(places[number]))
            ranges = {"every_task": own if self.rivals == "own" else slice(0, len(stream))}
            if number < begun:
                ranges |= {"class_incremental": seen, "task_aware": own}
            for protocol, value in self._accuracies(batches(task), texts, start, ranges).items():
                found[protocol].append(value)
            start = own.stop
        return found

    def _accuracies(
        self, batches: Iterable[tuple[Any, Tensor]], texts: Tensor, start: int, ranges: dict[str, slice]
    ) -> dict[str, float]:
        """In percent, among the classes of each range, of images whose label 0 is class `start`."""
        right, count = dict.fromkeys(ranges, 0), 0
        for images, labels in batches:
            logits = self.backbone.logits(images, texts).cpu()
            for name, among in ranges.items():
                chosen = logits[:, among].argmax(1) + among.start
                right[name] += int((chosen == labels + start).sum())
            count += len(labels)
        return {name: PERCENT * value / count for name, value in right.items()}

    def _of(self, task: Task) -> list[int]:
        """The rows of the prompts of a task."""
        if lacking := [name for name in task.classes if name not in self._places]:
            raise DataError(f"prompts: expected one of every class, found none of {lacking[0]!r}")
        return [self._places[name] for name in task.classes]


def classes_to_images(logits: Tensor, labels: Tensor, earlier: int = 0) -> Tensor:
    """The cross entropy of classes and the images of a batch, logits `[N, K]` and labels `[N]`: for every
    class the sum over its images of -log softmax over images; the mean over K + earlier classes."""
    targets = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return -(targets * logits.log_softmax(0)).sum() / (logits.shape[1] + earlier)


def _estimates_by_sample(method: Method) -> bool:
    """Whether a method, or an EWC that it has, estimates Fishers of single samples."""
    held = [method, *(value for value in vars(method).values() if isinstance(value, EWC))]
    return any(getattr(value, "fisher_mode", None) == "sample" for value in held)


def check_options(rivals: Any, text_loss: Any) -> None:
    """Raises `DataError` for options that `ImageText` does not have."""
    if rivals not in RIVALS:
        raise DataError(f"rivals: expected one of {', '.join(RIVALS)}, got {rivals!r}")
    if not isinstance(text_loss, bool):
        raise DataError(f"text_loss: expected true or false, got {text_loss!r}")
