# SPDX-License-Identifier: Apache-2.0
"""X-TAIL and MTIL: image sets of different domains, one per task, learned and classified by CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fused_ewclora.demo.formats import DataError

from . import clip_models, domains, image_transforms
from .clip_learner import ImageText, check_options
from .images import Images
from .stream import Problem, Stream, Task


def load(
    root: Path,
    seed: int,
    device: str,
    *,
    datasets: str | Sequence[str] = "x-tail",
    shots: int | None = 16,
    rivals: str = "all",
    text_loss: bool = True,
    library: str = "open_clip",
    model: str = "ViT-B-16-quickgelu",
    pretrained: bool | str = "openai",
    spaces: bool = False,
    crop_scale: Sequence[float] = (0.9, 1.0),
    flip: bool = False,
    interpolation: str = "bicubic",
) -> Problem:
    """A task for each of the image sets in `root`, whose files `domains` describes, with all its classes.

    datasets: one of `domains.ORDERS` ("x-tail", "mtil-1", "mtil-2") or names of `domains.DOMAINS` in the
    order in which they are learned. shots: training images of every class, drawn with the seed; None: all.
    rivals, text_loss: see `ImageText`; library, model, pretrained: see `clip_models.make`. spaces:
    underscores in names of classes become spaces. crop_scale and flip are for training images, interpolation
    for test images as well. Classes are named "<image set>: <class>". Raises `DataError`.

        >>> load(root, 8, "cuda", datasets="x-tail", shots=16)
    """
    check_options(rivals, text_loss)
    names = _names(datasets)
    if shots is not None and (isinstance(shots, bool) or not isinstance(shots, int) or shots < 1):
        raise DataError(f"shots: expected an integer >= 1 or null, got {shots!r}")
    for name, value in (("spaces", spaces), ("flip", flip)):
        if not isinstance(value, bool):
            raise DataError(f"{name}: expected true or false, got {value!r}")
    collections = {name: domains.read(name, root) for name in names}
    made = clip_models.make(root, library, model, pretrained, seed)
    train = image_transforms.training(made.image_size, crop_scale, made.statistics, flip, interpolation)
    test = image_transforms.testing(made.image_size, 1.0, interpolation, made.statistics)
    tasks, texts = [], {}
    for name, collection in collections.items():
        classes = [c.replace("_", " ") if spaces else c for c in collection.classes]
        named = {f"{name}: {c}": domains.DOMAINS[name].text(c) for c in classes}
        texts |= named
        examples = collection.train if shots is None else domains.few(collection.train, shots, seed)
        tasks.append(Task(tuple(named), Images(examples, train), Images(collection.test, test)))
    prompts = dict(zip(texts, made.tokenize(list(texts.values())), strict=True))
    facts = {
        "description": f"{len(names)} image sets, {len(texts)} classes; {library} {model}",
        "templates": {name: domains.DOMAINS[name].text("{}") for name in names},
        "weights": pretrained if isinstance(pretrained, str) else (library if pretrained else "random"),
        "parameters": sum(p.numel() for p in made.towers.parameters()),
    }
    title = datasets if isinstance(datasets, str) else ", ".join(names)
    return Problem(
        Stream(title, tuple(tasks)), made.towers.to(device), facts, learner_of(prompts, rivals, text_loss)
    )


def learner_of(prompts: dict[str, Tensor], rivals: str, text_loss: bool) -> Any:
    """What makes the learner of a run from its copy of the towers."""

    def learner(backbone: nn.Module) -> ImageText:
        return ImageText(backbone, prompts, rivals, text_loss)  # type: ignore[arg-type]

    return learner


def _names(datasets: Any) -> tuple[str, ...]:
    if isinstance(datasets, str):
        if datasets not in domains.ORDERS:
            raise DataError(
                f"datasets: expected one of {', '.join(domains.ORDERS)} or a list of names, got {datasets!r}"
            )
        return domains.ORDERS[datasets]
    if not isinstance(datasets, Sequence) or not datasets:
        raise DataError(f"datasets: expected a list of names, got {datasets!r}")
    names = tuple(map(domains.check, datasets))
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"datasets: expected {twice[0]} once, got it {names.count(twice[0])} times")
    return names
