# SPDX-License-Identifier: Apache-2.0
"""The EWC penalty of all adapters of a model, with its gradients, in one launch and one read of every F; and
the l1 norm of their products, which is the same without F.

docs/mathematics.md, sections 2 and 13. The adapters come as a table of pointers and sizes, `table` [adapters,
FIELDS] (int64, columns as named below), the work as `items` [items, 3] (int32): adapter, region of rows,
block of columns.
"""

import triton
import triton.language as tl

from .tiles import as_fp32, over_slices, rounded, sliced_product
from .tiles import last as _last

FIELDS = tl.constexpr(28)
FISHER, LORA_A, LORA_B, SCALE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
D_OUT, D_IN, RANK, ROWS = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
FISHER_0, FISHER_1, A_0, A_1 = tl.constexpr(8), tl.constexpr(9), tl.constexpr(10), tl.constexpr(11)
B_0, B_1, SCALE_0 = tl.constexpr(12), tl.constexpr(13), tl.constexpr(14)
GRAD_A, GRAD_B, GRAD_S = tl.constexpr(15), tl.constexpr(16), tl.constexpr(17)  # places in `grads`
PART_A, PART_B, PART_S = tl.constexpr(18), tl.constexpr(19), tl.constexpr(20)  # places in `work`
REGIONS, BLOCKS, FIRST_ITEM = tl.constexpr(21), tl.constexpr(22), tl.constexpr(23)
COUNT_A, COUNT_B, COUNT_S, SCALAR = tl.constexpr(24), tl.constexpr(25), tl.constexpr(26), tl.constexpr(27)


@triton.jit
def _scale(entry, factor, k, TYPE: tl.constexpr):
    """s[k] * factor of an adapter in fp32; without a scale tensor, factor."""
    s = tl.zeros(k.shape, tl.float32) + factor
    address = tl.load(entry + SCALE)
    if address != 0:
        pointer = address.to(tl.pointer_type(TYPE))
        value = tl.load(pointer + k * tl.load(entry + SCALE_0), mask=k < tl.load(entry + RANK), other=0.0)
        s *= value.to(tl.float32)
    return s


@triton.jit
def _add_up(parts, count, stride, mask, SHAPE_0: tl.constexpr, SHAPE_1: tl.constexpr):
    """Sum of `count` tiles, `stride` apart, in order; read past the first-level cache, which may be stale."""
    total = tl.zeros([SHAPE_0, SHAPE_1], tl.float32)
    for _ in range(count):
        total += tl.load(parts, mask=mask, other=0.0, cache_modifier=".cg")
        parts += stride
    return total


@triton.jit
def _finish_a(entry, work, grads, j, ewc_lambda, RP: tl.constexpr, BLOCK_N: tl.constexpr):
    """dA of a block of columns: lambda times the sum over the regions of rows."""
    d_in, rank = tl.load(entry + D_IN), tl.load(entry + RANK)
    k = tl.arange(0, RP)
    mask = (k < rank)[:, None] & (j < d_in)[None, :]
    at = k[:, None] * d_in + j[None, :]
    parts = work + tl.load(entry + PART_A) + at
    total = _add_up(parts, tl.load(entry + REGIONS), rank * d_in, mask, RP, BLOCK_N)
    tl.store(grads + tl.load(entry + GRAD_A) + at, total * ewc_lambda, mask=mask)


