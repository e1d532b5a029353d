# SPDX-License-Identifier: Apache-2.0
"""Fisher accumulation against a loop over samples, and what must not matter to it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import oracles
import pytest
import torch
from fisher_cases import Case, assert_accumulates, per_sample
from hypothesis import strategies as st
from strategies import (
    BACKENDS,
    LOW_PRECISION,
    Values,
    dtypes_of,
    layouts,
    property_test,
    seeds,
    set_threads,
    widths,
)
from tolerance import EPS, assert_within

from fused_ewclora import functional as FE
from fused_ewclora.errors import ArgumentError

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.parametrize("backend", BACKENDS)]


def fisher_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return (torch.float64, torch.float32) if dtype == torch.float64 else (torch.float32, torch.bfloat16)


@st.composite
def cases(draw: Any, backend: str) -> Case:
    dtype = draw(st.sampled_from(dtypes_of(backend, "fisher_accumulate_")))
    values = Values(draw(seeds), backend)
    d_in, d_out, mode = draw(widths), draw(widths), draw(st.sampled_from(("sample", "batch")))
    leading = draw(
        st.one_of(
            st.tuples(st.integers(0, 9)),
            st.tuples(st.integers(0, 5), st.sampled_from((0, 1, 2, 7, 33, 61))),
        )
    )
    x = values.normal(*leading, d_in, dtype=dtype, layout=draw(layouts))
    dy = values.normal(*leading, d_out, dtype=dtype, layout=draw(layouts))
    layout = draw(layouts.filter(lambda name: name != "expanded"))
    fisher = values.fisher(d_out, d_in, dtype=draw(st.sampled_from(fisher_dtypes(dtype))), layout=layout)
    samples = per_sample(x, dy)
    return Case(fisher, x, dy, samples, mode, draw(st.sampled_from((1.0, 0.25, 1024.0, 1 / 3))))


@property_test(60, data=st.data(), threads=st.sampled_from((1, 2, 3)))
def test_equals_loop(backend, data, threads):
    """Accumulation equals a loop over samples."""
    torch.set_num_threads(threads)
    assert_accumulates(data.draw(cases(backend)), backend)


@property_test(
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
    assert_accumulates(Case(values.fisher(23, 31), x, dy, samples, cu_seqlens=cu_seqlens), backend)


@pytest.mark.parametrize("tokens", [319, 320, 321, 640, 641, 700])
@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_long_samples(backend, tokens, mode):
    """Kernels cut tokens into blocks; a sample that crosses blocks is still squared once."""
    values = Values(tokens, backend)
    x, dy = values.normal(3, tokens, 61), values.normal(3, tokens, 29)
    assert_accumulates(Case(values.fisher(29, 61), x, dy, per_sample(x, dy), mode), backend)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_several_blocks(backend, threads):
    """Larger than one cache block on both sides, and a multiple of neither tile."""
    set_threads(backend, threads)
    values = Values(1, backend)
    x, dy = values.normal(2, 5, 785), values.normal(2, 5, 401)
    assert_accumulates(Case(values.fisher(401, 785), x, dy, per_sample(x, dy)), backend)


@pytest.mark.parametrize("seed", range(5))
def test_equal_tokens(backend, seed):
    """305 equal products round 305 times the same way."""
    values = Values(seed, backend)
    x, dy = values.normal(5, 61, 13, layout="expanded"), values.normal(5, 61, 13, layout="expanded")
    assert_accumulates(Case(values.fisher(13, 13), x, dy, per_sample(x, dy), "batch"), backend)


def test_single_tokens(backend):
    """Many samples of one token are a single product."""
    values = Values(1, backend)
    x, dy = values.normal(700, 61), values.normal(700, 29)
    assert_accumulates(Case(values.fisher(29, 61), x, dy, per_sample(x, dy)), backend)
    one, three = values.zeros(29, 61), values.zeros(29, 61)
    FE.fisher_accumulate_(one, x, dy, backend=backend)
    FE.fisher_accumulate_(three, x[:, None], dy[:, None], backend=backend)
    assert torch.equal(one, three)


def test_modes(backend):
    """Mode "batch" squares the sum and mode "sample" sums squares."""
    values = Values(0, backend)
    x, dy = values.full((2, 1), 1.0), values.full((2, 1), 2.0)
    dy[1] = -2.0
    results = {
        m: FE.fisher_accumulate_(values.zeros(1, 1), x, dy, mode=m, backend=backend).item()
        for m in ("sample", "batch")
    }
    assert results == {"sample": 8.0, "batch": 0.0}


@property_test(order=st.permutations(range(6)), seed=seeds)
def test_order_invariant(backend, order, seed):
    """The order of samples does not matter."""
    values = Values(seed, backend)
    x, dy = values.normal(6, 5, 31), values.normal(6, 5, 17)
    fisher, other = values.zeros(17, 31), values.zeros(17, 31)
    FE.fisher_accumulate_(fisher, x, dy, backend=backend)
    FE.fisher_accumulate_(other, x[list(order)], dy[list(order)], backend=backend)
    exact = oracles.exact(fisher)  # same products, up to 6 additions in another order
    assert_within(other, exact, 6 * EPS[torch.float32] * exact, "fisher")


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_two_calls_equal_one(backend, weight):
    values = Values(4, backend)
    x, dy = values.normal(7, 5, 31), values.normal(7, 5, 17)
    one, two = values.zeros(17, 31), values.zeros(17, 31)
    FE.fisher_accumulate_(one, x, dy, weight=weight, backend=backend)
    for part in (slice(0, 3), slice(3, 7)):
        FE.fisher_accumulate_(two, x[part], dy[part], weight=weight, backend=backend)
    exact = oracles.exact(one)
    assert_within(two, exact, 9 * EPS[torch.float32] * exact, "fisher")


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_padding(backend, mode):
    """Padding with zero gradients changes nothing."""
    values = Values(5, backend)
    x, dy = values.normal(4, 9, 31), values.normal(4, 9, 17)
    dy[:, 6:] = 0.0
    short, padded = values.zeros(17, 31), values.zeros(17, 31)
    FE.fisher_accumulate_(short, x[:, :6], dy[:, :6], mode=mode, backend=backend)
    FE.fisher_accumulate_(padded, x, dy, mode=mode, backend=backend)
    bound = 2 * EPS[torch.float32] * oracles.fisher(per_sample(x.abs(), dy.abs()), "batch")
    assert_within(padded, oracles.exact(short), bound, "fisher")


def test_zero_gradients(backend):
    """Gradients of zero change no bit."""
    values = Values(5, backend)
    fisher = values.fisher(17, 31)
    before = fisher.clone()
    FE.fisher_accumulate_(fisher, values.normal(4, 9, 31), values.zeros(4, 9, 17), backend=backend)
    assert torch.equal(fisher, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_in_place(backend, dtype):
    """The k rows of a qkv gradient: a view with the row stride of all three."""
    values = Values(6, backend)
    x, packed = values.normal(3, 11, 33, dtype=dtype), values.normal(3, 11, 3 * 33, dtype=dtype)
    whole, slice_ = values.zeros(99, 33), values.zeros(33, 33)
    FE.fisher_accumulate_(whole, x, packed, backend=backend)
    FE.fisher_accumulate_(slice_, x, packed[..., 33:66], backend=backend)
    exact = oracles.exact(whole[33:66])
    assert_within(slice_, exact, 8 * EPS[torch.float32] * exact, "fisher")
    fisher = values.full((99, 33), math.nan)
    fisher[33:66] = 0.0
    FE.fisher_accumulate_(fisher[33:66], x, packed[..., 33:66], backend=backend)
    assert torch.equal(fisher[33:66], slice_)
    assert bool(fisher[:33].isnan().all()) and bool(fisher[66:].isnan().all())


@property_test(power=st.integers(-10, 10))
def test_weight_linear(backend, power):
    """Bitwise, since the weight is a power of two."""
    values = Values(7, backend)
    x, dy = values.normal(4, 5, 31), values.normal(4, 5, 17)
    one, scaled = values.zeros(17, 31), values.zeros(17, 31)
    FE.fisher_accumulate_(one, x, dy, backend=backend)
    FE.fisher_accumulate_(scaled, x, dy, weight=2.0**power, backend=backend)
    assert torch.equal(scaled, 2.0**power * one)


@pytest.mark.parametrize("mode", ["sample", "batch"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_fp16_overflow(backend, mode, tokens):
    """Products above 255 do not overflow fp16."""
    values = Values(0, backend)
    x = values.full((2, tokens, 33), 60.0, torch.float16)
    dy = values.full((2, tokens, 17), 100.0, torch.float16)
    fisher = FE.fisher_accumulate_(values.zeros(17, 33), x, dy, mode=mode, backend=backend)
    expected = 2 * (6000.0 * tokens) ** 2 if mode == "sample" else (2 * 6000.0 * tokens) ** 2
    assert torch.equal(fisher, values.full((17, 33), expected))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
def test_small_gradients(backend, dtype):
    """dy = 2^-14 and x = 2^-6: the square 2^-40 is no fp16 number."""
    values = Values(0, backend)
    x, dy = values.full((2, 3, 5), 2.0**-6, dtype), values.full((2, 3, 7), 2.0**-14, dtype)
    fisher = FE.fisher_accumulate_(values.zeros(7, 5), x, dy, weight=4.0, backend=backend)
    assert torch.equal(fisher, values.full((7, 5), 4 * 2 * 9 * 2.0**-40))


@pytest.mark.parametrize("name", ["x", "dy"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_refused(backend, name, value):
    """One value that is not finite raises, and every bit is left as it was."""
    values = Values(8, backend)
    tensors = {"x": values.full((3, 5, 31), 1.0), "dy": values.full((3, 5, 17), 1.0)}
    tensors[name][1, 2, 3] = value
    fisher = values.fisher(17, 31)
    before = fisher.clone()
    with pytest.raises(ArgumentError, match=rf"^{name}: expected finite values, got 1 NaN or Inf of"):
        FE.fisher_accumulate_(fisher, **tensors, backend=backend)
    assert torch.equal(fisher, before)
    FE.fisher_accumulate_(fisher, **tensors, check_finite=False, backend=backend)
    assert not bool(fisher.isfinite().all())
    assert bool(fisher.isfinite().any())  # the row or column of the bad value alone


def test_no_graph_is_kept(backend):
    values = Values(0, backend)
    x, dy = values.full((3, 5), 1.0).requires_grad_(), values.full((3, 7), 1.0).requires_grad_()
    fisher = FE.fisher_accumulate_(values.zeros(7, 5), x, dy, backend=backend)
    assert not fisher.requires_grad and fisher.grad_fn is None


@pytest.mark.parametrize("threads", [1, 2])
def test_deterministic(backend, threads):
    """Runs repeat bit by bit."""
    set_threads(backend, threads)
    values = Values(9, backend)
    x, dy = values.normal(5, 19, 401), values.normal(5, 19, 97)
    results = [FE.fisher_accumulate_(values.zeros(97, 401), x, dy, backend=backend) for _ in range(3)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
