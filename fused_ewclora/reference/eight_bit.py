# SPDX-License-Identifier: Apache-2.0
"""Fishers in 8 bits, block-scaled along rows, in plain PyTorch (docs/mathematics.md, section 10).

A row of `columns` values is one row of bytes: BLOCKS of 32 codes, the last padded with zeros, then one bf16
scale per block, then zeros up to a multiple of 16 bytes. Code c of a block with scale s stands for s c^2:
levels are dense where a Fisher has most of its values, and the largest value of a block is its last level.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32  # values that share a scale
LEVELS = 255
ALIGNMENT = 16  # bytes: of rows, so that loads of whole vectors are aligned
_WORK = 1 << 20  # values that are converted at once
_MASK = 0xFFFFFFFF


def row_bytes(columns: int) -> int:
    """Bytes of a row of `columns` values."""
    blocks = -(-columns // BLOCK)
    return -(-blocks * (BLOCK + 2) // ALIGNMENT) * ALIGNMENT


def _blocks(columns: int) -> int:
    return -(-columns // BLOCK)


def _scales(largest: Tensor) -> Tensor:
    """The least bf16 scale whose last level is not below `largest` (fp32); NaN and Inf stay."""
    exact = largest / LEVELS**2
    scale = exact.to(torch.bfloat16)
    up = (scale.view(torch.int16) + 1).view(torch.bfloat16)
    scale = torch.where(scale.float() * LEVELS**2 < largest, up, scale)
    return torch.where(largest.isfinite(), scale, largest.new_full((), torch.nan).to(torch.bfloat16))


def _noise(first_row: int, shape: torch.Size, seed: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1) `[rows, columns]`, by the place of a value and the seed alone: the same in whatever
    pieces, and by whatever process, a Fisher is converted."""
    rows = torch.arange(first_row, first_row + shape[0], device=device, dtype=torch.int64)[:, None]
    columns = torch.arange(shape[1], device=device, dtype=torch.int64)
    mixed = (rows * 0x9E3779B1 + (seed & _MASK) * 0x85EBCA77) & _MASK
    mixed = _mixed(_mixed(mixed) + columns * 0xC2B2AE3D & _MASK)
    return (mixed >> 8).to(torch.float32) * 2.0**-24


def _mixed(value: Tensor) -> Tensor:
    """The finalizer of MurmurHash3 on 32 bits held in int64; the products fit."""
    value = value ^ (value >> 16)
    value = value * 0x5EBCA6B & _MASK
    value = value ^ (value >> 13)
    value = value * 0x2B2AE35 & _MASK
    return value ^ (value >> 16)


@torch.no_grad()
def encode(fisher: Tensor, seed: int | None = None, first_row: int = 0) -> Tensor:
    """Codes uint8 `[rows, row_bytes(columns)]` of a Fisher `[rows, columns]`, values >= 0.

    seed: rounds at random between the two levels beside a value, so that its expectation is the value (no
    drift when Fishers are added task after task); None rounds to the nearer level. first_row is the place of
    these rows in the whole Fisher, on which the random numbers depend. Blocks with NaN or Inf become NaN.
    """
    rows, columns = fisher.shape
    blocks = _blocks(columns)
    out = torch.zeros(rows, row_bytes(columns), dtype=torch.uint8, device=fisher.device)
    step = max(_WORK // max(columns, 1), 1)
    for start in range(0, rows if columns else 0, step):
        part = fisher[start : start + step].to(torch.float32)
        padded = torch.nn.functional.pad(part, (0, blocks * BLOCK - columns)).unflatten(1, (blocks, BLOCK))
        scale = _scales(padded.amax(-1))
        units = padded / scale.float().unsqueeze(-1)  # 0 / 0 where a block is 0
        units = units.nan_to_num_(0.0, 0.0, 0.0).flatten(1)
        code = units.sqrt().floor_().clamp_(max=LEVELS)
        above = units - code.square()
        if seed is None:
            share = code + 0.5  # to the next level: (c + 1)^2 - c^2 = 2 c + 1
        else:
            share = _noise(first_row + start, units.shape, seed, fisher.device).mul_(2.0 * code + 1.0)
        code = (code + (above > share)).clamp_(max=LEVELS)
        out[start : start + step, : blocks * BLOCK] = code.to(torch.uint8)
        out[start : start + step, blocks * BLOCK : blocks * (BLOCK + 2)] = scale.view(torch.uint8)
    return out


@torch.no_grad()
def decode(codes: Tensor, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The Fisher `[rows, columns]` that `encode` wrote."""
    if not codes.numel():
        return codes.new_zeros(codes.shape[0], columns, dtype=dtype)
    blocks = _blocks(columns)
    values = codes[:, : blocks * BLOCK].to(torch.float32).square_().unflatten(1, (blocks, BLOCK))
    return values.mul_(scales(codes).float().unsqueeze(-1)).flatten(1)[:, :columns].to(dtype)


def scales(codes: Tensor) -> Tensor:
    """The bf16 scales `[rows, blocks]` of codes."""
    blocks = codes.shape[1] // (BLOCK + 2)  # the padding of a row is shorter than a block
    return codes[:, blocks * BLOCK : blocks * (BLOCK + 2)].contiguous().view(torch.bfloat16)