@triton.jit
def _finish_b(entry, work, grads, first, stop, ewc_lambda, RP: tl.constexpr, BLOCK_M: tl.constexpr):
    """dB of a region of rows: lambda times the sum over the blocks of columns."""
    d_out, rank = tl.load(entry + D_OUT), tl.load(entry + RANK)
    k = tl.arange(0, RP)
    for start in range(first, stop, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        mask = (i < stop)[:, None] & (k < rank)[None, :]
        at = i[:, None] * rank + k[None, :]
        parts = work + tl.load(entry + PART_B) + at
        total = _add_up(parts, tl.load(entry + BLOCKS), d_out * rank, mask, BLOCK_M, RP)
        tl.store(grads + tl.load(entry + GRAD_B) + at, total * ewc_lambda, mask=mask)


@triton.jit
def _finish_s(entry, work, grads, factor, ewc_lambda, RP: tl.constexpr):
    """ds: lambda times factor times the sum over all items of the adapter; for a 0-d scale over all ranks."""
    rank = tl.load(entry + RANK)
    k = tl.arange(0, RP)
    mask = (k < rank)[None, :]
    count = tl.load(entry + REGIONS) * tl.load(entry + BLOCKS)
    parts = work + tl.load(entry + PART_S) + k[None, :]
    total = _add_up(parts, count, RP, mask, 1, RP) * (factor * ewc_lambda)
    to = grads + tl.load(entry + GRAD_S)
    if tl.load(entry + SCALAR) != 0:
        tl.store(to, tl.sum(tl.where(mask, total, 0.0)))
    else:
        tl.store(to + k[None, :], total, mask=mask)


@triton.jit
def _finish_loss(work, loss, n_items, ewc_lambda, WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """P = WEIGHT times lambda times the sum over all items, in fp64: it may have millions of terms."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n_items, BLOCK):
        item = start + tl.arange(0, BLOCK)
        total += tl.load(work + item, mask=item < n_items, other=0.0, cache_modifier=".cg").to(tl.float64)
    tl.store(loss, (tl.sum(total) * WEIGHT * ewc_lambda).to(tl.float32))


@triton.jit
def _decoded(codes, scales, SHARED: tl.constexpr):
    """scale times the square of the code, for codes [.., .., WIDTH] and scales [.., .., WIDTH // SHARED].

    Both products are exact. A number in the last bits of 2^23 becomes fp32 by a subtraction: conversions are
    slow.
    """
    root = (codes.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    rows: tl.constexpr = scales.shape[1]
    several = scales[:, :, :, None].broadcast_to(scales.shape[0], rows, scales.shape[2], SHARED)
    return several.reshape(codes.shape) * (root * root)


@triton.jit
def _as_operand(h, PERMUTED: tl.constexpr, SLICES: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """`h` [SLICES, BLOCK_M, WIDTH] with its columns in the order in which a product takes them from the
    threads that hold them: of eight columns, thread t of four has 2 t and 2 t + 1 of a result, but t and
    t + 4 of a tf32 operand. H A^T sums over columns in whatever order: nothing moves between threads."""
    if PERMUTED:
        h = h.reshape(SLICES, BLOCK_M, WIDTH // 8, 4, 2).permute(0, 1, 2, 4, 3)
        h = h.reshape(SLICES, BLOCK_M, WIDTH)
    return h


@triton.jit
def _factors(
    entry, left, A_TYPE: tl.constexpr, PERMUTED: tl.constexpr,
    RP: tl.constexpr, BLOCK_N: tl.constexpr, SLICES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of columns of A as operands of (B s) A, [SLICES, RP, columns], and of H A^T, its transpose with
    columns in the order of `_as_operand`."""
    k, j = tl.arange(0, RP), left + tl.arange(0, BLOCK_N)
    pointer = tl.load(entry + LORA_A).to(tl.pointer_type(A_TYPE))
    pointer += k[None, :] * tl.load(entry + A_0) + j[:, None] * tl.load(entry + A_1)
    mask = (k < tl.load(entry + RANK))[None, :] & (j < tl.load(entry + D_IN))[:, None]
    at = as_fp32(tl.load(pointer, mask=mask, other=0.0).to(tl.float32), A_TYPE, PRECISION)
    at = rounded(at, PRECISION)
    a = at.reshape(SLICES, BLOCK_N // SLICES, RP).permute(0, 2, 1)
    if PERMUTED:
        at = at.reshape(SLICES, BLOCK_N // SLICES // 8, 4, 2, RP).permute(0, 1, 3, 2, 4)
    return a, at.reshape(SLICES, BLOCK_N // SLICES, RP)


@triton.jit(do_not_specialize=["n_items"])
def ewc_penalty_kernel(
    table, factors, items, work, counters, loss, grads, n_items, ewc_lambda,
    NEED_A: tl.constexpr, NEED_B: tl.constexpr, NEED_S: tl.constexpr, RP: tl.constexpr, UNIT: tl.constexpr,
    FISHER_TYPE: tl.constexpr, A_TYPE: tl.constexpr, B_TYPE: tl.constexpr, SCALE_TYPE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICES: tl.constexpr,
    L1: tl.constexpr,
):  # fmt: skip
    """loss = lambda/2 sum F (B diag(s) A)^2 over all adapters, and dA, dB, ds as needed, into flat `grads`.

    A program walks down a region of rows of one block of columns, which is cut into SLICES, one for each
    warp. With bs = B diag(s) it forms, tile by tile, delta = bs A, h = F delta, the products h A^T (dB before
    its scale) and bs^T h (dA). What is complete only when its neighbours are done goes to `work`, and the
    last of them, found by a counter, adds it up in the order of the items: no result depends on which that
    was. `counters` are 0 before and after. UNIT: rows of F are contiguous, start at multiples of 16 bytes,
    and are multiples of 8 long. An F of FISHER_TYPE uint8 has rows of codes, in blocks of 32, and behind them
    the scales of the blocks (`reference/eight_bit.py`): UNIT always holds for it.
    L1: loss = lambda sum |B diag(s) A| instead, with h = sign(delta). There is no F, and UNIT does not hold.
    """
    pid = tl.program_id(0)
    entry = table + tl.load(items + 3 * pid) * FIELDS
    region = tl.load(items + 3 * pid + 1)
    block = tl.load(items + 3 * pid + 2)
    factor = tl.load(factors + tl.load(items + 3 * pid))
    d_out, d_in, rank = tl.load(entry + D_OUT), tl.load(entry + D_IN), tl.load(entry + RANK)
    first = region * tl.load(entry + ROWS)
    stop = min(d_out, first + tl.load(entry + ROWS))
    left = block.to(tl.int64) * BLOCK_N
    # Tiles are [SLICES, rows, WIDTH]: a warp that has a slice of the columns exchanges next to nothing.
    WIDTH: tl.constexpr = BLOCK_N // SLICES
    jj = (tl.arange(0, SLICES) * WIDTH)[:, None, None] + tl.arange(0, WIDTH)[None, None, :]
    i = tl.arange(0, BLOCK_M)
    k = tl.arange(0, RP)
    ranks = k < rank
    columns = left + jj < d_in
    # Offsets inside a tile are 32 bits wide and do not change from tile to tile.
    if not L1:
        fisher = tl.load(entry + FISHER).to(tl.pointer_type(FISHER_TYPE))
        fisher_0, fisher_1 = tl.load(entry + FISHER_0), tl.load(entry + FISHER_1)
    CODES: tl.constexpr = FISHER_TYPE == tl.uint8
    if CODES:
        # Codes behind the last column are 0, and so is A there: only rows and whole blocks are masked.
        padded = tl.multiple_of(tl.cdiv(d_in, 32) * 32, 32)
        fisher, fisher_0 = tl.multiple_of(fisher, 16), tl.multiple_of(fisher_0, 16)
        inside = left + jj < padded
        tile = i[None, :, None] * fisher_0.to(tl.int32) + jj
        SHARED: tl.constexpr = min(WIDTH, 32)
        q = (tl.arange(0, SLICES) * WIDTH)[:, None, None]
        q += (tl.arange(0, WIDTH // SHARED) * SHARED)[None, None, :]
        scaled = left + q < padded
        scales = (tl.load(entry + FISHER) + padded + left // 16).to(tl.pointer_type(tl.bfloat16))
        scales_0 = tl.multiple_of(fisher_0 // 2, 8)
        scale_tile = i[None, :, None] * scales_0.to(tl.int32) + q // 32
        fisher += left
    elif UNIT:
        # Without the hint on d_in, the mask would keep loads from being wide.
        fisher, fisher_0 = tl.multiple_of(fisher, 16), tl.multiple_of(fisher_0, 8)
        columns = left + jj < tl.multiple_of(d_in, 8)
        tile = i[None, :, None] * fisher_0.to(tl.int32) + jj
        fisher += left
    elif not L1:
        tile = i[None, :, None] * fisher_0.to(tl.int32) + jj * fisher_1.to(tl.int32)
        fisher += left * fisher_1
    PERMUTED: tl.constexpr = PRECISION == "tf32" or PRECISION == "tf32x3"
    a, at = _factors(entry, left, A_TYPE, PERMUTED, RP, BLOCK_N, SLICES, PRECISION)
    lora_b, b_0 = tl.load(entry + LORA_B).to(tl.pointer_type(B_TYPE)), tl.load(entry + B_0)
    b_tile = i[:, None] * b_0.to(tl.int32) + k[None, :] * tl.load(entry + B_1).to(tl.int32)
    part_b = work + tl.load(entry + PART_B) + block * d_out * rank
    part_tile = i[:, None] * rank.to(tl.int32) + k[None, :]
    s = _scale(entry, factor, k, SCALE_TYPE)

    da = tl.zeros([SLICES, RP, WIDTH], tl.float32)
    ds = tl.zeros([BLOCK_M, RP], tl.float32)
    value = tl.zeros([SLICES, BLOCK_M, 8], tl.float32)
    rows = i < (stop - first).to(tl.int32)
    b = tl.load(lora_b + first * b_0 + b_tile, mask=rows[:, None] & ranks[None, :], other=0.0)
    for start in range(first, stop, BLOCK_M):
        rows = i < (stop - start).to(tl.int32)
        if CODES:
            f = tl.load(fisher + start * fisher_0 + tile, mask=rows[None, :, None] & inside, other=0)
            block_scales = tl.load(
                scales + start * scales_0 + scale_tile, mask=rows[None, :, None] & scaled, other=0.0
            )
            f = _decoded(f, block_scales.to(tl.float32), SHARED)
        elif not L1:
            f = tl.load(fisher + start * fisher_0 + tile, mask=rows[None, :, None] & columns, other=0.0)
        b = as_fp32(b.to(tl.float32), B_TYPE, PRECISION)
        bs = rounded((b * s[None, :])[None, :, :].broadcast_to(SLICES, BLOCK_M, RP), PRECISION)
        delta = sliced_product(bs, a, tl.zeros([SLICES, BLOCK_M, WIDTH], tl.float32), PRECISION)
        if L1:  # also where delta is no number, which the sum shows
            h = tl.where(delta > 0.0, 1.0, tl.where(delta < 0.0, -1.0, 0.0))
        else:
            h = as_fp32(f.to(tl.float32) * delta, FISHER_TYPE, PRECISION)
        # Sums of eighths of a row, which stay in their threads.
        value += tl.sum((h * delta).reshape(SLICES, BLOCK_M, WIDTH // 8, 8), 2)
        h = rounded(h, PRECISION)
        if NEED_B or NEED_S:
            ht = _as_operand(h, PERMUTED, SLICES, BLOCK_M, WIDTH)
            ha = sliced_product(ht, at, tl.zeros([SLICES, BLOCK_M, RP], tl.float32), PRECISION)
            ha = over_slices(ha, SLICES, BLOCK_M, RP)
            if NEED_B:
                tl.store(
                    part_b + start * rank + part_tile, ha * s[None, :], mask=rows[:, None] & ranks[None, :]
                )
            if NEED_S:
                ds += ha * b
        if NEED_A:
            da = sliced_product(bs.permute(0, 2, 1), h, da, PRECISION)
        # The next rows of B are on their way meanwhile. Triton's own copies to shared memory, which are for
        # operands of products, would be four bytes wide and collide.
        below = i < (stop - start - BLOCK_M).to(tl.int32)
        b = tl.load(
            lora_b + (start + BLOCK_M) * b_0 + b_tile, mask=below[:, None] & ranks[None, :], other=0.0
        )

    tl.store(work + pid, tl.sum(value))
    regions, blocks = tl.load(entry + REGIONS), tl.load(entry + BLOCKS)
    if NEED_A:
        part_a = work + tl.load(entry + PART_A) + region * rank * d_in + left + k[None, :, None] * d_in + jj
        tl.store(part_a, da, mask=ranks[None, :, None] & columns)
        if _last(counters + tl.load(entry + COUNT_A) + block, regions):
            _finish_a(entry, work, grads, left + tl.arange(0, BLOCK_N), ewc_lambda, RP, BLOCK_N)
    if NEED_B:
        if _last(counters + tl.load(entry + COUNT_B) + region, blocks):
            _finish_b(entry, work, grads, first, stop, ewc_lambda, RP, BLOCK_M)
    if NEED_S:
        if tl.load(entry + GRAD_S) >= 0:
            tl.store(
                work + tl.load(entry + PART_S) + (pid - tl.load(entry + FIRST_ITEM)) * RP + k, tl.sum(ds, 0)
            )
            if _last(counters + tl.load(entry + COUNT_S), regions * blocks):
                _finish_s(entry, work, grads, factor, ewc_lambda, RP)
    if _last(counters, n_items):
        _finish_loss(work, loss, n_items, ewc_lambda, 1.0 if L1 else 0.5, 256)
