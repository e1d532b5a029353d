"""The EWC penalty of all adapters of a model, with its gradients, in one launch and one read of every F.

docs/mathematics.md, section 2. The adapters come as a table of pointers and sizes, `table` [adapters, FIELDS]
(int64, columns as named below), the work as `items` [items, 3] (int32): adapter, region of rows, block of
columns.
"""

import triton
import triton.language as tl

from .tiles import dot
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
def _finish_loss(work, loss, n_items, ewc_lambda, BLOCK: tl.constexpr):
    """P = lambda/2 times the sum over all items, in fp64: it may have millions of terms."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n_items, BLOCK):
        item = start + tl.arange(0, BLOCK)
        total += tl.load(work + item, mask=item < n_items, other=0.0, cache_modifier=".cg").to(tl.float64)
    tl.store(loss, (tl.sum(total) * 0.5 * ewc_lambda).to(tl.float32))


@triton.jit(do_not_specialize=["n_items"])
def ewc_penalty_kernel(
    table, factors, items, work, counters, loss, grads, n_items, ewc_lambda,
    NEED_A: tl.constexpr, NEED_B: tl.constexpr, NEED_S: tl.constexpr, RP: tl.constexpr, UNIT: tl.constexpr,
    FISHER_TYPE: tl.constexpr, A_TYPE: tl.constexpr, B_TYPE: tl.constexpr, SCALE_TYPE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """loss = lambda/2 sum F (B diag(s) A)^2 over all adapters, and dA, dB, ds as needed, into flat `grads`.

    A program walks down a region of rows of one block of columns. With bs = B diag(s) it forms, tile by tile,
    delta = bs A, h = F delta, the products h A^T (dB before its scale) and bs^T h (dA). What is complete only
    when its neighbours are done goes to `work`, and the last of them, found by a counter, adds it up in the
    order of the items: no result depends on which that was. `counters` are 0 before and after. UNIT: rows
    of F are contiguous, start at multiples of 16 bytes, and are multiples of 8 long.
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
    jj = tl.arange(0, BLOCK_N)
    j = left + jj
    k = tl.arange(0, RP)
    ranks = k < rank
    # Offsets inside a tile are 32 bits wide and do not change from tile to tile.
    i = tl.arange(0, BLOCK_M)
    columns, ranks = (j < d_in)[None, :], k < rank
    fisher = tl.load(entry + FISHER).to(tl.pointer_type(FISHER_TYPE))
    fisher_0, fisher_1 = tl.load(entry + FISHER_0), tl.load(entry + FISHER_1)
    if UNIT:
        # Without the hint on d_in, the mask would keep loads from being wide.
        fisher, fisher_0 = tl.multiple_of(fisher, 16), tl.multiple_of(fisher_0, 8)
        columns = (j < tl.multiple_of(d_in, 8))[None, :]
        tile = i[:, None] * fisher_0.to(tl.int32) + jj[None, :]
        fisher += left
    else:
        tile = i[:, None] * fisher_0.to(tl.int32) + jj[None, :] * fisher_1.to(tl.int32)
        fisher += left * fisher_1
    lora_a = tl.load(entry + LORA_A).to(tl.pointer_type(A_TYPE))
    lora_a += k[:, None] * tl.load(entry + A_0) + j[None, :] * tl.load(entry + A_1)
    a = tl.load(lora_a, mask=ranks[:, None] & columns, other=0.0).to(tl.float32)
    lora_b, b_0 = tl.load(entry + LORA_B).to(tl.pointer_type(B_TYPE)), tl.load(entry + B_0)
    b_tile = i[:, None] * b_0.to(tl.int32) + k[None, :] * tl.load(entry + B_1).to(tl.int32)
    part_b = work + tl.load(entry + PART_B) + block * d_out * rank
    part_tile = i[:, None] * rank.to(tl.int32) + k[None, :]
    s = _scale(entry, factor, k, SCALE_TYPE)

    da = tl.zeros([RP, BLOCK_N], tl.float32)
    ds = tl.zeros([RP], tl.float32)
    value = tl.zeros([BLOCK_M], tl.float32)
    for start in range(first, stop, BLOCK_M):
        rows = (i < (stop - start).to(tl.int32))[:, None]
        f = tl.load(fisher + start * fisher_0 + tile, mask=rows & columns, other=0.0).to(tl.float32)
        b = tl.load(lora_b + start * b_0 + b_tile, mask=rows & ranks[None, :], other=0.0).to(tl.float32)
        bs = b * s[None, :]
        delta = dot(bs, a, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        h = f * delta
        value += tl.sum(h * delta, 1)
        if NEED_B or NEED_S:
            ha = dot(h, a.trans(), tl.zeros([BLOCK_M, RP], tl.float32), PRECISION)
            if NEED_B:
                tl.store(part_b + start * rank + part_tile, ha * s[None, :], mask=rows & ranks[None, :])
            if NEED_S:
                ds += tl.sum(ha * b, 0)
        if NEED_A:
            da = dot(bs.trans(), h, da, PRECISION)

    tl.store(work + pid, tl.sum(value))
    regions, blocks = tl.load(entry + REGIONS), tl.load(entry + BLOCKS)
    if NEED_A:
        part_a = work + tl.load(entry + PART_A) + region * rank * d_in + k[:, None] * d_in + j[None, :]
        tl.store(part_a, da, mask=ranks[:, None] & columns)
        if _last(counters + tl.load(entry + COUNT_A) + block, regions):
            _finish_a(entry, work, grads, j, ewc_lambda, RP, BLOCK_N)
    if NEED_B:
        if _last(counters + tl.load(entry + COUNT_B) + region, blocks):
            _finish_b(entry, work, grads, first, stop, ewc_lambda, RP, BLOCK_M)
    if NEED_S:
        if tl.load(entry + GRAD_S) >= 0:
            tl.store(work + tl.load(entry + PART_S) + (pid - tl.load(entry + FIRST_ITEM)) * RP + k, ds)
            if _last(counters + tl.load(entry + COUNT_S), regions * blocks):
                _finish_s(entry, work, grads, factor, ewc_lambda, RP)
    if _last(counters, n_items):
        _finish_loss(work, loss, n_items, ewc_lambda, 256)
