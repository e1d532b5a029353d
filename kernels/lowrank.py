# SPDX-License-Identifier: Apache-2.0
"""Kernels that gather the factors of several adapters in one matrix, and distribute their gradients again.

Adapters come as tuples, a few per launch. `owner` [adapters, d_out] (int32) gives the row of an adapter's B
that belongs to an output row, -1 for none; without it the only adapter owns every row.
"""

import triton
import triton.language as tl

from .tiles import add_parts, cast, last

AT_ONCE = tl.constexpr(8)  # partial sums whose loads are under way together


@triton.jit
def _rank_scale(scale, stride, factor, r, rank):
    """scale[r] * factor in fp32; `scale` None: factor; stride 0: one number for all ranks."""
    s = tl.zeros(r.shape, tl.float32) + factor
    if scale is not None:
        s *= tl.load(scale + r * stride, mask=r < rank, other=0.0).to(tl.float32)
    return s


@triton.jit
def _pack_a(lora_a, a, j, r, column, d_in, rank, width, stride_a0, stride_a1, stride_a):
    """a[column + r, j] = A[r, j], zero from the rank on."""
    inside = (j < d_in)[None, :]
    source = lora_a + r.to(tl.int64)[:, None] * stride_a0 + j[None, :] * stride_a1
    tile = tl.load(source, mask=(r < rank)[:, None] & inside, other=0.0)
    places = a + (column + r).to(tl.int64)[:, None] * stride_a + j[None, :]
    tl.store(places, cast(tile, a.dtype.element_ty), mask=(r < width)[:, None] & inside)


@triton.jit
def _pack_b(lora_b, b, s, row, j, r, column, d_out, rank, width, stride_b0, stride_b1, stride_b):
    """b[j, column + r] = s[r] B[row[j], r], zero from the rank on and where row[j] < 0."""
    owned = ((row >= 0) & (j < d_out))[:, None] & (r < rank)[None, :]
    source = lora_b + row.to(tl.int64)[:, None] * stride_b0 + r[None, :] * stride_b1
    tile = tl.load(source, mask=owned, other=0.0).to(tl.float32) * s[None, :]
    places = b + j.to(tl.int64)[:, None] * stride_b + (column + r)[None, :]
    tl.store(places, cast(tile, b.dtype.element_ty), mask=(j < d_out)[:, None] & (r < width)[None, :])


