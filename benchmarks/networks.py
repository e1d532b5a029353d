# SPDX-License-Identifier: Apache-2.0
"""Networks in plain PyTorch with random weights, for whole training steps without other libraries. They take
embedded tokens, since neither patches nor vocabularies are measured, and classify the mean token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 100
ROPE_BASE = 500_000.0  # of Llama 3
HEAD = 64  # width of a head of Llama-3.2-1B


class Stack(nn.Module):
    """Blocks and a classifier of the mean token."""

    def __init__(self, blocks: list[nn.Module], width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """x `[N, T, d]` -> logits `[N, CLASSES]`, in the dtype of the head."""
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1).to(self.head.weight.dtype))


class LlamaBlock(nn.Module):
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
