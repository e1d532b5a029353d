"""Models with random weights for whole training steps, and the ways to adapt them: frozen, by this library,
or with explicit deltaW as published. All ways share the frozen weights of one base model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.inject import adapters

from . import extras
from .shapes import Model, TextModel

T = TypeVar("T")
CLASSES = 100
ROPE_BASE = 500_000.0  # of Llama 3
HEAD = 64  # width of a head of Llama-3.2-1B


class Block(nn.Module):
    """A block of Llama: RMSNorm, attention with grouped queries and rotary positions, RMSNorm, SwiGLU."""

    def __init__(self, sizes: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        width = sizes["q"][0]
        self.norm1, self.norm2 = (nn.RMSNorm(width, eps=1e-5) for _ in range(2))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.gate_proj, self.up_proj, self.down_proj = (
            nn.Linear(*sizes[name], bias=False) for name in ("q", "k", "v", "o", "gate", "up", "down")
        )

    def forward(self, x: Tensor) -> Tensor:
        """x `[N, T, d]` -> `[N, T, d]`."""
        h = self.norm1(x)
        q, k, v = (
            p(h).unflatten(-1, (-1, HEAD)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(-2))
        h = self.norm2(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


def rotated(x: Tensor) -> Tensor:
    """Rotary positions on `[N, heads, T, HEAD]`."""
    half = x.shape[-1] // 2
    rates = ROPE_BASE ** (-torch.arange(half, device=x.device, dtype=x.dtype) / half)
    angles = torch.outer(torch.arange(x.shape[-2], device=x.device, dtype=x.dtype), rates)
    cos, sin = angles.cos(), angles.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Llama(nn.Module):
    """Blocks and a classifier of the mean token; the input is embedded, since no vocabulary is measured."""

    def __init__(self, sizes: dict[str, tuple[int, int]], blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(blocks))
        self.head = nn.Linear(sizes["q"][0], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """x `[N, T, d]` -> logits `[N, CLASSES]`."""
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


@dataclass(frozen=True)
class Subject:
    """A frozen model whose `head` trains, where adapters go, and one batch."""

    model: nn.Module
    config: fe.LoRAConfig
    x: Tensor
    labels: Tensor


def vision(model: Model, blocks: int, samples: int, rank: int, image: int, patch: int) -> Subject:
    """timm's vision transformer of these sizes, adapters on k and v; raises `Unavailable` without timm."""
    timm = extras.load("timm")
    base = timm.models.VisionTransformer(
        img_size=image, patch_size=patch, embed_dim=model.width, depth=blocks, num_heads=model.heads,
        num_classes=CLASSES, mlp_ratio=(model.hidden or 4 * model.width) / model.width,
    )  # fmt: skip
    layout = fe.QKVLayout(segments=("q", "k", "v"))
    config = fe.LoRAConfig(r=rank, target_modules=["qkv"], slices=("k", "v"), layout=layout)
    return _subject(base, config, torch.randn(samples, 3, image, image))


def text(model: TextModel, blocks: int, samples: int, tokens: int, rank: int) -> Subject:
    """Blocks with the linears of Llama, adapters on q and v."""
    base = Llama(model.layers, blocks)
    config = fe.LoRAConfig(r=rank, target_modules=["q_proj", "v_proj"])
    return _subject(base, config, torch.randn(samples, tokens, model.layers["q"][0]))


def _subject(base: nn.Module, config: fe.LoRAConfig, x: Tensor) -> Subject:
    base.requires_grad_(False)
    base.head.requires_grad_(True)
    return Subject(base, config, x, torch.randint(0, CLASSES, (len(x),)))


def sharing(model: nn.Module) -> nn.Module:
    """A copy of the modules with the frozen parameters of the original, and its own trained ones."""
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, frozen)


def in_fp64(model: nn.Module, held: T) -> tuple[nn.Module, T]:
    """A copy of a model in fp64 that shares nothing, and `held`, which refers to its parameters, along with
    it."""
    model, held = copy.deepcopy((model, held))
    return model.double(), held


@dataclass(frozen=True)
class Factors:
    """All adapters of a model, one entry each."""

    lora_as: list[Tensor]
    lora_bs: list[Tensor]

    def pairs(self) -> list[Tensor]:
        """A, B, A, B, ..."""
        return [t for pair in zip(self.lora_as, self.lora_bs, strict=True) for t in pair]


def adapted(subject: Subject, std: float = 0.02) -> tuple[nn.Module, Factors]:
    """The model with adapters of this library, B random: at zero, where it starts, A has no gradient."""
    model = sharing(subject.model)
    fe.inject(model, subject.config)
    model.head.requires_grad_(True)
    pairs = [(a, b) for layer in adapters(model).values() for _, a, b in layer.adapter_parameters()]
    with torch.no_grad():
        for _, b in pairs:
            b.normal_(std=std)
    return model, Factors([a for a, _ in pairs], [b for _, b in pairs])


class ExplicitDelta(nn.Module):
    """A frozen linear with adapters as published: deltaW = B A is formed, and x multiplied by it."""

    def __init__(self, linear: nn.Linear, rows: Sequence[tuple[int, int]], pairs: Sequence[Tensor]) -> None:
        super().__init__()
        self.linear, self.rows = linear, rows
        self.pairs = nn.ParameterList(pairs)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in_features]` -> `[..., out_features]`."""
        y = self.linear(x)
        deltas = [b @ a for a, b in zip(self.pairs[0::2], self.pairs[1::2], strict=True)]
        if len(deltas[0]) == y.shape[-1]:
            return y + F.linear(x, deltas[0])
        parts, done = [], 0
        for (start, end), delta in zip(self.rows, deltas, strict=True):
            parts += [y[..., done:start], y[..., start:end] + F.linear(x, delta)]
            done = end
        return torch.cat([*parts, y[..., done:]], dim=-1)


def explicit(subject: Subject, like: nn.Module) -> tuple[nn.Module, Factors]:
    """The model with `ExplicitDelta` where `like` has adapters, of the same values."""
    model, factors = sharing(subject.model), Factors([], [])
    for name, layer in adapters(like).items():
        found = layer.adapter_parameters()
        pairs = [nn.Parameter(t.detach().clone()) for _, a, b in found for t in (a, b)]
        rows = [s.rows[0] for s, _, _ in found]
        parent, _, last = name.rpartition(".")
        linear = cast(nn.Linear, model.get_submodule(name))
        setattr(model.get_submodule(parent), last, ExplicitDelta(linear, rows, pairs))
        factors.lora_as.extend(pairs[0::2])
        factors.lora_bs.extend(pairs[1::2])
    return model, factors
