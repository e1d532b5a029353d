"""A vision transformer of plain PyTorch functions over frozen bf16 weights, for one training step; how k and
v of each block are adapted is a parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shapes import Model

CLASSES = 100
# (x, W of qkv, bias, A and B of k, A and B of v) -> qkv
Projection = Callable[..., Tensor]


@dataclass
class Block:
    """Frozen weights of one block."""

    norm1: tuple[Tensor, Tensor]
    qkv: tuple[Tensor, Tensor]
    proj: tuple[Tensor, Tensor]
    norm2: tuple[Tensor, Tensor]
    fc1: tuple[Tensor, Tensor]
    fc2: tuple[Tensor, Tensor]

    def forward(self, x: Tensor, heads: int, project: Projection, adapters: list[Tensor]) -> Tensor:
        n, t, d = x.shape
        width = (d,)
        packed = project(F.layer_norm(x, width, *self.norm1), *self.qkv, *adapters)
        q, k, v = packed.view(n, t, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d)
        x = x + F.linear(mixed, *self.proj)
        hidden = F.gelu(F.linear(F.layer_norm(x, width, *self.norm2), *self.fc1))
        return x + F.linear(hidden, *self.fc2)

    def to(self, dtype: torch.dtype) -> Block:
        return Block(*((w.to(dtype), b.to(dtype)) for w, b in vars(self).values()))


@dataclass
class Stack:
    """Blocks of frozen weights, and what trains: adapters of k and v per block (A_k, B_k, A_v, B_v) and a
    head."""

    model: Model
    blocks: list[Block]
    adapters: list[list[Tensor]]
    head: Tensor

    def parameters(self, adapted: bool = True) -> list[Tensor]:
        return [*(t for group in self.adapters for t in group if adapted), self.head]

    def loss(self, x: Tensor, labels: Tensor, project: Projection) -> Tensor:
        """Cross entropy of the mean token, in fp32 (fp64 for fp64)."""
        for block, adapters in zip(self.blocks, self.adapters, strict=True):
            x = block.forward(x, self.model.heads, project, adapters)
        pooled = x.mean(1).to(self.head.dtype)
        return F.cross_entropy(F.linear(pooled, self.head), labels)

    def factors(self) -> tuple[list[Tensor], list[Tensor]]:
        """All A and all B, as the penalty takes them."""
        pairs = [(a, b) for group in self.adapters for a, b in zip(group[0::2], group[1::2], strict=True)]
        return [a for a, _ in pairs], [b for _, b in pairs]

    def copy(self, frozen: torch.dtype, trained: torch.dtype) -> Stack:
        """The same values; fresh leaves for what trains."""
        adapters = [[leaf(t.detach().to(trained, copy=True)) for t in group] for group in self.adapters]
        blocks = self.blocks if frozen == torch.bfloat16 else [b.to(frozen) for b in self.blocks]
        return Stack(self.model, blocks, adapters, leaf(self.head.detach().to(trained, copy=True)))


def leaf(tensor: Tensor) -> Tensor:
    return tensor.requires_grad_()


def random_stack(model: Model, rank: int, device: str) -> Stack:
    """Random weights of the usual sizes, bf16 frozen, fp32 trained."""

    def normal(*size: int, std: float) -> Tensor:
        return torch.randn(size, device=device) * std

    def linear(d_in: int, d_out: int) -> tuple[Tensor, Tensor]:
        return normal(d_out, d_in, std=d_in**-0.5).bfloat16(), normal(d_out, std=0.02).bfloat16()

    def norm(d: int) -> tuple[Tensor, Tensor]:
        return torch.ones(d, device=device).bfloat16(), torch.zeros(d, device=device).bfloat16()

    d, sizes = model.width, model.linears()
    blocks = [
        Block(norm(d), linear(*sizes["qkv"]), linear(*sizes["proj"]), norm(d),
              linear(*sizes["fc1"]), linear(*sizes["fc2"]))
        for _ in range(model.depth)
    ]  # fmt: skip
    adapters = [
        [
            leaf(normal(*size, std=std))
            for _ in "kv"
            for size, std in (((rank, d), d**-0.5), ((d, rank), 0.02))
        ]
        for _ in range(model.depth)
    ]
    return Stack(model, blocks, adapters, leaf(normal(CLASSES, d, std=d**-0.5)))
