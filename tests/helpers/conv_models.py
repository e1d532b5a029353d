# SPDX-License-Identifier: Apache-2.0
"""A small model of convolutions of every kind, and the same with dense weights."""

from __future__ import annotations

import copy

import seeding
import torch
import torch.nn.functional as F
from models import randomize_adapters_
from torch import Tensor, nn

import fused_ewclora as fe

NAMES = ("stem", "shared", "point", "strided", "same", "line")
CLASSES = 5


class Convs(nn.Module):
    """x `[N, 3, 12, 12]` -> logits `[N, 5]`: a patch embedding, a layer that runs twice, windows with
    strides, dilation and padding, and a convolution over a sequence."""

    def __init__(self, padding_mode: str = "zeros") -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 2, 2)
        self.shared = nn.Conv2d(6, 6, 3, padding=1, padding_mode=padding_mode, bias=False)
        self.point = nn.Conv2d(6, 8, 1)
        self.strided = nn.Conv2d(8, 7, (3, 2), stride=(2, 1), padding="valid", dilation=(1, 2))
        self.same = nn.Conv2d(7, 6, (2, 3), padding="same")
        self.line = nn.Conv1d(6, 4, 3, padding=1, padding_mode=padding_mode)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = torch.tanh(self.shared(torch.tanh(self.shared(x))))
        x = torch.tanh(self.strided(torch.tanh(self.point(x))))
        return self.head(torch.tanh(self.line(torch.tanh(self.same(x)).flatten(2))).mean(2))


def plain(padding_mode: str = "zeros", dtype: torch.dtype = torch.float64) -> Convs:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return Convs(padding_mode).to(dtype)


def adapted(model: nn.Module | None = None, names=NAMES, r: int = 2, **options) -> nn.Module:
    """`model`, with adapters that are not zero."""
    model = plain() if model is None else model
    fe.inject(model, fe.LoRAConfig(r=r, target_modules=list(names), **options))
    randomize_adapters_(model)
    return model


@torch.no_grad()
def dense(model: nn.Module) -> nn.Module:
    """A plain copy with W + B diag(s) A as its weights."""
    other = copy.deepcopy(model)
    deltas = {}
    for name, layer in fe.adapters(other).items():
        ((_, a, b),) = layer.adapter_parameters()
        deltas[name] = (b * layer.adapter_scale(layer.adapter_slices[0]) @ a).reshape(layer.weight.shape)
    fe.eject(other, merge=False)
    for name, delta in deltas.items():
        other.get_submodule(name).weight += delta
    return other


def images(samples: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = seeding.generator(seed)
    x = torch.randn(samples, 3, 12, 12, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(CLASSES, (samples,), generator=generator)


def dense_squares(model: nn.Module, batches, mode: str = "sample") -> dict[str, Tensor]:
    """The Fisher of the dense copy by autograd: of single samples, or of batches times their sizes."""
    other, names = dense(model), list(fe.adapters(model))
    weights = [other.get_submodule(name).weight.requires_grad_() for name in names]
    totals = [torch.zeros_like(weight).flatten(1) for weight in weights]
    count = sum(len(x) for x, _ in batches)
    for x, y in batches:
        parts = [(x, y)] if mode == "batch" else list(zip(x.split(1), y.split(1), strict=True))
        for part, labels in parts:
            grads = torch.autograd.grad(F.cross_entropy(other(part), labels), weights)
            for total, grad in zip(totals, grads, strict=True):
                total += len(part) * grad.flatten(1).square() / count
    return dict(zip(names, totals, strict=True))
