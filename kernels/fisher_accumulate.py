# SPDX-License-Identifier: Apache-2.0
"""Fisher accumulation: squared products dy_n^T x_n of samples, added to F [d_out, d_in].

x and dy are [N, T, d] by tensor descriptor or by pointer and strides; with `cu_seqlens` they are [rows, d],
and sample n owns the rows from cu_seqlens[n] to cu_seqlens[n + 1]. F has any strides; each element is rounded
once per program that adds to it.
"""

import triton
import triton.language as tl

from .tiles import cast, dot, grouped_tile, load_tile


@triton.jit
def place(index, d_out, d_in, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(split, first row, first column) of index `index`, split after split."""
    tiles_m, tiles_n = tl.cdiv(d_out, BLOCK_M), tl.cdiv(d_in, BLOCK_N)
    row, column = grouped_tile(index % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    return index // (tiles_m * tiles_n), row * BLOCK_M, column * BLOCK_N


@triton.jit
def _part(count, split, splits):
    """Where part `split` of `splits` nearly equal parts of [0, count) begins."""
    return (count.to(tl.int64) * split // splits).to(tl.int32)


@triton.jit
def _index(locks):
    """The program's id or, with `locks`, the number of programs that started before it: a program that waits
    for lower indices then waits for programs that run, in whatever order the device starts them. locks[0] is
    the counter of these tickets, 0 before and after: whoever draws the last one puts it back."""
    index = tl.program_id(0)
    if locks is not None:
        index = tl.atomic_add(locks, 1, sem="relaxed")
        if index == tl.num_programs(0) - 1:
            tl.store(locks, 0)
    return index


@triton.jit
def _add(
    fisher, value, row, column, d_out, d_in, stride_0, stride_1, locks, index, split, splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """fisher[row:, column:] += value. With `locks` (one for each tile behind the counter, 0 before and after)
    splits take turns, so that the sum has one order."""
    i, j = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    places = fisher + i.to(tl.int64)[:, None] * stride_0 + j.to(tl.int64)[None, :] * stride_1
    inside = (i < d_out)[:, None] & (j < d_in)[None, :]
    if locks is not None:
        tiles = tl.cdiv(d_out, BLOCK_M) * tl.cdiv(d_in, BLOCK_N)
        lock = locks + 1 + index % tiles
        while tl.atomic_add(lock, 0, sem="acquire") != split:
            pass
    # .cg: other multiprocessors wrote it, and the first-level cache would not notice.
    old = tl.load(places, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    tl.store(places, cast(old + value, fisher.dtype.element_ty), mask=inside)
    if locks is not None:
        tl.debug_barrier()  # the whole block has stored
        tl.atomic_add(lock, tl.where(split == splits - 1, -split, 1), sem="release")


@triton.jit
def squares_of_samples(
    x, dy, cu_seqlens, samples, tokens, split, splits, row, column, d_out, d_in,
    stride_xn, stride_xt, stride_xd, stride_yn, stride_yt, stride_yd,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The tile [BLOCK_M, BLOCK_N] at (row, column) of sum_n (dy_n^T x_n)^2 over part `split` of the samples.

    Two fp32 tiles are kept: the product of the current sample, summed over tokens in order, and the sum of
    squares, over samples in order. Tokens past the end of a sample read as zero.
    """
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # One loop over the tokens of all samples: the tiles of the next sample are fetched during the products of
    # this one. A sample without tokens has no turn in such a loop, so packed samples keep two loops.
    FLATTEN: tl.constexpr = cu_seqlens is None
    for n in tl.range(_part(samples, split, splits), _part(samples, split + 1, splits), flatten=FLATTEN):
        if cu_seqlens is not None:
            start = tl.load(cu_seqlens + n).to(tl.int64)
            count = (tl.load(cu_seqlens + n + 1) - start).to(tl.int32)
            x_n, dy_n = x + start * stride_xt, dy + start * stride_yt
        elif TMA:
            x_n, dy_n, count = x, dy, tokens
        else:
            x_n, dy_n, count = (
                x + tl.cast(n, tl.int64) * stride_xn,
                dy + tl.cast(n, tl.int64) * stride_yn,
                tokens,
            )
        product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for t in range(0, count, BLOCK_T):
            if TMA:
                left = tl.trans(dy_n.load([n, t, row]).reshape(BLOCK_T, BLOCK_M))
                right = x_n.load([n, t, column]).reshape(BLOCK_T, BLOCK_N)
            else:
                left = load_tile(dy_n, row, t, d_out, count, stride_yd, stride_yt, BLOCK_M, BLOCK_T, False)
                right = load_tile(x_n, t, column, count, d_in, stride_xt, stride_xd, BLOCK_T, BLOCK_N, False)
            product = dot(left, right, product, PRECISION)
        total += product * product
    return total


@triton.jit(do_not_specialize=["samples", "tokens", "splits"])
def fisher_sample_kernel(
    fisher, x, dy, cu_seqlens, locks, samples, tokens, splits, d_out, d_in, weight,
    stride_f0, stride_f1, stride_xn, stride_xt, stride_xd, stride_yn, stride_yt, stride_yd,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, GROUP_M: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """F += weight sum_n (dy_n^T x_n)^2, elementwise squares, samples in order.

    A program owns BLOCK_M x BLOCK_N elements of F and one of `splits` parts of the samples.
    """
    index = _index(locks)
    split, row, column = place(index, d_out, d_in, BLOCK_M, BLOCK_N, GROUP_M)
    total = squares_of_samples(
        x, dy, cu_seqlens, samples, tokens, split, splits, row, column, d_out, d_in, stride_xn, stride_xt,
        stride_xd, stride_yn, stride_yt, stride_yd, BLOCK_M, BLOCK_N, BLOCK_T, TMA, PRECISION,
    )  # fmt: skip
    _add(
        fisher, weight * total, row, column, d_out, d_in, stride_f0, stride_f1,
        locks, index, split, splits, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["samples", "splits"])
def fisher_token_kernel(
    fisher, x, dy, locks, samples, splits, d_out, d_in, weight,
    stride_f0, stride_f1, stride_xn, stride_xd, stride_yn, stride_yd,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """F += weight (dy^2)^T (x^2): samples of one token. x [N, d_in] and dy [N, d_out] are squared in fp32;
    samples are summed in order, `splits` parts one after the other."""
    index = _index(locks)
    split, row, column = place(index, d_out, d_in, BLOCK_M, BLOCK_N, GROUP_M)
    stop = _part(samples, split + 1, splits)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for n in range(_part(samples, split, splits), stop, BLOCK_T):
        left = load_tile(dy, row, n, d_out, stop, stride_yd, stride_yn, BLOCK_M, BLOCK_T, False).to(
            tl.float32
        )
        right = load_tile(x, n, column, stop, d_in, stride_xn, stride_xd, BLOCK_T, BLOCK_N, False)
        right = right.to(tl.float32)
        total = dot(left * left, right * right, total, PRECISION)
    _add(
        fisher, weight * total, row, column, d_out, d_in, stride_f0, stride_f1,
        locks, index, split, splits, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def fisher_square_kernel(
    fisher, gradient, d_out, d_in, weight, stride_f0, stride_f1, stride_g,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """F += weight G^2 for G [d_out, d_in] in fp32, rows contiguous."""
    _, row, column = place(tl.program_id(0), d_out, d_in, BLOCK_M, BLOCK_N, 1)
    g = load_tile(gradient, row, column, d_out, d_in, stride_g, 1, BLOCK_M, BLOCK_N, False)
    _add(
        fisher, weight * (g * g), row, column, d_out, d_in, stride_f0, stride_f1,
        None, 0, 0, 1, BLOCK_M, BLOCK_N,
    )  # fmt: skip
