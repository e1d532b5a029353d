# SPDX-License-Identifier: Apache-2.0
"""Row and column sums of the squared-gradient Fisher in plain PyTorch, one sample at a time
(docs/mathematics.md, section 10)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from . import arguments
from .adapters import as_rows
from .fisher_accumulate import sample_bounds

_STRIP = 1 << 20  # elements of F that exist at a time


def fisher_sums_(
    rows: Tensor,
    columns: Tensor,
    x: Tensor,
    dy: Tensor,
    squares: str = "sample",
    weight: float = 1.0,
    cu_seqlens: Tensor | None = None,
) -> None:
    """rows += weight * row sums, columns += weight * column sums of sum_n (dy_n^T x_n)^2, or with squares
    "batch" of (sum_n dy_n^T x_n)^2, in place."""
    arguments.fisher_sums(rows, columns, x, dy, squares, cu_seqlens)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    x2, dy2 = as_rows(x).to(acc), as_rows(dy).to(acc)
    of_rows, of_columns = rows.new_zeros(rows.shape, dtype=acc), columns.new_zeros(columns.shape, dtype=acc)
    if squares == "sample" and cu_seqlens is None and x2.shape[0] == x.shape[0]:  # one token: a product
        x_squares, dy_squares = x2.square(), dy2.square()
        of_rows = dy_squares.T @ x_squares.sum(1)
        of_columns = x_squares.T @ dy_squares.sum(1)
    else:
        bounds = sample_bounds(x, cu_seqlens) if squares == "sample" else [0, x2.shape[0]]
        step = max(_STRIP // max(x2.shape[1], 1), 1)
        for start, stop in itertools.pairwise(bounds):
            x_n, dy_n = x2[start:stop], dy2[start:stop]
            for first in range(0, dy2.shape[1], step):
                product = (dy_n[:, first : first + step].T @ x_n).square_()
                of_rows[first : first + step] += product.sum(1)
                of_columns += product.sum(0)
    rows.copy_(rows.to(acc) + weight * of_rows)
    columns.copy_(columns.to(acc) + weight * of_columns)
