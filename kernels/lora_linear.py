# SPDX-License-Identifier: Apache-2.0
"""Kernels of the LoRA linear: its product with the low-rank term inside, and the passes around it.

Low-rank factors arrive packed: `a` [RP, d_in] holds the rows of every A, `b` [d_out, RP] those of every B
times its scale, zero where an adapter does not own an output row and in the columns that pad the rank to RP.
So one product serves any number of adapters on any rows. docs/mathematics.md, section 1.
"""

import triton
import triton.language as tl

from .lowrank import finish
from .tiles import add_parts, cast, dot, grouped_tile, keep_mask, load_tile, store_tile


# Numbers of rows are not specialised on: a ragged last batch compiles nothing.
@triton.jit(do_not_specialize=["M"])
def lora_linear_kernel(
    x, w, a, b, z, z_sum, bias, y, seed,
    M, N, K, z_columns, z_parts, first_n, last_n, threshold, inverse_keep,
    stride_xm, stride_xk, stride_w0, stride_w1, stride_bn, stride_br, stride_zs, stride_zm, stride_vm,
    stride_ym,
    RP: tl.constexpr, BLOCK_R: tl.constexpr, FULL: tl.constexpr, BASE: tl.constexpr, W_KN: tl.constexpr,
    TMA_X: tl.constexpr, TMA_W: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] w + drop(z b^T) + bias, rounded once.

    w is [N, K], or [K, N] if W_KN. FULL: z = x a^T is computed in the same loop and written, in fp32, by the
    programs of the first column block; else z is read, its product with b [N, RP] starts the accumulator, and
    dropout (`seed` not None) masks it. That z is [M, z_columns], or, where `z_sum` [M, RP] is given, the sum
    of z [z_parts, M, z_columns], which the programs of the first column block write there. BASE = False
    leaves x w out. b is zero outside rows [first_n, last_n). One program per tile; sums over K in order.
    """
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m = tile_m * BLOCK_M
    n = tile_n * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    adapted = (n < last_n) & (n + BLOCK_N > first_n)
    if not FULL:
        # A tile without adapters reads z as zero: a branch around the products would leave moves of the
        # accumulator on its other arm, and ptxas then waits after every wgmma of the kernel.
        z_rows = tl.where(adapted, M, 0)
        for r in tl.static_range(0, RP, BLOCK_R):
            if z_sum is None:
                z_tile = load_tile(z, m, r, z_rows, z_columns, stride_zm, 1, BLOCK_M, BLOCK_R, False)
            else:
                i, k = m + tl.arange(0, BLOCK_M), r + tl.arange(0, BLOCK_R)
                inside = (i < z_rows)[:, None] & (k < z_columns)[None, :]
                places = z + i.to(tl.int64)[:, None] * stride_zm + k[None, :]
                z_tile = cast(add_parts(places, inside, z_parts, stride_zs, 4), b.dtype.element_ty)
                if tile_n == 0:
                    store_tile(z_sum, z_tile, m, r, M, RP, stride_vm, 1, BLOCK_M, BLOCK_R)
            b_tile = load_tile(b, r, n, RP, N, stride_br, stride_bn, BLOCK_R, BLOCK_N, False)
            acc = dot(cast(z_tile, b_tile.dtype), b_tile, acc, PRECISION)
        if seed is not None:
            kept = keep_mask(tl.load(seed), threshold, m, n, BLOCK_M, BLOCK_N)
            acc = tl.where(kept, acc * inverse_keep, 0.0)
    z_acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if BASE:
        for k in range(0, K, BLOCK_K):
            x_tile = load_tile(x, m, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, TMA_X)
            if W_KN:
                w_tile = load_tile(w, k, n, K, N, stride_w0, stride_w1, BLOCK_K, BLOCK_N, TMA_W)
            else:
                w_tile = load_tile(w, n, k, N, K, stride_w0, stride_w1, BLOCK_N, BLOCK_K, TMA_W).trans()
            acc = dot(x_tile, w_tile, acc, PRECISION)
            if FULL:
                a_tile = load_tile(a, 0, k, RP, K, K, 1, BLOCK_R, BLOCK_K, False)
                z_acc = dot(x_tile, a_tile.trans(), z_acc, PRECISION)
    if FULL:
        if tile_n == 0:
            store_tile(z, z_acc, m, 0, M, z_columns, stride_zm, 1, BLOCK_M, BLOCK_R)
        if adapted:
            b_tile = load_tile(b, 0, n, RP, N, stride_br, stride_bn, BLOCK_R, BLOCK_N, False)
            acc = dot(cast(z_acc, b_tile.dtype), b_tile, acc, PRECISION)
    if bias is not None:
        j = n + tl.arange(0, BLOCK_N)
        acc += tl.load(bias + j, mask=j < N, other=0.0).to(tl.float32)[None, :]
    store_tile(y, acc, m, n, M, N, stride_ym, 1, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["M"])
def lowrank_rows_kernel(
    x, p, u, u_copy, x_copy, seed,
    M, N, u_columns, threshold, inverse_keep,
    stride_xm, stride_xn, stride_pn, stride_pr, stride_um, stride_vm, stride_copy,
    RP: tl.constexpr, BLOCK_R: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """u [M, u_columns] = drop(x) p in one read of x [M, N]; the same, rounded, in u_copy [M, RP], and x in
    x_copy where these are given.

    Program (i, k) owns rows i of BLOCK_M and ranks k of BLOCK_R.
    """
    m, r = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_R
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for n in range(0, N, BLOCK_N):
        tile = load_tile(x, m, n, M, N, stride_xm, stride_xn, BLOCK_M, BLOCK_N, TMA)
        if x_copy is not None:
            store_tile(x_copy, tile, m, n, M, N, stride_copy, 1, BLOCK_M, BLOCK_N)
        if seed is not None:
            kept = keep_mask(tl.load(seed), threshold, m, n, BLOCK_M, BLOCK_N)
            tile = tl.where(kept, tile, 0.0).to(tile.dtype)
        p_tile = load_tile(p, n, r, N, RP, stride_pn, stride_pr, BLOCK_N, BLOCK_R, False)
        # Where a tile is stored as well, its product must be waited for in its iteration: Triton gives it too
        # few buffers for a product that is under way when the next tile is fetched (seen up to 3.7.1). A
        # factor of 1 that the compiler does not know keeps it from adding in the product.
        if seed is not None or x_copy is not None:
            acc += dot(tile, p_tile, tl.zeros([BLOCK_M, BLOCK_R], tl.float32), PRECISION) * inverse_keep
        else:
            acc = dot(tile, p_tile, acc, PRECISION)
    store_tile(u, acc, m, r, M, u_columns, stride_um, 1, BLOCK_M, BLOCK_R)
    if u_copy is not None:
        store_tile(u_copy, acc, m, r, M, RP, stride_vm, 1, BLOCK_M, BLOCK_R)


@triton.jit(do_not_specialize=["M", "chunk", "splits"])
def lowrank_columns_kernel(
    x, c, p, g, u, sums, sums_out, x_copy, seed, counters,
    outs, scales, factors, owner, factor_bs, dots, dss,
    M, N, chunk, splits, c_columns, rank, threshold, inverse_keep,
    stride_xm, stride_xn, stride_cm, stride_pn, stride_pr, stride_us, stride_copy, stride_owner,
    ranks, strides_0, strides_1, strides_s, strides_b0, strides_b1,
    RP: tl.constexpr, BLOCK_R: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEAL: tl.constexpr,
):  # fmt: skip
    """One read of x [M, N]: g = drop(x)^T c and, as asked for, u = x p, column sums and a copy of x.

    Program (j, s, k) owns columns j of BLOCK_N, rows [s chunk, (s + 1) chunk) and ranks k of BLOCK_R. It
    writes g[s] [N, rank] over its rows for c [M, c_columns], u[j] [M, rank] over its columns, and
    sums[s] [N]. Where `outs` is given, g and sums are added up over s in this launch and dealt out to the
    adapters, see `finish`; the reader of u adds it up over j.
    """
    block, split, k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n, r = block * BLOCK_N, k * BLOCK_R
    j = n + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    if p is not None:
        p_tile = load_tile(p, n, r, N, RP, stride_pn, stride_pr, BLOCK_N, BLOCK_R, False)
    stop = min(M, (split + 1) * chunk)
    for m in range(split * chunk, stop, BLOCK_M):
        tile = load_tile(x, m, n, M, N, stride_xm, stride_xn, BLOCK_M, BLOCK_N, TMA)
        if x_copy is not None:
            store_tile(x_copy, tile, m, n, M, N, stride_copy, 1, BLOCK_M, BLOCK_N)
        if sums is not None:
            total += tl.sum(tile.to(tl.float32), 0)
        if seed is not None:
            kept = keep_mask(tl.load(seed), threshold, m, n, BLOCK_M, BLOCK_N)
            tile = tl.where(kept, tile, 0.0).to(tile.dtype)
        if c is not None:
            c_tile = load_tile(c, m, r, M, c_columns, stride_cm, 1, BLOCK_M, BLOCK_R, False)
            start = acc if seed is None else tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
            sum = dot(tile.trans(), cast(c_tile, tile.dtype), start, PRECISION)
            acc = sum if seed is None else acc + sum * inverse_keep
        if p is not None:
            part = dot(tile, p_tile, tl.zeros([BLOCK_M, BLOCK_R], tl.float32), PRECISION)
            store_tile(u + block.to(tl.int64) * stride_us, part, m, r, M, rank, rank, 1, BLOCK_M, BLOCK_R)
    stride_part = tl.cast(N, tl.int64) * rank
    if c is not None:
        store_tile(g + split * stride_part, acc, n, r, N, rank, rank, 1, BLOCK_N, BLOCK_R)
    if sums is not None:
        tl.store(sums + split.to(tl.int64) * N + j, total, mask=(j < N) & (k == 0))
    if outs is not None:
        finish(
            g, splits, stride_part, rank, sums, sums_out, counters, block, split, N,
            outs, scales, factors, owner, factor_bs, dots, dss, stride_owner, ranks, strides_0, strides_1,
            strides_s, strides_b0, strides_b1, BLOCK_N, DEAL, min(BLOCK_R, 16),
        )  # fmt: skip
