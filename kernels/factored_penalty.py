# SPDX-License-Identifier: Apache-2.0
"""The penalty of factored Fishers F = r c^T / sum(c) of all adapters of a model, with its gradients, in one
launch that reads nothing as large as F.

docs/mathematics.md, section 10. The adapters come as a table of pointers and sizes, `table`
[adapters, FIELDS] (int64, columns as named below).
"""

import triton
import triton.language as tl

from .tiles import as_fp32, last, over_slices, rounded, sliced_product

FIELDS = tl.constexpr(22)
LORA_A, LORA_B, SCALE, ROW_SUMS, COLUMN_SUMS = (
    tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
)  # fmt: skip
D_OUT, D_IN, RANK = tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
A_0, A_1, B_0, B_1 = tl.constexpr(8), tl.constexpr(9), tl.constexpr(10), tl.constexpr(11)
SCALE_0, ROW_SUMS_0, COLUMN_SUMS_0 = tl.constexpr(12), tl.constexpr(13), tl.constexpr(14)
GRAD_A, GRAD_B, GRAD_S, SCALAR = tl.constexpr(15), tl.constexpr(16), tl.constexpr(17), tl.constexpr(18)
PART_A, PART_B, PART_S = tl.constexpr(19), tl.constexpr(20), tl.constexpr(21)  # places in `work`


@triton.jit
def _scales(entry, factor, k, TYPE: tl.constexpr):
    """s[k] * factor of an adapter in fp32, 0 from its rank on; without a scale tensor, factor."""
    inside = k < tl.load(entry + RANK)
    s = tl.where(inside, tl.zeros(k.shape, tl.float32) + factor, 0.0)
    address = tl.load(entry + SCALE)
    if address != 0:
        pointer = address.to(tl.pointer_type(TYPE))
        s *= tl.load(pointer + k * tl.load(entry + SCALE_0), mask=inside, other=0.0).to(tl.float32)
    return s


@triton.jit
def _factor(
    pointer, stride_d, stride_r, start, first, size, rank, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    """Columns `start` and on of A, ranks `first` and on: [BLOCK_R, BLOCK] with ALONG, as memory has A; of B,
    whose rows are meant, [BLOCK, BLOCK_R]. Beyond `size` and `rank` it is 0."""
    # Offsets inside a tile are 32 bits wide, and compared with what is left.
    d, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_R)
    left_d, left_k = (size - start).to(tl.int32), (rank - first).to(tl.int32)
    step_d, step_k = stride_d.to(tl.int32), stride_r.to(tl.int32)
    corner = pointer + start * stride_d + first * stride_r
    if ALONG:
        inside = (k < left_k)[:, None] & (d < left_d)[None, :]
        at = k[:, None] * step_k + d[None, :] * step_d
    else:
        inside = (d < left_d)[:, None] & (k < left_k)[None, :]
        at = d[:, None] * step_d + k[None, :] * step_k
    return as_fp32(tl.load(corner + at, mask=inside, other=0.0).to(tl.float32), TYPE, PRECISION)


@triton.jit
def _described(entry, ALONG: tl.constexpr):
    """(size, rank, stride along the size, stride along the rank, sums, their stride) of A (ALONG) or B.

    Read where it is used: what follows from it would otherwise be computed ahead of all loops, and be kept.
    """
    if ALONG:
        size, stride_d, stride_r = tl.load(entry + D_IN), tl.load(entry + A_1), tl.load(entry + A_0)
        sums, sums_0 = tl.load(entry + COLUMN_SUMS), tl.load(entry + COLUMN_SUMS_0)
    else:
        size, stride_d, stride_r = tl.load(entry + D_OUT), tl.load(entry + B_0), tl.load(entry + B_1)
        sums, sums_0 = tl.load(entry + ROW_SUMS), tl.load(entry + ROW_SUMS_0)
    sums = sums.to(tl.pointer_type(tl.float32))
    return size, tl.load(entry + RANK), stride_d, stride_r, sums, sums_0


@triton.jit
def _inverse_sum(entry, BLOCK: tl.constexpr):
    """1 over the sum of the column sums; 0 where that is 0."""
    count, _, _, _, sums, stride = _described(entry, True)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(sums + i * stride, mask=i < count, other=0.0)
    whole = tl.sum(total)
    return tl.where(whole > 0.0, 1.0 / whole, tl.where(whole == whole, 0.0, whole))


