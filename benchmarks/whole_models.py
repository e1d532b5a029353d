# SPDX-License-Identifier: Apache-2.0
"""Whole training steps, Fisher passes and adapted models in the presets of a CPU."""

from __future__ import annotations

from collections.abc import Iterator

from .shapes import LLAMA, RELEASE, SMALL_VIT, TINY
from .workload import SMALL, Workload
from .workloads import OF_TIMM, OF_TORCHVISION, adapted_model, fisher_pass, step


def quick() -> Iterator[Workload]:
    """A model of a few thousand parameters."""
    yield step(TINY.name, 1, 2, TINY.tokens, 4)
    yield fisher_pass(TINY, 1, 2, 2, 4)
    yield adapted_model(TINY.name + OF_TIMM, 1, 2, TINY.tokens, 4)
    yield adapted_model(TINY.name + OF_TORCHVISION, 1, 2, TINY.tokens, 4)


def cpu() -> Iterator[Workload]:
    """The whole ViT-S of timm as users adapt it; of larger models, few samples and blocks."""
    small = (SMALL_VIT.name + OF_TIMM, SMALL_VIT.depth, 16, SMALL_VIT.tokens)
    yield adapted_model(*small, 16)
    yield adapted_model("ViT-B/16" + OF_TORCHVISION, 12, 8, 197, 10)
    yield step(*small, 16, part=SMALL)
    yield step("ViT-B/16", 12, 2, 197, 10)
    yield step("ViT-L/16", 6, 2, 197, 10)
    yield step(LLAMA.name, 2, 1, 256, 16)
    yield fisher_pass(RELEASE.base, 2, 4, 2, 10)


def full() -> Iterator[Workload]:
    """Whole models."""
    for model in (RELEASE.base, RELEASE.large):
        for samples in (16, 64):
            yield step(model.name, model.depth, samples, model.tokens, 10)
        yield adapted_model(model.name + OF_TIMM, model.depth, 16, model.tokens, 16)
    yield step(LLAMA.name, LLAMA.depth, 1, LLAMA.tokens, 16)
    yield fisher_pass(RELEASE.base, 12, 16, 4, 10)
    yield fisher_pass(RELEASE.large, 24, 16, 4, 10)
