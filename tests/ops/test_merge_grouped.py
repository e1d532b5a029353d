# SPDX-License-Identifier: Apache-2.0
"""Sequences of weights and of scales: one call does what a loop over its entries does, or nothing at all."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from hypothesis import strategies as st
from strategies import BACKENDS, LOW_PRECISION, Values, dtypes_of, layouts, property_test, seeds, serves
from tolerance import accumulation, assert_within, rounding_bound, sum_bound

import fused_ewclora as fe
from fused_ewclora import functional as FE

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
SHAPES = ((33, 47, 5), (1, 1, 1), (64, 16, 17), (7, 131, 2), (48, 48, 10), (16, 97, 30))
own_layouts = layouts.filter(lambda name: name != "expanded")


def entries(values: Values, shapes, dtypes):
    """weights, lora_as, lora_bs, scales: of every kind of scale, fp32 factors beside some of the weights."""
    columns = [[], [], [], []]
    for i, ((d_out, d_in, r), dtype) in enumerate(zip(shapes, dtypes, strict=True)):
        master = torch.float32 if dtype in LOW_PRECISION and i % 2 else dtype
        kinds = (0.75, values.normal(r, dtype=master), values.normal(1, dtype=master)[0])
        entry = values.normal(d_out, d_in, dtype=dtype), values.normal(r, d_in, dtype=master)
        for column, value in zip(
            columns, (*entry, values.normal(d_out, r, dtype=master), kinds[i % 3]), strict=True
        ):
            column.append(value)
    return columns


@property_test(count=st.integers(0, 6), seed=seeds, data=st.data())
def test_any_entries(backend, count, seed, data):
    """Entries of any shape and dtype are merged in one call."""
    dtypes = [data.draw(st.sampled_from(dtypes_of(backend, "merge_"))) for _ in range(count)]
    weights, lora_as, lora_bs, scales = entries(Values(seed, backend), SHAPES[:count], dtypes)
    expected = [
        (oracles.merged(*entry), oracles.merged(*map(oracles.magnitude, entry)))
        for entry in zip(weights, lora_as, lora_bs, scales, strict=True)
    ]
    assert FE.merge_(weights, lora_as, lora_bs, scales, backend=backend) is weights
    for weight, a, (exact, wide) in zip(weights, lora_as, expected, strict=True):
        bound = sum_bound(wide, a.shape[0], weight.dtype, backend)
        if weight.dtype != accumulation(weight.dtype):
            bound = bound + rounding_bound(exact.abs() + bound, weight.dtype)
        assert_within(weight, exact, bound, f"weight {list(weight.shape)} {weight.dtype}")


def test_equals_single_calls(backend):
    """A group equals single calls bit by bit."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16] * 2
    weights, lora_as, lora_bs, scales = entries(Values(1, backend), SHAPES, dtypes)
    singles = [w.clone() for w in weights]
    for entry in zip(singles, lora_as, lora_bs, scales, strict=True):
        FE.merge_(*entry, backend=backend)
    FE.merge_(weights, lora_as, lora_bs, scales, backend=backend)
    assert all(torch.equal(one, other) for one, other in zip(weights, singles, strict=True))


def test_repeated_weight(backend):
    """Also when only slices of it meet; in bf16 the order of the roundings shows."""
    values = Values(2, backend)
    packed = values.normal(96, 33, dtype=torch.bfloat16)
    rows = [slice(0, 64), slice(32, 96), slice(0, 96), slice(40, 41), slice(0, 96)]
    lora_as = [values.normal(3, 33) for _ in rows]
    lora_bs = [values.normal(len(range(96)[r]), 3) for r in rows]
    expected = packed.clone()
    for r, a, b in zip(rows, lora_as, lora_bs, strict=True):
        FE.merge_(expected[r], a, b, 0.5, backend=backend)
    FE.merge_([packed[r] for r in rows], lora_as, lora_bs, 0.5, backend=backend)
    assert torch.equal(packed, expected)


def test_one_scale(backend):
    """One scale may serve all entries."""
    values = Values(3, backend)
    weights = [values.normal(8, 5) for _ in range(3)]
    a, b, scale = values.normal(2, 5), values.normal(8, 2), values.normal(2)
    expected = [FE.merge_(w.clone(), a, b, scale, backend=backend) for w in weights]
    FE.merge_(weights, [a] * 3, [b] * 3, scale, backend=backend)
    assert all(torch.equal(one, other) for one, other in zip(weights, expected, strict=True))


