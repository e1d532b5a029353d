# SPDX-License-Identifier: Apache-2.0
"""Counter-based dropout mask: Philox4x32-10 (Salmon et al., SC'11) on PyTorch integers (docs/mathematics.md,
section 11).

Element (row m, column j) of a mask uses word `j % 4` of the block with counter
`(j // 4, m mod 2^32, m div 2^32, 0)` and key `(seed mod 2^32, seed div 2^32)`. Every backend uses this map,
so a mask depends on the seed and on nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox_words(seed: Tensor, rows: int, blocks: int) -> Tensor:
    """Random words `[rows, 4 * blocks]` (int64 holding uint32) of the counter block
    `[0, rows) x [0, blocks)`."""
    device = seed.device
    row = torch.arange(rows, dtype=torch.int64, device=device)[:, None].expand(rows, blocks)
    block = torch.arange(blocks, dtype=torch.int64, device=device)[None, :].expand(rows, blocks)
    c0, c1, c2, c3 = block, row & WORD, row >> 32, torch.zeros_like(row)
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        # int64 products wrap, but their 64 bits are those of the unsigned product; >> is arithmetic, hence
        # the mask.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return torch.stack((c0, c1, c2, c3), dim=-1).reshape(rows, 4 * blocks)


def drop_threshold(p: float) -> int:
    """Words below this are dropped."""
    return min(round(p * 2.0**32), WORD)


def inverse_keep(p: float) -> float:
    """Factor on kept elements; p = 1 drops everything, as `torch.nn.functional.dropout` does."""
    return 0.0 if p >= 1.0 else 1.0 / (1.0 - p)


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Boolean mask `[rows, columns]`, true where the element is kept (probability 1 - p)."""
    return philox_words(seed, rows, -(-columns // 4))[:, :columns] >= drop_threshold(p)


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """`x` `[M, d]` with inverted dropout from `seed`; `x` itself when p = 0."""
    if p == 0.0 or seed is None:
        return x
    return torch.where(keep_mask(seed, x.shape[0], x.shape[1], p), x * inverse_keep(p), x.new_zeros(()))
