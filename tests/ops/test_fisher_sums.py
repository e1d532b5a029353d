# SPDX-License-Identifier: Apache-2.0
"""Row and column sums of a Fisher, added without it: those of the dense one, a loop over samples in fp64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import oracles
import pytest
import torch
from fisher_cases import per_sample, squared_sums
from hypothesis import strategies as st
from strategies import (
    BACKENDS,
    Values,
    dtypes_of,
    layouts,
    property_test,
    seeds,
    set_threads,
    skip_if_interpreted,
    widths,
)
from structured_cases import implements
from tolerance import EPS, accumulation, assert_within, repeats, rounding_bound, sum_bound
from torch import Tensor

from fused_ewclora import functional as FE
from fused_ewclora.errors import ArgumentError, DtypeError
from fused_ewclora.fishers import FactoredFisher

SERVED = [backend for backend in BACKENDS if implements(backend, "fisher_sums_")]
pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.parametrize("backend", SERVED)]


def zeros(values: Values, d_out: int, d_in: int) -> FactoredFisher:
    return FactoredFisher(values.zeros(d_out), values.zeros(d_in))


def assert_sums(
    sums: FactoredFisher, x: Tensor, dy: Tensor, samples: list[Any], backend: str, **options: Any
) -> None:
    """Both sums of a call equal those of the dense Fisher, up to the roundings of its elements and sums."""
    before = [oracles.exact(t) for t in sums]
    mode, weight = options.get("mode", "sample"), options.get("weight", 1.0)
    shape = torch.Size((dy.shape[-1], x.shape[-1]))
    repeated = repeats(x, dy)
    dense, bound = squared_sums(samples, mode, shape, x.dtype, backend, repeated)
    assert FE.fisher_accumulate_(sums, x, dy, backend=backend, **options) is sums
    acc = accumulation(x.dtype)
    for dim, part, old, name in ((1, sums.rows, before[0], "rows"), (0, sums.columns, before[1], "columns")):
        increment = dense.sum(dim)
        exact = old + weight * increment
        within = bound.sum(dim) + sum_bound(increment, shape[dim], x.dtype, backend, repeated)
        parts = old.abs() + abs(weight) * increment
        within = abs(weight) * within + 2 * EPS[acc] * parts + rounding_bound(exact, part.dtype)
        assert_within(part, exact, within, f"{name}, mode {mode}")


@property_test(40, data=st.data(), threads=st.sampled_from((1, 2, 3)))
def test_equals_dense(backend, data, threads):
    """Sums equal those of a loop over samples, for any shapes, dtypes and strides."""
    torch.set_num_threads(threads)
    draw = data.draw
    dtype = draw(st.sampled_from(dtypes_of(backend, "fisher_sums_")))
    values = Values(draw(seeds), backend)
    d_in, d_out = draw(widths), draw(widths)
    tokens = st.tuples(st.integers(0, 5), st.sampled_from((0, 1, 2, 7, 33, 61)))
    leading = draw(st.one_of(st.tuples(st.integers(0, 9)), tokens))
    x = values.normal(*leading, d_in, dtype=dtype, layout=draw(layouts))
    dy = values.normal(*leading, d_out, dtype=dtype, layout=draw(layouts))
    kind = draw(st.sampled_from((torch.float32, dtype if dtype == torch.float64 else torch.float32)))
    layout = draw(layouts.filter(lambda name: name != "expanded"))
    sums = FactoredFisher(*(values.fisher(n, dtype=kind, layout=layout) for n in (d_out, d_in)))
    options = {
        "mode": draw(st.sampled_from(("sample", "batch"))),
        "weight": draw(st.sampled_from((1.0, 0.3))),
    }
    assert_sums(sums, x, dy, per_sample(x, dy), backend, **options)


@property_test(
    15,
    lengths=st.lists(st.sampled_from((0, 0, 1, 2, 5, 17, 40)), max_size=7),
    seed=seeds,
    kind=st.sampled_from((torch.int32, torch.int64)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_packed_ragged(backend, lengths, seed, kind, dtype):
    """Packed samples of any length, zero included, are kept apart."""
    values = Values(seed, backend)
    offsets = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    x, dy = values.normal(offsets[-1], 31, dtype=dtype), values.normal(offsets[-1], 23, dtype=dtype)
    samples = [(x[a:b], dy[a:b]) for a, b in itertools.pairwise(offsets)]
    cu_seqlens = torch.tensor(offsets, dtype=kind, device=x.device)
    assert_sums(zeros(values, 23, 31), x, dy, samples, backend, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("tokens", [320, 321, 700])
@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_long_samples(backend, tokens, mode):
    """A sample that crosses the blocks of a kernel is still squared once."""
    values = Values(tokens, backend)
    x, dy = values.normal(2, tokens, 61), values.normal(2, tokens, 29)
    assert_sums(zeros(values, 29, 61), x, dy, per_sample(x, dy), backend, mode=mode)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_several_blocks(backend, threads):
    """Larger than one block on both sides, a multiple of no tile, and the same bits in every run."""
    skip_if_interpreted(backend, "blocks of F of the size of a layer")
    set_threads(backend, threads)
    values = Values(1, backend)
    x, dy = values.normal(2, 5, 785), values.normal(2, 5, 401)
    found = [zeros(values, 401, 785) for _ in range(2)]
    for sums in found:
        assert_sums(sums, x, dy, per_sample(x, dy), backend)
    assert all(map(torch.equal, *found))


def test_single_tokens(backend):
    """Many samples of one token are a closed form, with or without an axis of tokens."""
    values = Values(1, backend)
    x, dy = values.normal(150, 61), values.normal(150, 29)
    assert_sums(zeros(values, 29, 61), x, dy, per_sample(x, dy), backend)
    one, three = zeros(values, 29, 61), zeros(values, 29, 61)
    FE.fisher_accumulate_(one, x, dy, backend=backend)
    FE.fisher_accumulate_(three, x[:, None], dy[:, None], backend=backend)
    assert all(map(torch.equal, one, three))


@pytest.mark.parametrize("mode", ["sample", "batch"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_fp16_overflow(backend, mode, tokens):
    """Products above 255 do not overflow fp16."""
    values = Values(0, backend)
    x = values.full((2, tokens, 33), 60.0, torch.float16)
    dy = values.full((2, tokens, 17), 100.0, torch.float16)
    sums = FE.fisher_accumulate_(zeros(values, 17, 33), x, dy, mode=mode, backend=backend)
    each = 2 * (6000.0 * tokens) ** 2 if mode == "sample" else (2 * 6000.0 * tokens) ** 2
    torch.testing.assert_close(sums.rows, values.full((17,), 33 * each), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(sums.columns, values.full((33,), 17 * each), rtol=1e-6, atol=0.0)


def test_padding(backend):
    """Padding with zero gradients changes nothing, and gradients of zero change no bit."""
    values = Values(5, backend)
    x, dy = values.normal(3, 9, 31), values.normal(3, 9, 17)
    dy[:, 6:] = 0.0
    assert_sums(zeros(values, 17, 31), x, dy, per_sample(x[:, :6], dy[:, :6]), backend)
    sums = FactoredFisher(values.fisher(17), values.fisher(31))
    before = [t.clone() for t in sums]
    FE.fisher_accumulate_(sums, x, torch.zeros_like(dy), backend=backend)
    assert all(map(torch.equal, sums, before))


@pytest.mark.parametrize("mode", ["sample", "batch"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,), (2, 3), (2,)], ids=str)
def test_zero_sizes(backend, mode, shape):
    """Sums over nothing stay as they were, whatever else is empty."""
    values = Values(1, backend)
    for d_in, d_out in ((5, 4), (0, 4), (5, 0), (0, 0)):
        if 0 not in (*shape, d_in, d_out):
            continue
        sums = FactoredFisher(values.fisher(d_out), values.fisher(d_in))
        before = [t.clone() for t in sums]
        FE.fisher_accumulate_(sums, values.normal(*shape, d_in), values.normal(*shape, d_out), mode=mode,
                              backend=backend)  # fmt: skip
        assert all(map(torch.equal, sums, before))


@pytest.mark.parametrize("name", ["x", "dy"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_refused(backend, name, value):
    """One value that is not finite raises, and every bit is left as it was."""
    values = Values(8, backend)
    tensors = {"x": values.full((3, 5, 31), 1.0), "dy": values.full((3, 5, 17), 1.0)}
    tensors[name][1, 2, 3] = value
    sums = zeros(values, 17, 31)
    with pytest.raises(ArgumentError, match=rf"^{name}: expected finite values, got 1 NaN or Inf of"):
        FE.fisher_accumulate_(sums, **tensors, backend=backend)
    assert not sums.rows.any() and not sums.columns.any()
    FE.fisher_accumulate_(sums, **tensors, check_finite=False, backend=backend)
    assert not sums.rows.isfinite().all() and not sums.columns.isfinite().all()


def test_refused(backend):
    """Sums that do not fit, or share memory, are named before anything changes."""
    values = Values(8, backend)
    x, dy = values.normal(3, 5, 31), values.normal(3, 5, 17)
    joint = values.zeros(48)
    wrong: list[tuple[FactoredFisher, type[Exception], str]] = [
        (FactoredFisher(joint[:16], joint[16:47]), ArgumentError, r"fisher.rows: expected shape \[17\]"),
        (FactoredFisher(joint[:17], joint[17:47]), ArgumentError, r"fisher.columns: expected shape \[31\]"),
        (FactoredFisher(joint[:17].half(), joint[17:]), DtypeError, r"fisher.rows: expected .*float32"),
        (FactoredFisher(joint[:17], joint[17:].double()), DtypeError, r"fisher.columns: expected .*float32"),
        (FactoredFisher(joint[:17], joint[:31]), ArgumentError, r"fisher.*share"),
        (FactoredFisher(joint[:1].expand(17), joint[17:]), ArgumentError, r"fisher.rows"),
    ]
    for sums, error, words in wrong:
        with pytest.raises(error, match=words):
            FE.fisher_accumulate_(sums, x, dy, backend=backend)
    assert not joint.any()
