# SPDX-License-Identifier: Apache-2.0
"""Orders of samples in a tensor, and what is found when two samples are compared with themselves alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fused_ewclora.ops.capture import FisherCapture
from fused_ewclora.ops.sample_order import Ends, Order, orders

SIZES = st.integers(1, 4)


def arranged(samples: torch.Tensor, order: Order) -> torch.Tensor:
    """The tensor whose samples `[N, ...]` are in an order, one entry after the other."""
    count, rows = samples.shape[0], order.rows
    entries = [
        samples.select(order.dim + 1, i)[n]
        for n, i in (
            ((place % count, place // count) if order.minor else (place // rows, place % rows))
            for place in range(count * rows)
        )
    ]
    return torch.stack(entries, dim=order.dim)


@given(st.integers(2, 4), SIZES, SIZES, st.integers(0, 1), st.booleans())
def test_round_trip(count, height, width, dim, minor):
    """`samples_first` undoes every order, without a copy, and comparing finds exactly that order."""
    samples = torch.randn(count, height, width, 3, dtype=torch.float64)
    rows = samples.shape[dim + 1]
    order = Order(dim, rows, minor and rows > 1)
    tensor = arranged(samples, order)
    view = order.samples_first(tensor, count)
    assert torch.equal(view, samples)
    assert view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    assert order in list(orders(tensor.shape, count)) and order.fits(tensor.shape, count)
    compared = Ends.of(tensor, count).compared(samples[0], samples[-1])
    assert [o for o, difference in compared.items() if difference == 0] == [order]


@given(st.integers(1, 4), st.lists(SIZES, max_size=2), SIZES, st.booleans())
def test_leading_samples(count, others, rows, turned):
    """A capture takes samples that lead, the usual order, as every order is taken."""
    tensor = torch.randn(count * rows, *others, 3)
    if turned:
        tensor = torch.randn(3, *others, count * rows).movedim((0, -1), (-1, 0))
    found = FisherCapture([], [], batch_size=count)._call(tensor, tensor, None).x
    expected = Order(0, rows).samples_first(tensor, count)
    assert torch.equal(found, expected.reshape(count, -1, 3))


def test_large_row():
    """One row of large norm, an attention sink, does not hide that the others are of another sample."""
    samples = torch.randn(2, 8, 3)
    samples[:, 0] = 1e6
    tensor = samples.flatten(0, 1)
    compared = Ends.of(tensor, 2).compared(samples[0], samples[-1])
    assert compared[Order(0, 8)] == 0 and compared[Order(0, 8, minor=True)] > 0.5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_finite(bad):
    """NaN and Inf, which the pass reports itself, do not hide the order."""
    samples = torch.randn(3, 4, 5)
    samples[0, 1] = bad
    compared = Ends.of(samples.flatten(0, 1), 3).compared(samples[0], samples[-1])
    assert compared[Order(0, 4)] == 0 and compared[Order(0, 4, minor=True)] > 0.1


def test_lost_dimension():
    """A model that squeezes its input gives one sample alone without the leading dimension."""
    samples = torch.randn(4, 3, 5)
    compared = Ends.of(samples, 4).compared(samples[0], samples[-1])
    assert compared == {Order(0, 1): 0}