@triton.jit
def _gram(
    entry, factors, share, first, second, TYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr, SLICES: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    """sum_d share sums[d] X[d, first + k] X[d, second + l], [BLOCK_R, BLOCK_R], of X = A^T (ALONG) or B. A
    warp has a slice of d, which it multiplies by itself."""
    WIDTH: tl.constexpr = BLOCK // SLICES
    size, rank, stride_d, stride_r, sums, sums_0 = _described(entry, ALONG)
    total = tl.zeros([SLICES, BLOCK_R, BLOCK_R], tl.float32)
    d = tl.arange(0, BLOCK)
    for start in range(0, size, BLOCK):
        within = d < (size - start).to(tl.int32)
        w = tl.load(sums + start * sums_0 + d * sums_0.to(tl.int32), mask=within, other=0.0) * share
        left = _factor(
            factors, stride_d, stride_r, start, first, size, rank, TYPE, PRECISION, BLOCK, BLOCK_R, ALONG
        )
        right = _factor(
            factors, stride_d, stride_r, start, second, size, rank, TYPE, PRECISION, BLOCK, BLOCK_R, ALONG
        )
        if ALONG:
            left = rounded(left * w[None, :], PRECISION).reshape(BLOCK_R, SLICES, WIDTH).permute(1, 0, 2)
            right = rounded(right, PRECISION).reshape(BLOCK_R, SLICES, WIDTH).permute(1, 2, 0)
        else:
            left = rounded(left * w[:, None], PRECISION).reshape(SLICES, WIDTH, BLOCK_R).permute(0, 2, 1)
            right = rounded(right, PRECISION).reshape(SLICES, WIDTH, BLOCK_R)
        total = sliced_product(left, right, total, PRECISION)
    return over_slices(total, SLICES, BLOCK_R, BLOCK_R)


@triton.jit
def _gradient(
    entry, factors, share, products, to, TYPE: tl.constexpr, PRECISION: tl.constexpr, RP: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, SLICES: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    """to[k, d] = share sums[d] sum_l products[k, l] X[d, l] of X = A^T (ALONG), or to[d, k] of B. `products`
    [RP, RP] are symmetric."""
    WIDTH: tl.constexpr = BLOCK // SLICES
    ranks = RP if RP == BLOCK_R else tl.load(entry + RANK)
    i, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK)
    for first in range(0, ranks, BLOCK_R):
        size, rank, stride_d, stride_r, sums, sums_0 = _described(entry, ALONG)
        inside = i < (rank - first).to(tl.int32)
        for start in range(0, size, BLOCK):
            within = d < (size - start).to(tl.int32)
            w = tl.load(sums + start * sums_0 + d * sums_0.to(tl.int32), mask=within, other=0.0) * share
            if ALONG:
                total = tl.zeros([SLICES, BLOCK_R, WIDTH], tl.float32)
            else:
                total = tl.zeros([SLICES, WIDTH, BLOCK_R], tl.float32)
            for second in range(0, ranks, BLOCK_R):
                p = tl.load(products + first * RP + second + i[:, None] * RP + i[None, :])
                p = rounded(p, PRECISION)
                p = p[None, :, :].broadcast_to(SLICES, BLOCK_R, BLOCK_R)
                x = _factor(
                    factors, stride_d, stride_r, start, second, size, rank, TYPE, PRECISION, BLOCK, BLOCK_R,
                    ALONG,
                )  # fmt: skip
                if ALONG:
                    x = rounded(x, PRECISION).reshape(BLOCK_R, SLICES, WIDTH).permute(1, 0, 2)
                    total = sliced_product(p, x, total, PRECISION)
                else:
                    x = rounded(x, PRECISION).reshape(SLICES, WIDTH, BLOCK_R)
                    total = sliced_product(x, p.permute(0, 2, 1), total, PRECISION)
            if ALONG:
                grad = total.permute(1, 0, 2).reshape(BLOCK_R, BLOCK) * w[None, :]
                at = i[:, None] * size.to(tl.int32) + d[None, :]
                tl.store(to + first * size + start + at, grad, mask=inside[:, None] & within[None, :])
            else:
                grad = total.reshape(BLOCK, BLOCK_R) * w[:, None]
                at = d[:, None] * rank.to(tl.int32) + i[None, :]
                tl.store(to + start * rank + first + at, grad, mask=within[:, None] & inside[None, :])


@triton.jit
def _finish(work, loss, adapters, ewc_lambda, BLOCK: tl.constexpr):
    """P = lambda/2 times the sum over all adapters, in fp64."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, adapters, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(work + i, mask=i < adapters, other=0.0, cache_modifier=".cg").to(tl.float64)
    tl.store(loss, (tl.sum(total) * 0.5 * ewc_lambda).to(tl.float32))


@triton.jit(do_not_specialize=["adapters"])
def factored_penalty_kernel(
    table, factors, items, work, counters, loss, grads, adapters, ewc_lambda,
    NEED_A: tl.constexpr, NEED_B: tl.constexpr, NEED_S: tl.constexpr, RP: tl.constexpr, A_TYPE: tl.constexpr,
    B_TYPE: tl.constexpr, SCALE_TYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """loss = lambda/2 sum_kl s_k s_l M_kl N_kl over all adapters, M = B^T diag(r) B and
    N = A diag(c) A^T / sum(c), and dA, dB, ds as needed, into flat `grads`.

    A program has one adapter, the one that `items` names: it makes M and N, BLOCK_R x BLOCK_R of them at a
    time, puts s M s and s N s into `work`, and multiplies A and B by them in a second pass, which finds both
    in the second-level cache. The last program adds up the losses, in order. `counters` are 0 before and
    after.
    """
    index = tl.load(items + tl.program_id(0))
    entry = table + index * FIELDS
    factor = tl.load(factors + index)
    rank = tl.load(entry + RANK)
    lora_a = tl.load(entry + LORA_A).to(tl.pointer_type(A_TYPE))
    lora_b = tl.load(entry + LORA_B).to(tl.pointer_type(B_TYPE))
    share = _inverse_sum(entry, BLOCK)
    of_a, of_b = work + tl.load(entry + PART_A), work + tl.load(entry + PART_B)
    of_s = work + tl.load(entry + PART_S)

    ranks = RP if RP == BLOCK_R else rank  # no loop where one block has them all
    i = tl.arange(0, BLOCK_R)
    value = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, ranks, BLOCK_R):
        k = first + i
        s_k = _scales(entry, factor, k, SCALE_TYPE)
        ds = tl.zeros([BLOCK_R], tl.float32)
        for second in range(0, ranks, BLOCK_R):
            m = _gram(entry, lora_b, 1.0, first, second, B_TYPE, PRECISION, BLOCK, BLOCK_R, SLICES, False)
            n = _gram(entry, lora_a, share, first, second, A_TYPE, PRECISION, BLOCK, BLOCK_R, SLICES, True)
            s_l = _scales(entry, factor, second + i, SCALE_TYPE)
            # A sum of bare products over lanes: each would add its own unrounded, and they would disagree
            # about the last bit of what all of them hold.
            inside = (k < rank)[:, None] & (second + i < rank)[None, :]
            ds += tl.sum(tl.where(inside, m * n * s_l[None, :], 0.0), 1)
            at = k[:, None] * RP + (second + i)[None, :]
            both = s_k[:, None] * s_l[None, :]
            if NEED_A:
                tl.store(of_a + at, m * both)
            if NEED_B:
                tl.store(of_b + at, n * both)
        value += tl.where(k < rank, ds * s_k, 0.0)
        if NEED_S:
            tl.store(of_s + k, ds)
    tl.store(work + tl.program_id(0), tl.sum(value))
    tl.debug_barrier()  # the threads of this program read what others of it have stored
    if NEED_A:
        _gradient(
            entry, lora_a, share * ewc_lambda, of_a, grads + tl.load(entry + GRAD_A), A_TYPE, PRECISION, RP,
            BLOCK, BLOCK_R, SLICES, True,
        )  # fmt: skip
    if NEED_B:
        _gradient(
            entry, lora_b, ewc_lambda, of_b, grads + tl.load(entry + GRAD_B), B_TYPE, PRECISION, RP, BLOCK,
            BLOCK_R, SLICES, False,
        )  # fmt: skip
    if NEED_S:
        if tl.load(entry + GRAD_S) >= 0:
            k = tl.arange(0, RP)
            ds = tl.load(of_s + k, mask=k < rank, other=0.0) * (factor * ewc_lambda)
            to = grads + tl.load(entry + GRAD_S)
            if tl.load(entry + SCALAR) != 0:
                tl.store(to, tl.sum(tl.where(k < rank, ds, 0.0)))  # no bare products, as above
            else:
                tl.store(to + k, ds, mask=k < rank)
    if last(counters, adapters):
        _finish(work, loss, adapters, ewc_lambda, 256)
