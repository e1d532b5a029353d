# SPDX-License-Identifier: Apache-2.0
"""Host of the Fisher kernels: which kernel, how many splits, descriptors or pointers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ewclora.kernels import fisher_accumulate as kernels

from ...reference import arguments
from . import kept, launch, tables
from .launch import cdiv

# Grids of fewer tiles than multiprocessors are multiplied by splitting the samples. TURN is what a split
# costs at F, reading and writing a tile, as the products of that many tokens (modelled for an H200).
TURN = 256
MAX_SPLITS = 32
MAX_STRIDE = 1 << 22  # times the 128 rows of a tile stays below 2^31


def fisher_accumulate_(
    fisher: Tensor, x: Tensor, dy: Tensor, squares: str, weight: float, cu_seqlens: Tensor | None
) -> None:
    """F += weight * sum_n (dy_n^T x_n)^2 or, for `squares` "batch", weight * (sum_n dy_n^T x_n)^2, in place;
    no temporaries but the G of "batch"."""
    arguments.fisher_accumulate(fisher, x, dy, squares, cu_seqlens)
    if 0 in (x.numel(), dy.numel()) or (cu_seqlens is not None and cu_seqlens.numel() < 2):
        return
    if squares == "batch":
        _batch(fisher, x, dy, weight)
    elif cu_seqlens is None and (x.dim() == 2 or x.shape[1] == 1):
        x, dy = (addressable(t if t.dim() == 2 else t[:, 0]) for t in (x, dy))
        _single_tokens(fisher, x, dy, weight)
    else:
        _samples(fisher, addressable(x), addressable(dy), weight, cu_seqlens)


class SampleLaunch(NamedTuple):
    """How a kernel reads the tokens of samples."""

    config: dict[str, Any]
    precision: str
    sources: list[Any]  # x and dy, by tensor descriptor or by pointer
    cu_seqlens: Tensor | None
    samples: int
    tokens: int  # of a sample, on average
    strides: tuple[int, ...]


def sample_launch(
    kernel: str, x: Tensor, dy: Tensor, cu_seqlens: Tensor | None, wide: bool = True
) -> SampleLaunch:
    """For `kernel`, made of `squares_of_samples`; `wide`: whether vectors can address what else it reads."""
    precision = _precision() if x.dtype == torch.float32 else "ieee"  # 16-bit products are exact
    arch = launch.arch(x)
    config = dict(tables.lookup(_variant(kernel, precision), arch, x.dtype))
    shapes = [(1, config["BLOCK_T"], config[name]) for name in ("BLOCK_N", "BLOCK_M")]
    tma = config["TMA"] and cu_seqlens is None
    tma = tma and all(launch.tileable(t, shape) for t, shape in zip((x, dy), shapes, strict=True))
    if not (wide and (tma or launch.wide(x, dy))):
        tma = False
        config = dict(tables.lookup(f"{kernel}:odd", arch, x.dtype))
    strides: tuple[int, ...] = (*x.stride(), *dy.stride())
    samples, tokens = x.shape[:2]
    if cu_seqlens is not None:
        samples, cu_seqlens = cu_seqlens.numel() - 1, cu_seqlens.contiguous()
        tokens, strides = cdiv(x.shape[0], samples), (0, *x.stride(), 0, *dy.stride())
    sources = [launch.tiles(t, shape) if tma else t for t, shape in zip((x, dy), shapes, strict=True)]
    return SampleLaunch({**config, "TMA": tma}, precision, sources, cu_seqlens, samples, tokens, strides)


def _samples(fisher: Tensor, x: Tensor, dy: Tensor, weight: float, cu_seqlens: Tensor | None) -> None:
    chosen = sample_launch("fisher_sample_kernel", x, dy, cu_seqlens, 1 in fisher.stride())
    config, tokens = chosen.config, chosen.tokens
    tiles, splits, locks = _grid(
        fisher, config, chosen.samples, cdiv(tokens, config["BLOCK_T"]) * config["BLOCK_T"]
    )
    launch.launch(
        kernels.fisher_sample_kernel, (tiles * splits,), fisher, *chosen.sources, chosen.cu_seqlens, locks,
        chosen.samples, tokens, splits, *fisher.shape, weight, *fisher.stride(), *chosen.strides,
        PRECISION=chosen.precision, **config,
    )  # fmt: skip


def _single_tokens(fisher: Tensor, x: Tensor, dy: Tensor, weight: float) -> None:
    precision = _precision()
    if x.dtype != torch.float32 and precision == "tf32":
        precision = "tf32x3"  # squares of 16-bit numbers have up to 22 bits
    kernel = "fisher_token_kernel"
    wide = 1 in fisher.stride() and launch.wide(x, dy)
    name = _variant(kernel, precision) if wide else f"{kernel}:odd"
    config = tables.lookup(name, launch.arch(x), x.dtype)
    tiles, splits, locks = _grid(fisher, config, x.shape[0], 1)
    launch.launch(
        kernels.fisher_token_kernel, (tiles * splits,), fisher, x, dy, locks,
        x.shape[0], splits, *fisher.shape, weight, *fisher.stride(), *x.stride(), *dy.stride(),
        PRECISION=precision, **config,
    )  # fmt: skip


def _batch(fisher: Tensor, x: Tensor, dy: Tensor, weight: float) -> None:
    """G = sum_n dy_n^T x_n by BLAS, in fp32, then one pass over F: squares do not add up over splits, and
    BLAS fills the device whatever the shape."""
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    if x.dtype == torch.float32:
        gradient = torch.mm(dy.T, x)
    elif x.is_cuda:
        gradient = torch.mm(dy.T, x, out_dtype=torch.float32)
    else:
        gradient = torch.mm(dy.T.float(), x.float())
    config = tables.lookup("fisher_square_kernel", launch.arch(x), fisher.dtype)
    launch.launch(
        kernels.fisher_square_kernel, (_tiles(fisher, config),), fisher, gradient,
        *fisher.shape, weight, *fisher.stride(), gradient.stride(0), **config,
    )  # fmt: skip


def _precision() -> str:
    """How fp32 operands are multiplied: never rounded to bf16, since F outlives the step."""
    precision = launch.precision()
    return "tf32" if precision == "bf16" else precision


def addressable(tensor: Tensor) -> Tensor:
    """`tensor`, or a contiguous copy when offsets inside a tile of tokens could pass 2^31."""
    return tensor if max(tensor.stride()[-2:]) < MAX_STRIDE else tensor.contiguous()


def _variant(kernel: str, precision: str) -> str:
    """Three tf32 products for one need more registers: they have entries of their own."""
    return f"{kernel}:tf32x3" if precision == "tf32x3" else kernel


def _tiles(fisher: Tensor, config: Mapping[str, Any]) -> int:
    d_out, d_in = fisher.shape
    return cdiv(d_out, config["BLOCK_M"]) * cdiv(d_in, config["BLOCK_N"])


def _grid(
    fisher: Tensor, config: Mapping[str, Any], samples: int, tokens: int
) -> tuple[int, int, Tensor | None]:
    """Output tiles, splits of the samples and, for several, what they take turns by: a counter of
    tickets and a lock per tile, 0 before and after every launch."""
    tiles = _tiles(fisher, config)
    if fisher.dtype != torch.float32:  # every split would round
        return tiles, 1, None
    splits = choose_splits(tiles, samples, tokens, launch.multiprocessors(fisher))
    if splits == 1:
        return tiles, 1, None
    return tiles, splits, kept.zeros(fisher, tiles + 1)


@functools.lru_cache(maxsize=1024)
def choose_splits(tiles: int, samples: int, tokens: int, multiprocessors: int) -> int:
    """The number of splits with the least modelled time: whole waves of programs, and turns at F."""

    def cost(splits: int) -> int:
        waves = cdiv(tiles * splits, multiprocessors)
        return waves * cdiv(samples, splits) * tokens + (waves + splits - 1) * TURN

    return min(range(1, min(samples, MAX_SPLITS) + 1), key=cost)
