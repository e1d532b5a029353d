# SPDX-License-Identifier: Apache-2.0
"""Folding adapters into weights with one rounding, and soft thresholding of scales."""

from __future__ import annotations

import math
from typing import Any

import oracles
import pytest
import torch
from hypothesis import strategies as st
from strategies import (
    BACKENDS,
    LOW_PRECISION,
    RANKS,
    Values,
    device_of,
    dtypes_of,
    layouts,
    property_test,
    seeds,
    widths,
)
from tolerance import EPS, accumulation, assert_within, rounding_bound, sum_bound

from fused_ewclora import functional as FE

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.parametrize("backend", BACKENDS)]
own_layouts = layouts.filter(lambda name: name != "expanded")  # written to: every element needs its own place


@st.composite
def merges(draw: Any, backend: str) -> tuple[Any, ...]:
    """weight, A, B, scale."""
    dtype = draw(st.sampled_from(dtypes_of(backend, "merge_")))
    master = draw(st.sampled_from((dtype, torch.float32))) if dtype in LOW_PRECISION else dtype
    values, d_out, d_in, r = (
        Values(draw(seeds), backend),
        draw(widths),
        draw(widths),
        draw(st.sampled_from(RANKS)),
    )
    weight = values.normal(d_out, d_in, dtype=dtype, layout=draw(own_layouts))
    a = values.normal(r, d_in, dtype=master, layout=draw(layouts))
    b = values.normal(d_out, r, dtype=master, layout=draw(layouts))
    shape = draw(st.sampled_from((None, (), (r,))))
    return weight, a, b, 0.75 if shape is None else values.normal(*shape, dtype=master)


@property_test(data=st.data(), threads=st.sampled_from((1, 2, 3)))
def test_one_rounding(backend, data, threads):
    """The sum is that of fp64 to one rounding."""
    torch.set_num_threads(threads)
    weight, a, b, scale = data.draw(merges(backend))
    exact = oracles.merged(weight, a, b, scale)
    wide = oracles.merged(*map(oracles.magnitude, (weight, a, b, scale)))
    dtype = weight.dtype
    assert FE.merge_(weight, a, b, scale, backend=backend) is weight
    # sums in fp32; half a unit in the last place of the result, and no second rounding in between
    bound = sum_bound(wide, a.shape[0], dtype, backend)
    if dtype != accumulation(dtype):
        bound = bound + rounding_bound(exact.abs() + bound, dtype)
    assert_within(weight, exact, bound, "weight")


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@property_test(seed=seeds, d_in=widths, d_out=widths)
def test_low_precision_bitwise(backend, dtype, seed, d_in, d_out):
    """Factors of few bits make fp32 sums exact in any order, so that rounding alone remains."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(-8, 9, (7, d_in), generator=generator) / 64.0
    b = torch.randint(-8, 9, (d_out, 7), generator=generator) / 64.0
    weight = torch.randn(d_out, d_in, generator=generator).mul(1024).round().div(1024).to(dtype)
    once = (weight.double() + 0.5 * b.double() @ a.double()).to(dtype)
    weight, a, b = (t.to(device_of(backend)) for t in (weight, a, b))
    assert torch.equal(FE.merge_(weight, a, b, 0.5, backend=backend).cpu(), once)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
def test_row_slices(backend, dtype):
    """Row slices are merged in place and other rows keep their bits."""
    values = Values(1, backend)
    packed, a, b = values.normal(96, 33, dtype=dtype), values.normal(5, 33), values.normal(32, 5)
    before = packed.clone()
    expected = FE.merge_(before[32:64].clone(), a, b, 2.0, backend=backend)
    FE.merge_(packed[32:64], a, b, 2.0, backend=backend)
    assert torch.equal(packed[32:64], expected)
    assert torch.equal(packed[:32], before[:32]) and torch.equal(packed[64:], before[64:])


def test_strided_view(backend):
    """Elements between the columns of a view keep their bits."""
    buffer = torch.full((9, 40), math.nan, device=device_of(backend))
    view = buffer[:, 3:34:2].zero_()
    FE.merge_(view, buffer.new_ones(2, 16), buffer.new_ones(9, 2), backend=backend)
    assert torch.equal(view, torch.full_like(view, 2.0))
    outside = torch.ones(40, dtype=torch.bool, device=buffer.device)
    outside[3:34:2] = False
    assert bool(buffer[:, outside].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
def test_zero_b(backend, dtype):
    """A B of zeros changes no bit."""
    weight = Values(2, backend).normal(31, 47, dtype=dtype)
    before = weight.clone()
    a, b = (torch.full(shape, v, device=weight.device) for shape, v in (((3, 47), 1.0), ((31, 3), 0.0)))
    FE.merge_(weight, a, b, 1e7, backend=backend)
    assert torch.equal(weight, before)


def test_equals_adapter(backend):
    """A merged weight computes what the adapter computed."""
    values = Values(3, backend)
    x, w, a, b, s = (values.normal(*shape) for shape in ((20, 31), (17, 31), (5, 31), (17, 5), (5,)))
    with_adapter = FE.lora_linear(x, w, None, a, b, s, backend=backend)
    wide = oracles.magnitude(x) @ oracles.merged(*map(oracles.magnitude, (w, a, b, s))).T
    merged = x @ FE.merge_(w, a, b, s, backend=backend).T
    assert_within(
        merged, with_adapter.double().cpu(), 2 * sum_bound(wide, 31 + 5, torch.float32, backend), "output"
    )


def test_no_graph(backend):
    """Parameters that require gradients are merged without a graph."""
    weight = torch.nn.Parameter(torch.zeros(7, 5, device=device_of(backend)))
    a, b = weight.new_ones(2, 5, requires_grad=True), weight.new_ones(7, 2, requires_grad=True)
    FE.merge_(weight, a, b, backend=backend)
    assert weight.is_leaf and weight.requires_grad and float(weight.detach().sum()) == 70.0


@pytest.mark.parametrize("layout", ["contiguous", "every other column"])
@property_test(data=st.data(), kappa=st.sampled_from((0.0, 5e-3, 0.7, 100.0)))
def test_soft_threshold_formula(backend, layout, data, kappa):
    """Soft thresholds are those of the formula."""
    dtype = data.draw(st.sampled_from(dtypes_of(backend, "soft_threshold_")))
    shape = data.draw(st.sampled_from(((), (1,), (30,), (3, 10))))
    scale = Values(data.draw(seeds), backend).normal(*shape, dtype=dtype, layout=layout)
    exact = oracles.soft_threshold(scale, kappa)
    bound = rounding_bound(exact, dtype) + EPS[accumulation(dtype)] * (oracles.magnitude(scale) + kappa)
    assert FE.soft_threshold_(scale, kappa, backend=backend) is scale
    assert_within(scale, exact, bound, "scale")


def test_soft_threshold_signs(backend):
    """Soft thresholding zeroes small values and keeps signs."""
    values = [-2.0, -0.5, -0.25, 0.0, 0.25, 0.5, 2.0, math.nan]
    scale = torch.tensor(values, device=device_of(backend))
    FE.soft_threshold_(scale, 0.5, backend=backend)
    assert scale[:7].tolist() == [-1.5, 0.0, 0.0, 0.0, 0.0, 0.0, 1.5]
    assert math.isnan(scale[7])
