# SPDX-License-Identifier: Apache-2.0
"""Merging and thresholding in CUDA: neither how many tensors a launch takes nor how rows are read shows."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from strategies import Values
from tolerance import EPS, assert_within, rounding_bound, sum_bound

import fused_ewclora as fe
from fused_ewclora import functional as FE

REASON = fe.available_backends()["cuda"]
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=f"cuda: {REASON}"),
    pytest.mark.usefixtures("poisoned_memory"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_merged(weight: torch.Tensor, before: torch.Tensor, *factors: torch.Tensor) -> None:
    exact = oracles.merged(before, *factors)
    wide = oracles.merged(*map(oracles.magnitude, (before, *factors)))
    bound = sum_bound(wide, factors[0].shape[0], weight.dtype, "cuda")
    if weight.dtype != torch.float32:
        bound = bound + rounding_bound(exact.abs() + bound, weight.dtype)
    assert_within(weight, exact, bound, "weight")


def test_many_weights():
    """A call may merge more weights than one launch takes."""
    values = Values(1, "cuda")
    shapes = [(1 + 7 * i % 40, 1 + 11 * i % 50) for i in range(35)]
    weights = [values.normal(*shape, dtype=DTYPES[i % 3]) for i, shape in enumerate(shapes)]
    lora_as = [values.normal(3, columns) for _, columns in shapes]
    lora_bs = [values.normal(rows, 3) for rows, _ in shapes]
    scale = values.normal(3)
    before = [w.clone() for w in weights]
    FE.merge_(weights, lora_as, lora_bs, scale, backend="cuda")
    for entry in zip(weights, before, lora_as, lora_bs, strict=True):
        assert_merged(*entry, scale)


def test_overlapping_rows_in_order():
    """Wherever they begin; in bf16 the order of the roundings shows."""
    values = Values(4, "cuda")
    packed = values.normal(120, 264, dtype=torch.bfloat16)
    rows = [slice(start, start + 60) for start in (0, 30, 8, 55, 59, 1, 60, 31, 2, 40)]
    lora_as, lora_bs = [values.normal(3, 264) for _ in rows], [values.normal(60, 3) for _ in rows]
    expected = packed.clone()
    for i, r in enumerate(rows):
        FE.merge_(expected[r], lora_as[i], lora_bs[i], 0.5, backend="cuda")
    FE.merge_([packed[r] for r in rows], lora_as, lora_bs, 0.5, backend="cuda")
    assert torch.equal(packed, expected)


def test_many_scales():
    """A call may have more scales than one launch takes."""
    values = Values(2, "cuda")
    scales = [values.normal(1 + 37 * i % 60, dtype=DTYPES[i % 3]) for i in range(130)]
    expected = [oracles.soft_threshold(s, 0.4) for s in scales]
    FE.soft_threshold_(scales, 0.4, backend="cuda")
    for scale, exact in zip(scales, expected, strict=True):
        bound = rounding_bound(exact, scale.dtype) + EPS[torch.float32]
        assert_within(scale, exact, bound, f"scale {scale.dtype}")


@pytest.mark.parametrize("rank", [3, 16, 17, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_may_have_strides(dtype, rank):
    values = Values(rank, "cuda")
    weight, a, b = values.normal(40, 33, dtype=dtype), values.normal(rank, 33), values.normal(40, rank)
    scale = values.normal(rank, layout="every other column")
    before = weight.clone()
    FE.merge_(weight, a, b, scale, backend="cuda")
    assert_merged(weight, before, a, b, scale)


# Where W begins in rows of a wider matrix, how far those are apart, and how many columns are W's.
@pytest.mark.parametrize("place", [(8, 320, 264), (8, 320, 261), (8, 321, 264), (9, 320, 264)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_surroundings_untouched(dtype, transposed, place):
    """NaN; rows end and begin at multiples of 16 bytes, or between them."""
    (start, pitch, columns), values = place, Values(3, "cuda")
    buffer = torch.full((50, pitch), math.nan, dtype=dtype, device=values.device)
    inside = buffer[5:42, start : start + columns].copy_(values.normal(37, columns, dtype=dtype))
    weight = inside.T if transposed else inside
    a, b = values.normal(5, weight.shape[1]), values.normal(weight.shape[0], 5)
    before = weight.clone()
    FE.merge_(weight, a, b, 0.5, backend="cuda")
    assert_merged(weight, before, a, b, torch.tensor(0.5))
    inside.fill_(math.nan)
    assert bool(buffer.isnan().all())
