# SPDX-License-Identifier: Apache-2.0
"""Helpers that kernels share: tiles of matrices, matrix-unit products, the order of output tiles, dropout.

A matrix arrives as a tensor descriptor (`TMA`: the bulk copy engine fetches tiles, what lies outside reads as
zero) or as a pointer with strides, masked here to read zero outside. Offsets to a tile's corner are 64 bits
wide, those inside a tile 32.
"""

import triton
import triton.language as tl

# The interpreter multiplies the bit patterns of bf16 operands: there they are widened first.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def cast(tile, TYPE: tl.constexpr):
    """`tile` rounded to TYPE. The interpreter would cut off the low bits of a bf16 number instead."""
    if INTERPRETED:
        if TYPE == tl.bfloat16:
            wide = tile.to(tl.float32)
            bits = wide.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            tile = tl.where(wide == wide, bits.to(tl.float32, bitcast=True), wide)
    return tile.to(TYPE)


@triton.jit
def load_tile(
    matrix, row, column, rows, columns, stride_row, stride_column,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The tile [BLOCK_ROWS, BLOCK_COLUMNS] of `matrix` [rows, columns] whose corner is (row, column)."""
    if TMA:
        tile = matrix.load([row, column])
    else:
        i = tl.arange(0, BLOCK_ROWS)
        j = tl.arange(0, BLOCK_COLUMNS)
        corner = matrix + tl.cast(row, tl.int64) * stride_row + tl.cast(column, tl.int64) * stride_column
        inside = (row + i < rows)[:, None] & (column + j < columns)[None, :]
        tile = tl.load(corner + i[:, None] * stride_row + j[None, :] * stride_column, mask=inside, other=0.0)
    return tile


@triton.jit
def store_tile(
    matrix, tile, row, column, rows, columns, stride_row, stride_column,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the part of `tile` that lies inside `matrix` [rows, columns], in the dtype of `matrix`."""
    i = tl.arange(0, BLOCK_ROWS)
    j = tl.arange(0, BLOCK_COLUMNS)
    corner = matrix + tl.cast(row, tl.int64) * stride_row + tl.cast(column, tl.int64) * stride_column
    inside = (row + i < rows)[:, None] & (column + j < columns)[None, :]
    places = corner + i[:, None] * stride_row + j[None, :] * stride_column
    tl.store(places, cast(tile, matrix.dtype.element_ty), mask=inside)


@triton.jit
def _tf32(tile):
    """fp32 numbers rounded to nearest among those of tf32. Matrix units cut them off instead, which makes
    products smaller than the exact ones by 2^-11 on average."""
    return tl.inline_asm_elementwise(
        "cvt.rna.tf32.f32 $0, $1;", "=r,r", [tile], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def rounded(tile, PRECISION: tl.constexpr):
    """An operand of `dot_rounded`, in the form that is worth having once for several products."""
    if not INTERPRETED:
        if tile.dtype == tl.float32:
            if PRECISION == "bf16":
                tile = tile.to(tl.bfloat16)
            elif PRECISION == "tf32":
                tile = _tf32(tile)
    return tile


@triton.jit
def as_fp32(tile, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """`tile` itself, fp32, computed from numbers of TYPE. Triton gives fp32 operands of a product another
    layout where it finds that they were 16 bits wide once; it does not see past this."""
    if not INTERPRETED:
        if PRECISION == "tf32" or PRECISION == "tf32x3":
            if TYPE.primitive_bitwidth < 32:
                tile = tl.inline_asm_elementwise(
                    "mov.b32 $0, $1;", "=r,r", [tile], dtype=tl.float32, is_pure=False, pack=1
                )
    return tile


@triton.jit
def dot_rounded(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32, of `rounded` operands. Of "tf32x3" it needs fewer registers than `dot`; an operand
    that is Inf makes NaN there."""
    if INTERPRETED:
        acc += tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif a.dtype != tl.float32:
        acc = tl.dot(a, b, acc)
    elif PRECISION == "tf32x3":  # what rounding left, which the units may cut off, and small terms first
        a_big, b_big = _tf32(a), _tf32(b)
        acc = tl.dot(a - a_big, b_big, acc, input_precision="tf32")
        acc = tl.dot(a_big, b - b_big, acc, input_precision="tf32")
        acc = tl.dot(a_big, b_big, acc, input_precision="tf32")
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def sliced_product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b for every slice. One of several belongs to a warp; a single one is shared by all warps, which
    Triton does for matrices only."""
    if a.shape[0] == 1:
        m: tl.constexpr = a.shape[1]
        k: tl.constexpr = a.shape[2]
        n: tl.constexpr = b.shape[2]
        a, b, acc = a.reshape(m, k), b.reshape(k, n), acc.reshape(m, n)
        acc = dot_rounded(a, b, acc, PRECISION).reshape(1, m, n)
    else:
        acc = dot_rounded(a, b, acc, PRECISION)
    return acc


@triton.jit
def over_slices(parts, SLICES: tl.constexpr, BLOCK_M: tl.constexpr, RP: tl.constexpr):
    """Sum of `parts` [SLICES, BLOCK_M, RP] over the first dimension, in pairs. `tl.sum` over warps would pass
    shared memory one number at a time."""
    tl.static_assert(SLICES <= 8)
    if SLICES == 1:
        total = parts.reshape(BLOCK_M, RP)
    else:
        left, right = parts.permute(1, 2, 0).reshape(BLOCK_M, RP, SLICES // 2, 2).split()
        if SLICES > 2:
            left, right = (left + right).reshape(BLOCK_M, RP, SLICES // 4, 2).split()
        if SLICES > 4:
            left, right = (left + right).reshape(BLOCK_M, RP, SLICES // 8, 2).split()
        total = (left + right).reshape(BLOCK_M, RP)
    return total


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32. PRECISION is how fp32 operands pass the matrix units: "tf32", "tf32x3", or "bf16"
    to round them; narrower operands are exact."""
    a, b = rounded(a, PRECISION), rounded(b, PRECISION)
    if INTERPRETED:
        acc += tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif a.dtype == tl.float32:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def last(counter, count):
    """Whether this program is the last of `count` to arrive. What the others stored before they arrived is
    then visible; the counter is left at 0 for the next launch."""
    tl.debug_barrier()  # every thread's stores come before the one thread's atomic
    is_last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1
    if is_last:
        tl.store(counter, 0)
    tl.debug_barrier()
    return is_last


@triton.jit
def add_parts(places, mask, count, stride, AT_ONCE: tl.constexpr):
    """Sum of `count` tiles at `places`, `stride` apart, in order. AT_ONCE loads are under way together;
    they pass by the first-level cache, which may be stale."""
    total = tl.zeros(places.shape, tl.float32)
    for first in tl.range(0, count, AT_ONCE, num_stages=1):
        for k in tl.static_range(AT_ONCE):
            part = places + tl.cast(first + k, tl.int64) * stride
            tile = tl.load(part, mask=mask & (first + k < count), other=0.0, cache_modifier=".cg")
            total += tile.to(tl.float32)
    return total


@triton.jit
def grouped_tile(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(tile row, tile column) of program `index`: columns inside groups of GROUP_M rows, so that programs
    that run side by side share operands in the second-level cache."""
    in_group = GROUP_M * tiles_n
    first = index // in_group * GROUP_M
    size = min(tiles_m - first, GROUP_M)
    return first + index % in_group % size, index % in_group // size


@triton.jit
def keep_mask(seed, threshold, row, column, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Which elements of a tile dropout keeps: word column % 4 of the Philox4x32-10 block with counter
    (column // 4, row mod 2^32, row div 2^32, 0) and the halves of `seed` as key is >= threshold
    (docs/mathematics.md, section 10). `column` is a multiple of 4."""
    i = tl.cast(row, tl.int64) + tl.arange(0, BLOCK_ROWS)[:, None]
    j = (column // 4 + tl.arange(0, BLOCK_COLUMNS // 4))[None, :]
    blocks = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS // 4], tl.uint32)
    low = blocks + (i & 0xFFFFFFFF).to(tl.uint32)
    high = blocks + (i >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, blocks + j.to(tl.uint32), low, high, blocks)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return words >= tl.cast(threshold, tl.uint32)
