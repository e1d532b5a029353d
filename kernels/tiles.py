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
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32. PRECISION is how fp32 operands pass the matrix units: "tf32", "tf32x3", or "bf16"
    to round them; narrower operands are exact."""
    if INTERPRETED:
        acc += tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif PRECISION == "bf16":
        acc = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
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
