# SPDX-License-Identifier: Apache-2.0
"""Tiny models, one per way in which real ones treat their projections."""

from __future__ import annotations

from typing import Any

import seeding
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ewclora as fe


class MLP(nn.Module):
    """Two hidden layers and a head that `get_classifier` names."""

    def __init__(self, d_in: int = 6, hidden: int = 10, classes: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_in, hidden)
        self.fc2 = nn.Linear(hidden, hidden, bias=False)
        self.head = nn.Linear(hidden, classes)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


class Attention(nn.Module):
    """Self-attention with one packed projection, q | k | v in thirds, called as a module (timm ViT)."""

    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.by_head(q), self.by_head(k), self.by_head(v)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class InterleavedAttention(Attention):
    """The rows of the packed projection are [heads][q, k, v][dim / heads] (GPT-NeoX)."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (self.heads, 3, -1)).transpose(1, 2).unbind(-2)
        return q, k, v


class BypassAttention(Attention):
    """Reads the weight of its projection and calls the layer only when `qkv_bias_separate` is set (timm
    BEiT)."""

    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__(dim, heads)
        self.qkv_bias_separate = False

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.qkv_bias_separate:
            return super().project(x)
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, dim=-1)
        return self.by_head(q), self.by_head(k), self.by_head(v)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, attention: type[Attention] = Attention) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), attention(dim)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class TinyViT(nn.Module):
    """x `[N, T, dim]` -> logits `[N, classes]`."""

    def __init__(
        self, dim: int = 8, depth: int = 2, classes: int = 3, attention: type[Attention] = Attention
    ) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv1d(dim, dim, 1)})
        self.blocks = nn.ModuleList(Block(dim, attention) for _ in range(depth))
        self.head = nn.Linear(dim, classes)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed["proj"](x.transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


THIRDS = fe.QKVLayout(("q", "k", "v"))
KV = fe.LoRAConfig(r=3, target_modules=["qkv"], slices=("k", "v"), layout=THIRDS)


def randomize_adapters_(model: nn.Module, seed: int = 0, size: float = 0.3) -> None:
    """Adapters as after some training: no zero B."""
    generator = seeding.generator(seed)
    with torch.no_grad():
        for layer in fe.adapters(model).values():
            for _, lora_a, lora_b in layer.adapter_parameters():
                for tensor in (lora_a, lora_b):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * size)


def _fp64(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).detach()


def _on_rows(layer: fe.LoRALinear, magnitude: bool) -> Tensor:
    delta = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    for adapter, lora_a, lora_b in layer.adapter_parameters():
        b, s, a = _fp64(lora_b), _fp64(layer.adapter_scale(adapter)).reshape(-1, 1), _fp64(lora_a)
        rows = torch.cat([torch.arange(start, stop) for start, stop in adapter.rows])
        delta[rows] = b.abs() @ (s.abs() * a.abs()) if magnitude else b @ (s * a)
    return delta


def explicit_delta(layer: fe.LoRALinear) -> Tensor:
    """B diag(s) A on its rows, zero elsewhere, `[out_features, in_features]` in fp64."""
    return _on_rows(layer, magnitude=False)


def weight_bound(layer: fe.LoRALinear, eps: float) -> Tensor:
    """Bound on the rounding error of W + B diag(s) A, (r + 2) eps (|W| + |B| |s| |A|), for any order of
    summation."""
    return (layer.r + 2) * eps * (_fp64(layer.weight).abs() + _on_rows(layer, magnitude=True))


def rounding_bound(layer: fe.LoRALinear, x: Tensor, eps: float) -> Tensor:
    """Bound on the rounding error of each output, n eps (|x| (|W| + |B| |s| |A|)^T + |b|), for any order of
    summation."""
    sums = layer.in_features + layer.r + 4
    magnitude = _fp64(x).abs() @ (_fp64(layer.weight).abs() + _on_rows(layer, magnitude=True)).T
    return sums * eps * (magnitude if layer.bias is None else magnitude + _fp64(layer.bias).abs())


X = torch.randn(3, 4, 8, generator=seeding.generator(0))
ALL = fe.LoRAConfig(r=2, target_modules="all-linear")


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything that a refused operation must leave as it was."""
    return {
        "classes": [(name, type(module)) for name, module in model.named_modules()],
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in ("classes", "trainable", "attributes"):
        assert before[key] == after[key]
    assert list(before["values"]) == list(after["values"])
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name


def injected(config: fe.LoRAConfig = KV, attention: type[Attention] = Attention) -> TinyViT:
    torch.manual_seed(0)
    model = TinyViT(attention=attention)
    fe.inject(model, config)
    randomize_adapters_(model)
    return model
