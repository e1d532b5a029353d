# SPDX-License-Identifier: Apache-2.0
"""Models for whole training steps, and the ways to adapt them: frozen, by this library, by PEFT, or with
explicit deltaW as published. All ways share the frozen weights of one base model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.demo.explicit import replace_with_explicit_
from fused_ewclora.demo.vit import Block, key_value_config
from fused_ewclora.layers.inject import adapters
from fused_ewclora.layers.slices import fisher_key

from . import extras
from .ewc_penalty import EWC_LAMBDA
from .networks import CLASSES, LlamaBlock, Stack
from .shapes import Model, TextModel

T = TypeVar("T")


@dataclass(frozen=True)
class Subject:
    """A frozen model whose `head` trains, where adapters go, and one batch."""

    model: nn.Module
    config: fe.LoRAConfig
    x: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Adapted:
    """A model and its adapters, A and B of each in turn."""

    model: Any
    pairs: list[Tensor]

    @property
    def lora_as(self) -> list[Tensor]:
        return self.pairs[0::2]

    @property
    def lora_bs(self) -> list[Tensor]:
        return self.pairs[1::2]

    def leaves(self) -> list[Tensor]:
        """All trained parameters: the adapters and the head."""
        return [*self.pairs, *head_of(self.model).parameters()]


def head_of(model: Any) -> nn.Module:
    """The classifier of a model; torchvision has another name for it."""
    head: nn.Module = model.heads if hasattr(model, "heads") else model.head
    return head


def vision(
    model: Model, blocks: int, samples: int, tokens: int, rank: int, device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Subject:  # fmt: skip
    """A vision transformer of plain PyTorch, adapters on k and v."""
    with torch.device(device):
        base = Stack([Block(model.width, model.heads, model.mlp_width) for _ in range(blocks)], model.width)
        x = torch.randn(samples, tokens, model.width)
    return _subject(base, key_value_config(model.width, rank), x, dtype)


def text(
    model: TextModel, blocks: int, samples: int, tokens: int, rank: int, device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Subject:  # fmt: skip
    """Blocks with the linears of Llama, adapters on q and v."""
    width = model.layers["q"][0]
    with torch.device(device):
        base = Stack([LlamaBlock(model.layers) for _ in range(blocks)], width)
        x = torch.randn(samples, tokens, width)
    return _subject(base, fe.LoRAConfig(r=rank, target_modules=["q_proj", "v_proj"]), x, dtype)


def of_timm(
    model: Model, blocks: int, samples: int, tokens: int, rank: int, device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Subject:  # fmt: skip
    """timm's vision transformer of these sizes on images, adapters on all of qkv, which PEFT has too; raises
    `Unavailable` without timm."""
    timm = extras.load("timm")
    patch = int(model.name.partition("/")[2] or 4)
    image = patch * round((tokens - 1) ** 0.5)  # patches per side, beside the class token
    with torch.device(device):
        base = timm.models.VisionTransformer(
            img_size=image, patch_size=patch, embed_dim=model.width, depth=blocks, num_heads=model.heads,
            num_classes=CLASSES, mlp_ratio=model.mlp_width / model.width,
        )  # fmt: skip
        x = torch.randn(samples, 3, image, image)
    return _subject(base, fe.LoRAConfig(r=rank, target_modules=["qkv"]), x, dtype)


def of_torchvision(
    model: Model, blocks: int, samples: int, tokens: int, rank: int, device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Subject:  # fmt: skip
    """torchvision's vision transformer of these sizes on images, adapters on k and v of its attentions;
    raises `Unavailable` without torchvision."""
    torchvision = extras.load("torchvision")
    patch = int(model.name.partition("/")[2] or 4)
    image = patch * round((tokens - 1) ** 0.5)
    with torch.device(device):
        base = torchvision.models.VisionTransformer(
            image, patch, blocks, model.heads, model.width, model.mlp_width, num_classes=CLASSES
        )
        x = torch.randn(samples, 3, image, image)
    base.heads.head.reset_parameters()  # torchvision's are 0, below which nothing has a gradient
    return _subject(
        base, fe.LoRAConfig(r=rank, target_modules=["self_attention"], slices=("k", "v")), x, dtype
    )


def _subject(base: Any, config: fe.LoRAConfig, x: Tensor, dtype: torch.dtype) -> Subject:
    base.requires_grad_(False).to(dtype)
    head_of(base).requires_grad_(True).float()
    return Subject(base, config, x.to(dtype), torch.randint(0, CLASSES, (len(x),), device=x.device))


def sharing(model: nn.Module) -> Any:
    """A copy of the modules with the frozen parameters of the original, and its own trained ones."""
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, frozen)


def in_fp64(model: nn.Module, held: T) -> tuple[nn.Module, T]:
    """An fp64 copy of a model that shares nothing with it, and a copy of `held`, which refers to parameters
    of the model."""
    model, held = copy.deepcopy((model, held))
    return model.double(), held


def _pairs(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Fisher key, A and B of every adapter."""
    for name, layer in adapters(model).items():
        for piece, a, b in layer.adapter_parameters():
            yield fisher_key(name, piece), a, b


def adapted(subject: Subject, std: float = 0.02) -> Adapted:
    """The model with adapters of this library, B random: with the initial B = 0, A has no gradient."""
    model = sharing(subject.model)
    fe.inject(model, subject.config)
    head_of(model).requires_grad_(True)
    pairs = [t for _, a, b in _pairs(model) for t in (a, b)]
    with torch.no_grad():
        for b in pairs[1::2]:
            b.normal_(std=std)
    return Adapted(model, pairs)


def protected(model: nn.Module, fishers: Sequence[Tensor]) -> fe.EWC:
    """The controller with these Fishers of an earlier task, one per adapter."""
    ewc = fe.EWC(model, ewc_lambda=EWC_LAMBDA)
    saved = ewc.state_dict()
    keys = [key for key, _, _ in _pairs(model)]
    saved["tensors"] = {f"fisher.{key}": fisher for key, fisher in zip(keys, fishers, strict=True)}
    saved["config"]["history"] = [{"labels": "empirical", "samples": 1, "batch_size": 1, "gamma": 1.0}]
    ewc.load_state_dict(saved)
    return ewc


def by_peft(subject: Subject, like: Adapted) -> Adapted:
    """The model with PEFT's adapters of the values of `like`; raises `Unavailable` without PEFT."""
    peft, rank = extras.load("peft"), subject.config.r
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(subject.config.target_modules), lora_dropout=0.0
    )
    wrapped = peft.get_peft_model(sharing(subject.model), config)
    wrapped.head.requires_grad_(True)
    pairs = [p for name, p in wrapped.named_parameters() if "lora_" in name]
    with torch.no_grad():
        for mine, theirs in zip(pairs, like.pairs, strict=True):
            mine.copy_(theirs)
    return Adapted(wrapped, pairs)


def explicit(subject: Subject, like: Adapted) -> Adapted:
    """The model with `ExplicitDelta` where `like` has adapters, of the same values."""
    model = sharing(subject.model)
    layers = replace_with_explicit_(model, adapters(like.model))
    return Adapted(model, [factor for layer in layers for factor in layer.pairs])