BAD = {
    "rank": ({"lora_b": torch.ones(8, 3)}, r"^lora_b\[2\]: expected 2 columns"),
    "columns": ({"weight": torch.ones(8, 6)}, r"^weight\[2\]: expected shape \[8, 5\]"),
    "dtype": ({"lora_a": torch.ones(2, 5).half()}, r"^lora_a\[2\]: expected torch.float32"),
    "scale": ({"scale": torch.ones(3)}, r"^scale\[2\]: expected a 0-d tensor or shape \[2\]"),
    "nan": ({"scale": math.nan}, r"^scale\[2\]: expected a finite number"),
    "tensor": ({"weight": None}, r"^weight\[2\]: expected a tensor, got NoneType"),
}


@pytest.mark.parametrize("name", BAD)
def test_error_in_last(backend, name):
    """An error in the last entry leaves every weight as it was."""
    values = Values(4, backend)
    change, message = BAD[name]
    entry = {"weight": None, "lora_a": values.normal(2, 5), "lora_b": values.normal(8, 2), "scale": 2.0}
    calls = [{**entry, "weight": values.normal(8, 5)} for _ in range(3)]
    calls[2] |= {k: v.to(values.device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    before = [call["weight"].clone() for call in calls[:2]]
    with pytest.raises(fe.EWCLoRAError, match=message):
        FE.merge_(*([call[key] for call in calls] for key in entry), backend=backend)
    assert all(torch.equal(call["weight"], w) for call, w in zip(calls[:2], before, strict=True))


def test_unsupported_dtype(backend):
    """An unsupported dtype in one entry changes no entry."""
    if serves(backend, "merge_", torch.float64):
        pytest.skip(f"{backend} serves every dtype")
    values = Values(5, backend)
    weights = [values.normal(8, 5), values.normal(8, 5, dtype=torch.float64)]
    before = [w.clone() for w in weights]
    factors = [[values.normal(*shape, dtype=w.dtype) for w in weights] for shape in ((2, 5), (8, 2))]
    with pytest.raises(fe.BackendError, match="float64 runs on the reference"):
        FE.merge_(weights, *factors, backend=backend)
    with pytest.raises(fe.BackendError, match="float64 runs on the reference"):
        FE.soft_threshold_(weights, 0.5, backend=backend)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_lengths_differ(backend):
    """Sequences of different length are refused."""
    w, a, b = torch.ones(8, 5), torch.ones(2, 5), torch.ones(8, 2)
    with pytest.raises(fe.ArgumentError, match=r"^lora_a: expected 2 entries, one per weight, got 1"):
        FE.merge_([w, w], [a], [b, b], backend=backend)
    with pytest.raises(fe.ArgumentError, match=r"^scale: expected 2 entries, one per weight, got 3"):
        FE.merge_([w, w], [a, a], [b, b], [1.0] * 3, backend=backend)
    with pytest.raises(fe.DtypeError, match=r"^lora_b: expected a sequence, like weight, got Tensor"):
        FE.merge_([w, w], [a, a], b, backend=backend)
    with pytest.raises(
        fe.ArgumentError, match=r"^weight\[1\]: expected device cpu \(of weight\[0\]\), got meta"
    ):
        FE.merge_([w, w.to("meta")], [a, a.to("meta")], [b, b.to("meta")], backend=backend)


def test_threshold_any_scales(backend):
    """Scales of any shape and dtype are thresholded in one call."""
    values = Values(6, backend)
    kinds = [torch.float32, *LOW_PRECISION]
    scales = [
        values.normal(*shape, dtype=kinds[i % 3], layout=("contiguous", "every other column")[i % 2])
        for i, shape in enumerate([(30,), (3, 10), (), (1,), (4, 2, 5), (0,), (300,)])
    ]
    singles = [FE.soft_threshold_(s.clone(), 0.4, backend=backend) for s in scales]
    assert FE.soft_threshold_(scales, 0.4, backend=backend) is scales
    assert all(torch.equal(one, other) for one, other in zip(scales, singles, strict=True))
    twice = values.normal(40)
    expected = FE.soft_threshold_(
        FE.soft_threshold_(twice.clone(), 0.4, backend=backend), 0.4, backend=backend
    )
    FE.soft_threshold_([twice, twice], 0.4, backend=backend)
    assert torch.equal(twice, expected)


def test_threshold_integer(backend):
    """An integer among the scales leaves the others as they were."""
    scale = Values(7, backend).normal(5)
    before = scale.clone()
    with pytest.raises(fe.DtypeError, match=r"^scale\[1\]: expected a floating-point tensor"):
        FE.soft_threshold_([scale, torch.ones(3, dtype=torch.int64)], 0.5, backend=backend)
    assert torch.equal(scale, before)


def test_no_entries(backend):
    """No entries are no error."""
    assert FE.merge_([], [], [], backend=backend) == [] and FE.soft_threshold_([], 0.5, backend=backend) == []
