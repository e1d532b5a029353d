# SPDX-License-Identifier: Apache-2.0
"""A small vision transformer with timm-like packed `qkv` projections and one linear head per task."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ewclora as fe

INIT_STD = 0.02  # standard deviation of the truncated normal for tokens and positions, as in ViT and BERT


class Attention(nn.Module):
    """Self-attention on `[N, T, d]`; `qkv` is one `nn.Linear(d, 3 d)`, called as a module, rows q | k | v."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(n, t, d))


class Block(nn.Module):
    """Pre-norm transformer block: attention and a two-layer GELU network, each with a residual connection."""

    def __init__(self, dim: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Maps images `[N, C, S, S]` to the normalised class token `[N, dim]`."""

    def __init__(
        self, image_size: int, patch_size: int, channels: int, dim: int, depth: int, num_heads: int
    ) -> None:
        super().__init__()
        if image_size % patch_size or dim % num_heads:
            raise ValueError(
                f"patch_size must divide image_size and num_heads must divide dim, "
                f"got {patch_size} / {image_size} and {num_heads} / {dim}"
            )
        tokens = (image_size // patch_size) ** 2 + 1
        self.dim = dim
        self.patch_embed = nn.Conv2d(channels, dim, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads, 2 * dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        nn.init.trunc_normal_(self.cls_token, std=INIT_STD)
        nn.init.trunc_normal_(self.pos_embed, std=INIT_STD)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])


class Classifier(nn.Module):
    """A backbone with one head per task: trained one at a time, evaluated with all of them side by side."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList()

    def add_head(self, classes: int) -> nn.Linear:
        """Append a head for a new task and freeze the heads of the earlier ones."""
        self.heads.requires_grad_(False)
        head = nn.Linear(self.backbone.dim, classes)
        self.heads.append(head)
        return head

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the newest head, `[N, classes of the newest task]`."""
        return self.heads[-1](self.backbone(images))

    def all_logits(self, images: Tensor) -> Tensor:
        """Logits of all heads side by side, `[N, classes seen so far]`, in task order."""
        features = self.backbone(images)
        return torch.cat([head(features) for head in self.heads], dim=1)


def key_value_config(dim: int, rank: int) -> fe.LoRAConfig:
    """Adapters on the k and v rows of every packed qkv projection of width dim."""
    layout = fe.QKVLayout(("q", "k", "v"), (dim,) * 3)
    return fe.LoRAConfig(r=rank, target_modules=["qkv"], slices=("k", "v"), layout=layout)
