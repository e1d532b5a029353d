# SPDX-License-Identifier: Apache-2.0
"""Row and column sums of squared products dy_n^T x_n of samples, for factored Fishers: the kernel of
`fisher_accumulate`, whose tiles of squares are summed where they are, and never written.

docs/mathematics.md, section 10. Every program has places of its own in two workspaces, [parts, d_out] and
[parts, d_in], which a second launch adds up in order.
"""

import triton
import triton.language as tl

from .fisher_accumulate import place, squares_of_samples
from .tiles import add_parts


@triton.jit(do_not_specialize=["samples", "tokens", "splits"])
def fisher_sums_kernel(
    row_parts, column_parts, x, dy, cu_seqlens, samples, tokens, splits, d_out, d_in,
    stride_xn, stride_xt, stride_xd, stride_yn, stride_yt, stride_yd,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, GROUP_M: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over BLOCK_N columns, and over BLOCK_M rows, of sum_n (dy_n^T x_n)^2 over one of `splits` parts of
    the samples."""
    split, row, column = place(tl.program_id(0), d_out, d_in, BLOCK_M, BLOCK_N, GROUP_M)
    total = squares_of_samples(
        x, dy, cu_seqlens, samples, tokens, split, splits, row, column, d_out, d_in, stride_xn, stride_xt,
        stride_xd, stride_yn, stride_yt, stride_yd, BLOCK_M, BLOCK_N, BLOCK_T, TMA, PRECISION,
    )  # fmt: skip
    i, j = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    of_row = split.to(tl.int64) * tl.cdiv(d_in, BLOCK_N) + column // BLOCK_N
    of_column = split.to(tl.int64) * tl.cdiv(d_out, BLOCK_M) + row // BLOCK_M
    tl.store(row_parts + of_row * d_out + i, tl.sum(total, 1), mask=i < d_out)
    tl.store(column_parts + of_column * d_in + j, tl.sum(total, 0), mask=j < d_in)


@triton.jit
def _add(sums, stride, parts, count, size, weight, block, BLOCK: tl.constexpr):
    """sums += weight times the sum of `count` parts, in order, of one block."""
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    total = add_parts(parts + i, inside, count, size, 8)
    at = sums + i.to(tl.int64) * stride
    tl.store(at, tl.load(at, mask=inside, other=0.0) + weight * total, mask=inside)


@triton.jit(do_not_specialize=["row_count", "column_count"])
def fisher_sums_add_kernel(
    rows, columns, row_parts, column_parts, row_count, column_count, d_out, d_in, weight,
    stride_rows, stride_columns, BLOCK: tl.constexpr,
):  # fmt: skip
    """rows [d_out] += weight times the sum of `row_count` parts [d_out], and columns [d_in] likewise.

    Programs of blocks of rows come first.
    """
    block, blocks = tl.program_id(0), tl.cdiv(d_out, BLOCK)
    if block < blocks:
        _add(rows, stride_rows, row_parts, row_count, d_out, weight, block, BLOCK)
    else:
        _add(columns, stride_columns, column_parts, column_count, d_in, weight, block - blocks, BLOCK)