@triton.jit
def lowrank_pack_kernel(
    lora_as, lora_bs, scales, factors, owner, a, b,
    d_in, d_out, stride_owner, first, ranks, widths, strides_a0, strides_a1, strides_b0, strides_b1,
    strides_s, stride_a, stride_b, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """a[first + k, :] = A_i[k, :] and b[n, first + k] = s_i[k] B_i[owner_i[n], k] (0 where nobody owns n),
    adapter after adapter.

    `widths` are the ranks, the last one with the padding that is to be zeroed. Program (j, 0) writes BLOCK
    columns of a, program (j, 1) BLOCK rows of b. Rounds to the dtypes of a and b.
    """
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    of_a = tl.program_id(1) == 0
    column = first
    for i in tl.static_range(len(lora_as)):
        row = j
        if owner is not None:
            row = tl.load(owner + i * stride_owner + j, mask=j < d_out, other=-1)
        for start in range(0, widths[i], BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            if of_a:
                _pack_a(
                    lora_as[i],
                    a,
                    j,
                    r,
                    column,
                    d_in,
                    ranks[i],
                    widths[i],
                    strides_a0[i],
                    strides_a1[i],
                    stride_a,
                )
            else:
                s = _rank_scale(scales[i], strides_s[i], factors[i], r, ranks[i])
                _pack_b(
                    lora_bs[i], b, s, row, j, r, column, d_out, ranks[i], widths[i], strides_b0[i],
                    strides_b1[i], stride_b,
                )  # fmt: skip
        column += widths[i]


@triton.jit
def deal_out(
    i: tl.constexpr, column, parts, count, stride_part, stride_row, part_columns, n, rows, block,
    outs, scales, factors, owner, factor_bs, dots, stride_owner, ranks, strides_0, strides_1, strides_s,
    strides_b0, strides_b1, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out_i[owner_i[n], k] = s_i[k] sum_s parts[s, n, column + k], s in order, for adapter i and rows n.

    Where `dots[i]` [blocks, rank] is given, its row `block` receives factors[i] times the sums over n of
    factor_bs[i][owner_i[n], k] sum_s parts[s, n, column + k]: added up over blocks, the gradient of the
    scale. Parts from column `part_columns` on count as zero.
    """
    row = n
    if owner is not None:
        row = tl.load(owner + i * stride_owner + n, mask=n < rows, other=-1)
    owned = (row >= 0) & (n < rows)
    row = row.to(tl.int64)
    for start in range(0, ranks[i], BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        inside = owned[:, None] & (r < ranks[i])[None, :]
        source = parts + n.to(tl.int64)[:, None] * stride_row + (column + r)[None, :]
        total = add_parts(source, inside & (column + r < part_columns)[None, :], count, stride_part, AT_ONCE)
        if outs[i] is not None:
            s = _rank_scale(scales[i], strides_s[i], factors[i], r, ranks[i])
            places = outs[i] + row[:, None] * strides_0[i] + r[None, :].to(tl.int64) * strides_1[i]
            tl.store(places, cast(total * s[None, :], outs[i].dtype.element_ty), mask=inside)
        if dots[i] is not None:
            source_b = factor_bs[i] + row[:, None] * strides_b0[i] + r[None, :] * strides_b1[i]
            product = tl.load(source_b, mask=inside, other=0.0).to(tl.float32) * total
            dot_places = dots[i] + block * ranks[i] + r
            tl.store(dot_places, tl.sum(product, 0) * factors[i], mask=r < ranks[i])


@triton.jit(do_not_specialize=["rows", "splits"])
def lowrank_sum_kernel(
    parts, outs, scales, factors, owner, factor_bs, dots,
    rows, splits, part_columns, stride_owner, first, ranks, strides_0, strides_1, strides_s, strides_b0,
    strides_b1, stride_split, stride_row, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`deal_out` of the columns of parts [splits, rows, part_columns] from `first` on, to adapter after
    adapter. Program (j, i) owns rows j of BLOCK."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = first
    for i in tl.static_range(len(outs)):
        if tl.program_id(1) == i:
            deal_out(
                i, column, parts, splits, stride_split, stride_row, part_columns, n, rows, tl.program_id(0),
                outs, scales, factors, owner, factor_bs, dots, stride_owner, ranks, strides_0, strides_1,
                strides_s, strides_b0, strides_b1, BLOCK_R,
            )  # fmt: skip
        column += ranks[i]


@triton.jit
def gather(parts, count, stride_part, size, BLOCK: tl.constexpr):
    """parts[0] = sum over `count` parts, in order; the first `size` floats of each."""
    for start in range(0, size, BLOCK):
        e = start + tl.arange(0, BLOCK)
        inside = e < size
        tl.store(parts + e, add_parts(parts + e, inside, count, stride_part, AT_ONCE), mask=inside)


@triton.jit
def finish(
    parts, splits, stride_part, part_columns, sums, sums_out, counters, block, split, N,
    outs, scales, factors, owner, factor_bs, dots, dss, stride_owner, ranks, strides_0, strides_1, strides_s,
    strides_b0, strides_b1, BLOCK_N: tl.constexpr, DEAL: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Add up the parts [splits, N, part_columns] of one block of columns and deal them out; the caller has
    written its own.

    The last program to arrive of every AT_ONCE splits adds theirs to the first of them, the last of those
    programs adds these and deals them out, and the last of all blocks adds up the gradients of scales: who
    that is differs from run to run, the order of the sums does not. `sums` [splits, N] likewise, to
    `sums_out`. `counters`: one, and for each block one more than it has groups of splits; at 0, and left so.
    """
    groups = tl.cdiv(splits, AT_ONCE)
    group = split // AT_ONCE
    mine = counters + 1 + block * (groups + 1)
    if last(mine + 1 + group, min(AT_ONCE, splits - group * AT_ONCE)):
        n = block * BLOCK_N
        corner = parts + tl.cast(n, tl.int64) * part_columns
        if groups > 1:
            members = corner + tl.cast(group * AT_ONCE, tl.int64) * stride_part
            count = min(AT_ONCE, splits - group * AT_ONCE)
            gather(members, count, stride_part, min(BLOCK_N, N - n) * part_columns, DEAL * BLOCK_R)
        if last(mine, groups):
            count = tl.where(groups > 1, groups, splits)
            stride = stride_part * tl.where(groups > 1, AT_ONCE, 1)
            for inner in range(n, min(n + BLOCK_N, N), DEAL):
                rows = inner + tl.arange(0, DEAL)
                column = 0
                for i in tl.static_range(len(outs)):
                    deal_out(
                        i, column, parts, count, stride, part_columns, part_columns, rows, N, inner // DEAL,
                        outs, scales, factors, owner, factor_bs, dots, stride_owner, ranks, strides_0,
                        strides_1, strides_s, strides_b0, strides_b1, BLOCK_R,
                    )  # fmt: skip
                    column += ranks[i]
                if sums is not None:
                    total = add_parts(sums + rows, rows < N, splits, N, AT_ONCE)
                    tl.store(sums_out + rows, cast(total, sums_out.dtype.element_ty), mask=rows < N)
            if dss is not None:
                if last(counters, tl.cdiv(N, BLOCK_N)):
                    for i in tl.static_range(len(outs)):
                        if dots[i] is not None:
                            for start in range(0, ranks[i], BLOCK_R):
                                r = start + tl.arange(0, BLOCK_R)
                                inside = r < ranks[i]
                                ds = add_parts(dots[i] + r, inside, tl.cdiv(N, DEAL), ranks[i], AT_ONCE)
                                tl.store(dss[i] + r, cast(ds, dss[i].dtype.element_ty), mask=inside)
