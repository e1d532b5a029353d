# SPDX-License-Identifier: Apache-2.0
"""Merging adapters into weights, and soft thresholding, a few tensors per launch: they come as tuples."""

import triton
import triton.language as tl

from .tiles import cast, dot, load_tile, store_tile


@triton.jit
def merge_kernel(
    weights, lora_as, lora_bs, scales, factors, d_outs, d_ins, ranks,
    strides_w0, strides_w1, strides_a0, strides_a1, strides_b0, strides_b1, strides_s,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W_i += B_i diag(s_i f_i) A_i for W [d_out, d_in], A [r, d_in], B [d_out, r], s [r] or None, f a number.

    Program (t, i) owns tile t of W_i. The products are those of fp32 numbers, summed in fp32, BLOCK_R ranks
    after another (PRECISION is "tf32x3" or "ieee": W outlives the step); W is added to the sum, which is
    rounded once.
    """
    for i in tl.static_range(len(weights)):
        tiles_n = tl.cdiv(d_ins[i], BLOCK_N)
        row, column = tl.program_id(0) // tiles_n * BLOCK_M, tl.program_id(0) % tiles_n * BLOCK_N
        if (tl.program_id(1) == i) & (row < d_outs[i]):
            # On its way while the factors are fetched and multiplied.
            weight = load_tile(
                weights[i], row, column, d_outs[i], d_ins[i], strides_w0[i], strides_w1[i],
                BLOCK_M, BLOCK_N, False,
            )  # fmt: skip
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for first in range(0, ranks[i], BLOCK_R):
                k = first + tl.arange(0, BLOCK_R)
                a = load_tile(
                    lora_as[i], first, column, ranks[i], d_ins[i], strides_a0[i], strides_a1[i],
                    BLOCK_R, BLOCK_N, False,
                ).to(tl.float32)  # fmt: skip
                b = load_tile(
                    lora_bs[i], row, first, d_outs[i], ranks[i], strides_b0[i], strides_b1[i],
                    BLOCK_M, BLOCK_R, False,
                ).to(tl.float32)  # fmt: skip
                s = tl.zeros([BLOCK_R], tl.float32) + factors[i]
                if scales[i] is not None:
                    places = scales[i] + k.to(tl.int64) * strides_s[i]
                    s *= tl.load(places, mask=k < ranks[i], other=0.0).to(tl.float32)
                total = dot(b * s[None, :], a, total, PRECISION)
            total += weight.to(tl.float32)
            store_tile(
                weights[i], total, row, column, d_outs[i], d_ins[i], strides_w0[i], strides_w1[i],
                BLOCK_M, BLOCK_N,
            )  # fmt: skip


@triton.jit
def soft_threshold_kernel(scales, sizes, strides, kappa, BLOCK: tl.constexpr):
    """s_i = sign(s_i) max(|s_i| - kappa, 0) in fp32, rounded once; NaN stays NaN. Program (j, i) owns BLOCK
    elements of s_i."""
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(len(scales)):
        if tl.program_id(1) == i:
            places = scales[i] + j.to(tl.int64) * strides[i]
            s = tl.load(places, mask=j < sizes[i], other=0.0).to(tl.float32)
            zero_or_nan = tl.where(s == s, 0.0, s)
            s = tl.where(s > kappa, s - kappa, tl.where(s < -kappa, s + kappa, zero_or_nan))
            tl.store(places, cast(s, scales[i].dtype.element_ty), mask=j < sizes[i])
