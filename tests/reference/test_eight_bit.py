# SPDX-License-Identifier: Apache-2.0
"""Fishers in 8 bits: how far codes are off, and that rounding at random is without bias."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Values, layouts, seeds, widths
from torch import Tensor

from fused_ewclora.errors import ArgumentError, DtypeError
from fused_ewclora.fishers import EightBitFisher
from fused_ewclora.reference import eight_bit

BLOCK, LEVELS = eight_bit.BLOCK, eight_bit.LEVELS


def scales_of(fisher: EightBitFisher) -> Tensor:
    """The scale of every value, fp64."""
    blocks = -(-fisher.columns // BLOCK)
    stored = fisher.codes[:, BLOCK * blocks : (BLOCK + 2) * blocks].contiguous().view(torch.bfloat16)
    return stored.double().repeat_interleave(BLOCK, dim=1)[:, : fisher.columns]


def gaps(values: Tensor, scales: Tensor) -> Tensor:
    """Between the two levels beside each value."""
    units = torch.where(scales > 0, values.double() / scales, torch.zeros_like(scales))
    return scales * (2 * units.sqrt().floor() + 1)


@given(rows=st.integers(0, 5), columns=widths, seed=seeds, layout=layouts, power=st.integers(-80, 60))
def test_nearest_level(rows, columns, seed, layout, power):
    """The nearer of two levels, of which the largest is at least the largest value and hardly more."""
    values = Values(seed).fisher(rows, columns, layout=layout) * 2.0**power
    fisher = EightBitFisher.encode(values)
    assert fisher.codes.shape == (rows, eight_bit.row_bytes(columns)) and fisher.codes.shape[1] % 16 == 0
    found, scales = fisher.dense(), scales_of(fisher)
    assert found.dtype == torch.float32 and not found.isnan().any()
    errors = (found.double() - values.double()).abs()
    assert bool((errors <= 0.5 * gaps(values, scales) * (1 + 1e-5)).all())
    if rows:
        assert bool((scales * LEVELS**2 >= values.double()).all())
        assert bool(((found == 0) == (values.double() <= 0.5 * scales)).all())


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 100, 256])
def test_padding_is_zero(columns):
    """What lies behind the values is zero, and 256 columns take 1.07 bytes each."""
    codes = EightBitFisher.encode(Values(1).fisher(3, columns) + 1.0).codes
    blocks = -(-columns // BLOCK)
    assert not codes[:, columns : BLOCK * blocks].any() and not codes[:, (BLOCK + 2) * blocks :].any()
    if columns == 256:
        assert codes.shape[1] <= 1.07 * columns


def test_unbiased():
    """The mean over seeds is the value, within six standard deviations of it."""
    values, many = Values(1).fisher(2, 45), 200
    drawn = torch.stack([EightBitFisher.encode(values, seed=7 * n + 1).dense() for n in range(many)])
    gap = gaps(values, scales_of(EightBitFisher.encode(values)))
    assert bool(((drawn.double() - values.double()).abs() <= gap * (1 + 1e-5)).all())
    error = (drawn.double().mean(0) - values.double()).abs()
    assert bool((error <= 6 * 0.5 * gap / math.sqrt(many) + 1e-7 * values).all())


def test_independent_choices():
    """The choices for neighbours, for rows and for seeds have nothing to do with each other."""
    values = torch.full((64, 256), 0.5 * 100.5**2)
    values[:, ::BLOCK] = LEVELS**2
    coins = [
        EightBitFisher.encode(values, seed=s).dense().reshape(64, -1, BLOCK)[:, :, 1:].flatten(1)
        for s in (1, 2)
    ]
    high = torch.stack([(coin > values[0, 1]).double() for coin in coins]) * 2 - 1
    high = high - high.mean()
    one, two = high
    limit = 6 / math.sqrt(one.numel())
    for a, b in ((one[:, 1:], one[:, :-1]), (one[1:], one[:-1]), (one, two)):
        assert abs(float((a * b).mean() / high.square().mean())) < limit


@given(seed=seeds, cut=st.integers(0, 9), chosen=st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)))
def test_pieces_of_rows(seed, cut, chosen):
    """Pieces of the rows, told where they begin, have the codes of the whole."""
    values = Values(seed).fisher(9, 45)
    whole = EightBitFisher.encode(values, chosen).codes
    pieces = [
        EightBitFisher.encode(part, chosen, row).codes
        for part, row in ((values[:cut], 0), (values[cut:], cut))
    ]
    assert torch.equal(torch.cat(pieces), whole)


def test_many_rows(monkeypatch):
    """Conversion in several steps gives the codes of one."""
    values = Values(3).fisher(11, 45)
    whole = EightBitFisher.encode(values, seed=5).codes
    monkeypatch.setattr(eight_bit, "_WORK", 100)
    assert torch.equal(EightBitFisher.encode(values, seed=5).codes, whole)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("seed", [None, 3])
def test_not_finite(value, seed):
    """A block with NaN or Inf becomes NaN, others stay as they were."""
    values = Values(4).fisher(3, 70)
    expected = EightBitFisher.encode(values, seed).dense()
    values[1, 40] = value
    found = EightBitFisher.encode(values, seed).dense()
    assert found[1, 32:64].isnan().all()
    expected[1, 32:64] = found[1, 32:64]
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e30, 1e37, 3.4e38])
@pytest.mark.parametrize("seed", [None, 3])
def test_extremes(size, seed):
    """Tiny values become zero or a level near them; huge ones stay finite."""
    values = torch.tensor([[size, 0.5 * size, 0.0] + [0.0] * 29 + [1.0, 1e-12]])
    fisher = EightBitFisher.encode(values, seed)
    found, scales = fisher.dense(), scales_of(fisher)
    assert found.isfinite().all() and not found[0, 2:32].any()
    assert bool(((found.double() - values.double()).abs() <= gaps(values, scales) * (1 + 1e-5)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    """Fishers of other floating-point types are those of their fp32 values."""
    values = Values(6).fisher(5, 100).to(dtype)
    assert torch.equal(EightBitFisher.encode(values).codes, EightBitFisher.encode(values.float()).codes)


def test_refused():
    """Integers and other shapes are refused."""
    with pytest.raises(ArgumentError, match=r"^fisher: expected a matrix, got shape \[3\]"):
        EightBitFisher.encode(torch.zeros(3))
    with pytest.raises(DtypeError, match=r"^fisher: expected a floating-point tensor, got torch.int32"):
        EightBitFisher.encode(torch.zeros(3, 3, dtype=torch.int32))
