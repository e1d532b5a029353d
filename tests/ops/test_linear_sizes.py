# SPDX-License-Identifier: Apache-2.0
"""The LoRA linear of the CPU has three ways: few rows of fp32, whole tiles of bf16, everything else. On both
sides of where they meet, whatever else varies, its results are those of fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from linear_cases import SCALES, Case, assert_gradients, assert_output, make_scale, parameter
from strategies import BACKENDS, LAYOUTS, LOW_PRECISION, Values, property_test, seeds

from fused_ewclora import functional as FE

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "cpu"]),
]
FEW, TILED = 12, 512  # rows of fp32, and rows x ranks of bf16, at which the ways meet
SLICES = (
    ((0, 96),),
    ((32, 64), (96, 128)),
    ((0, 30), (64, 97)),
)  # of 128 output rows; the last ends between tiles


@st.composite
def near_crossovers(draw: Any, backend: str) -> Case:
    """Rows around a crossover, widths of whole tiles or one more."""
    values = Values(draw(seeds), backend)
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.bfloat16, torch.float16)))
    master = draw(st.sampled_from((dtype, torch.float32))) if dtype in LOW_PRECISION else dtype
    rank, count = draw(st.sampled_from((5, 16, 33, 48, 64))), draw(st.integers(1, 2))
    total = rank * count
    near = (FEW, total) if dtype == torch.float32 else (24, TILED // total + 1)
    rows = max(1, draw(st.sampled_from(near)) + draw(st.integers(-1, 1)))
    rows += 64 * draw(st.integers(0, 1))  # more than one pass over the rows
    d_in, d_out = draw(st.sampled_from((64, 96, 97))), 128
    owned = [((0, d_out),)] if count == 1 else [draw(st.sampled_from(SLICES)), ((100, 128),)]
    if count == 2 and owned[0][-1][1] > 100:
        owned[1] = ((64, 96),)
    layouts, adapters = st.sampled_from(LAYOUTS), []
    for ranges in owned:
        length = sum(stop - start for start, stop in ranges)
        a = values.normal(rank, d_in, dtype=master, std=d_in**-0.5, layout=draw(layouts))
        b = values.normal(length, rank, dtype=master, std=rank**-0.5, layout=draw(layouts))
        scale = make_scale(values, draw(st.sampled_from(SCALES)), rank, master)
        adapters.append(FE.Adapter(parameter(a), parameter(b), scale, ranges))
    bias = parameter(values.normal(d_out, dtype=dtype)) if draw(st.booleans()) else None
    weight = values.normal(d_out, d_in, dtype=dtype, std=d_in**-0.5, layout=draw(layouts))
    x = parameter(values.normal(rows, d_in, dtype=dtype, layout=draw(layouts)))
    dy = values.normal(rows, d_out, dtype=dtype, layout=draw(layouts))
    return Case(backend, x, weight, bias, adapters, dy, draw(st.sampled_from((0.0, 0.0, 0.5))), draw(seeds))


@property_test(25, data=st.data(), threads=st.sampled_from((1, 2)))
def test_crossovers(backend, data, threads):
    """Output and gradients equal fp64 on both sides of every crossover."""
    torch.set_num_threads(threads)
    case = data.draw(near_crossovers(backend))
    y, grads = case.gradients()
    assert_output(case, y)
    assert_gradients(case, grads)


def whole(backend: str, rows: int, rank: int, dtype: torch.dtype, d_in: int = 96, d_out: int = 128) -> Case:
    values = Values(1, backend)
    a, b = values.normal(rank, d_in, dtype=dtype), values.normal(d_out, rank, dtype=dtype)
    adapter = FE.Adapter(parameter(a), parameter(b), 0.5, ((0, d_out),))
    x, weight = values.normal(rows, d_in, dtype=dtype), values.normal(d_out, d_in, dtype=dtype)
    return Case(backend, parameter(x), weight, None, [adapter], values.normal(rows, d_out, dtype=dtype))


SIZES = [(torch.float32, 12, 8), (torch.float32, 13, 8), (torch.bfloat16, 130, 64)]


@pytest.mark.parametrize(("dtype", "rows", "rank"), SIZES)
def test_same_bits(backend, dtype, rows, rank):
    """Repeated runs give the same bits, on several threads as well."""
    torch.set_num_threads(2)
    case = whole(backend, rows, rank, dtype)
    first, again = case.gradients(), case.gradients()
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(grad, again[1][name]) for name, grad in first[1].items())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize(("dtype", "rows", "rank"), SIZES)
def test_one_bad_row(backend, dtype, rows, rank, poison):
    """A row of x that is not finite spoils its own row of y and no other."""
    case = whole(backend, rows, rank, dtype)
    clean = case.run().detach()
    bad = rows // 2
    with torch.no_grad():
        case.x[bad, 3] = poison
    y = case.run().detach()
    others = [i for i in range(rows) if i != bad]
    assert torch.equal(y[others], clean[others])
    assert not y[bad].isfinite().any()


@pytest.mark.parametrize("rows", [64, 128])
def test_large_numbers(backend, rows):
    """bf16 as large as squares of fp16's largest number keep their values: nothing passes through fp16."""
    case = whole(backend, rows, 64, torch.bfloat16)
    with torch.no_grad():
        case.x *= 2.0**40
        case.adapters[0].lora_b.mul_(2.0**40)
    y, grads = case.gradients()
    assert_output(case, y)
    assert_gradients(case, grads)


def test_gaps_between_rows(backend):
    """What lies between rows of x and dy, NaN here, takes no part in tiles, whose loads end with a row."""
    case = whole(backend, 40, 32, torch.bfloat16)
    for name in ("x", "dy"):
        dense = getattr(case, name).detach()
        buffer = torch.full((dense.shape[0], dense.shape[1] + 13), torch.nan, dtype=dense.dtype)
        setattr(case, name, buffer[:, 3 : 3 + dense.shape[1]].copy_(dense))
    case.x.requires_grad_()
    y, grads = case.gradients()
    assert_output(case, y)
    assert_gradients(case, grads)
