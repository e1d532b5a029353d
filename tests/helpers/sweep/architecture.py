# SPDX-License-Identifier: Apache-2.0
"""What an architecture of the sweep is: how to build it small, its inputs, and the loss of its task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 4
TOKENS = 8
IGNORED = -100
Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A loss, and how the library is told to find it by itself.

    loss: (output, targets) -> the losses of all samples, added. own: what the library makes of a batch
    without a loss function is `loss` ("log p"), the loss that the model returns for a single sample
    ("model"), or nothing that is defined (None).
    """

    name: str
    loss: Callable[[Any, Tensor], Tensor]
    own: str | None = "log p"


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    make: the model. inputs, targets: n samples, drawn from the default generator. shared: arguments that are
    no samples, such as the class prompts of CLIP. positional: whether the model takes its only input by
    position. mixes: how the model makes samples of a batch depend on each other, so that none has a gradient
    of its own. targets_of_adapters: what is adapted.
    """

    library: str
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    targets: Callable[[int], Tensor]
    task: Task
    shared: Mapping[str, Any] = field(default_factory=dict)
    positional: bool = False
    mixes: str = ""
    targets_of_adapters: str | Sequence[str] = "all-linear"

    def build(self, seed: int = 0) -> nn.Module:
        """In fp64 and eval mode, with parameters that all show in the output."""
        torch.manual_seed(seed)
        model = self.make().double().eval()
        randomise(model)
        return model

    def call(self, model: nn.Module, inputs: Inputs) -> Any:
        if self.positional:
            return model(*inputs.values())
        return model(**inputs, **self.shared)

    def loss(self, model: nn.Module, inputs: Inputs, targets: Tensor) -> Tensor:
        return self.task.loss(self.call(model, inputs), targets)

    def own_loss(self, model: nn.Module, inputs: Inputs, targets: Tensor) -> Tensor:
        """That of one sample without a loss function."""
        if self.task.own == "model":
            return model(**inputs, labels=targets, **self.shared).loss
        return self.loss(model, inputs, targets)

    def own_batch(self, inputs: Inputs, targets: Tensor) -> Any:
        """What a loader yields when no loss function and no forward are given."""
        return (*inputs.values(), targets) if self.positional else {**inputs, "labels": targets}


def rows(inputs: Inputs, start: int, stop: int) -> dict[str, Tensor]:
    return {name: tensor[start:stop] for name, tensor in inputs.items()}


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Matrices with rows of length 1 or so, where initialisation may be zero or tiny; noise on everything
    else."""
    for parameter in model.parameters():
        if parameter.dim() >= 2 and parameter[0].numel() > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))


def logits_of(output: Any) -> Tensor:
    output = getattr(output, "logits", output)
    return output[0] if isinstance(output, (tuple, list)) else output


def class_loss(output: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(output), targets, reduction="sum")


def token_loss(output: Any, targets: Tensor) -> Tensor:
    """Logits `[N, T, C]`, targets `[N, T]`, of which some do not count."""
    logits = logits_of(output)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def causal_loss(output: Any, targets: Tensor) -> Tensor:
    """The logits of a token predict the next one."""
    return token_loss(logits_of(output)[:, :-1], targets[:, 1:])


def span_loss(output: Any, targets: Tensor) -> Tensor:
    """Targets `[N, 2]`: the first and the last token of an answer."""
    start = F.cross_entropy(output.start_logits, targets[:, 0], reduction="sum")
    return start + F.cross_entropy(output.end_logits, targets[:, 1], reduction="sum")


def pixel_loss(output: Any, targets: Tensor) -> Tensor:
    """Logits `[N, C, H, W]`, targets `[N, H, W]` at the resolution of the logits."""
    return F.cross_entropy(logits_of(output), targets, reduction="sum")


def image_text_loss(output: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.logits_per_image, targets, reduction="sum")


def feature_loss(output: Any, targets: Tensor) -> Tensor:
    """Targets `[N]` weigh the samples: any function of the features does where a model has no head."""
    features = floats(output)[0]
    return (features.flatten(1).sin().sum(1) * (1.0 + targets)).sum()


CLASS = Task("class", class_loss)
TOKEN = Task("tokens", token_loss)
CAUSAL = Task("next token", causal_loss)
SPAN = Task("span", span_loss, own=None)
PIXELS = Task("pixels", pixel_loss, own=None)
QUERIES = Task("object queries", token_loss, own=None)
IMAGE_TEXT = Task("class prompts", image_text_loss, own=None)
FEATURES = Task("features", feature_loss, own=None)


def floats(value: Any) -> list[Tensor]:
    """Every floating-point tensor of an output, in order; caches and other objects are not outputs."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in floats(part)]
    return []


def classes(count: int = CLASSES) -> Callable[[int], Tensor]:
    return lambda n: torch.randint(0, count, (n,))


def labelled_tokens(count: int = CLASSES, length: int = TOKENS) -> Callable[[int], Tensor]:
    """Different numbers of tokens count in different samples; the second always does."""

    def make(n: int) -> Tensor:
        labels = torch.randint(0, count, (n, length))
        skipped = torch.rand(n, length) < torch.linspace(0.1, 0.7, n)[:, None]
        skipped[:, 1] = False
        return labels.masked_fill(skipped, IGNORED)

    return make


def images(
    size: int | tuple[int, int], channels: int = 3, name: str = "x"
) -> Callable[[int], dict[str, Tensor]]:
    sides = (size, size) if isinstance(size, int) else size
    return lambda n: {name: torch.randn(n, channels, *sides, dtype=torch.float64)}
