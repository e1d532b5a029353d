# SPDX-License-Identifier: Apache-2.0
"""Host of the sums of factored Fishers: the squares of the Fisher's kernel, summed in registers."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_ewclora.kernels import fisher_sums as kernels

from ...reference import arguments
from . import fisher_accumulate, launch, tables
from .launch import cdiv


def fisher_sums_(
    rows: Tensor,
    columns: Tensor,
    x: Tensor,
    dy: Tensor,
    squares: str,
    weight: float,
    cu_seqlens: Tensor | None,
) -> None:
    """rows += weight * row sums, columns += weight * column sums of sum_n (dy_n^T x_n)^2 or, for `squares`
    "batch", of (sum_n dy_n^T x_n)^2, in place. Temporaries are sums of tiles."""
    arguments.fisher_sums(rows, columns, x, dy, squares, cu_seqlens)
    if 0 in (x.numel(), dy.numel()) or (cu_seqlens is not None and cu_seqlens.numel() < 2):
        return
    if squares == "batch":  # one sample
        x, dy = (t.reshape(1, -1, t.shape[-1]) for t in (x, dy))
    elif cu_seqlens is None and (x.dim() == 2 or x.shape[1] == 1):
        _add(rows, columns, *_single_tokens(*(t.flatten(0, -2) for t in (x, dy))), weight)
        return
    near_x, near_dy = fisher_accumulate.addressable(x), fisher_accumulate.addressable(dy)
    parts = _samples(near_x, near_dy, cu_seqlens)
    _add(rows, columns, *parts, weight)


def _samples(x: Tensor, dy: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Parts of the row sums `[parts, d_out]` and of the column sums `[parts, d_in]`."""
    name = "fisher_sums_kernel"
    d_out, d_in = dy.shape[-1], x.shape[-1]
    chosen = fisher_accumulate.sample_launch(name, x, dy, cu_seqlens)
    config = chosen.config
    tiles_m, tiles_n = cdiv(d_out, config["BLOCK_M"]), cdiv(d_in, config["BLOCK_N"])
    blocks = cdiv(chosen.tokens, config["BLOCK_T"]) * config["BLOCK_T"]
    splits = fisher_accumulate.choose_splits(
        tiles_m * tiles_n, chosen.samples, blocks, launch.multiprocessors(x)
    )
    row_parts = x.new_empty(splits * tiles_n, d_out, dtype=torch.float32)
    column_parts = x.new_empty(splits * tiles_m, d_in, dtype=torch.float32)
    launch.launch(
        kernels.fisher_sums_kernel, (tiles_m * tiles_n * splits,), row_parts, column_parts, *chosen.sources,
        chosen.cu_seqlens, chosen.samples, chosen.tokens, splits, d_out, d_in, *chosen.strides,
        PRECISION=chosen.precision, **config,
    )  # fmt: skip
    return row_parts, column_parts


def _single_tokens(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(dy^2)^T |x|^2 and (x^2)^T |dy|^2, one part each: products of a matrix and a vector, in fp32."""
    x_squares, dy_squares = x.float().square(), dy.float().square()
    of_rows = torch.mv(dy_squares.t(), x_squares.sum(1))
    of_columns = torch.mv(x_squares.t(), dy_squares.sum(1))
    return of_rows.unsqueeze(0), of_columns.unsqueeze(0)


def _add(rows: Tensor, columns: Tensor, row_parts: Tensor, column_parts: Tensor, weight: float) -> None:
    """Adds parts up, in order, and to the sums."""
    config = tables.lookup("fisher_sums_add_kernel", launch.arch(rows), rows.dtype)
    blocks = sum(cdiv(sums.numel(), config["BLOCK"]) for sums in (rows, columns))
    launch.launch(
        kernels.fisher_sums_add_kernel, (blocks,), rows, columns, row_parts, column_parts,
        row_parts.shape[0], column_parts.shape[0], rows.numel(), columns.numel(), weight,
        rows.stride(0), columns.stride(0), **config,
    )  # fmt: skip
