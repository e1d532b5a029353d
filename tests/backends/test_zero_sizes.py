# SPDX-License-Identifier: Apache-2.0
"""Sizes of zero: results have their shapes, sums over nothing are zero, and everything is written."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from penalty_cases import assert_equals_oracle, make
from strategies import (
    BACKENDS,
    DROPOUT_BACKENDS,
    LINEAR_BACKENDS,
    Values,
    device_of,
    property_test,
    seeds,
    serves,
)
from torch import Tensor

from fused_ewclora import functional as FE
from fused_ewclora.ops.dispatch import candidates

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# (rows, d_in, d_out)
SIZES = [sizes for sizes in itertools.product((0, 3), (0, 5), (0, 4)) if 0 in sizes]
each_size = pytest.mark.parametrize("sizes", SIZES, ids=str)
DTYPES = (torch.float32, torch.bfloat16)


def leaves(backend: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """x, weight, bias, A, B and s, and dy."""
    rows, d_in, d_out = sizes
    values = Values(1, backend)
    given = [values.normal(*shape, dtype=dtype) for shape in ((2, rows, d_in), (d_out, d_in), (d_out,))]
    given += [values.normal(*shape) for shape in ((2, d_in), (d_out, 2), (2,))]
    return [t.requires_grad_() for t in given], values.normal(2, rows, d_out, dtype=dtype)


def in_fp64(given: list[Tensor], dy: Tensor) -> list[Tensor]:
    """y and the gradient of every leaf, by PyTorch."""
    wide = [t.detach().double().requires_grad_() for t in given]
    x, weight, bias, a, b, s = wide
    y = x @ weight.T + bias + (x @ a.T * s) @ b.T
    return [y, *torch.autograd.grad(y, wide, dy.double())]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
@each_size
def test_linear(backend: str, sizes: tuple[int, int, int], dtype: torch.dtype):
    """The output is the bias where there is nothing to multiply, and no gradient is left out; with dropout,
    which has nothing to drop, it is the same."""
    given, dy = leaves(backend, sizes, dtype)
    for dropout_p in (0.0, 0.5) if backend in DROPOUT_BACKENDS else (0.0,):
        y = FE.lora_linear(*given, dropout_p=dropout_p, training=True, seed=3, backend=backend)
        found = [y, *torch.autograd.grad(y, given, dy)]
        for result, like, right in zip(found, [dy, *given], in_fp64(given, dy), strict=True):
            torch.testing.assert_close(result, right.to(like.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@each_size
def test_shape_of_z(backend: str, sizes: tuple[int, int, int]):
    """Every implementation returns z with a row for every row of x, as fakes of the op promise."""
    rows, d_in, d_out = sizes
    device = device_of(backend)
    x, weight, a, b = (
        torch.ones(shape, device=device) for shape in ((2, rows, d_in), (d_out, d_in), (2, d_in), (d_out, 2))
    )
    for candidate in candidates("lora_linear"):
        if candidate.backend == backend:
            y, z = candidate.run(x, weight, None, [a], [b], [None], [1.0], [0, 0, d_out], 0.0, None)
            assert y.shape == (2, rows, d_out) and z.shape == (2 * rows, 2)
            assert not y.isnan().any() and not z.isnan().any()


shapes = st.tuples(st.sampled_from((0, 1, 13)), st.sampled_from((0, 1, 33)), st.sampled_from((1, 4, 17)))
large = st.sampled_from([(300, 200, 4), (0, 200, 4), (300, 0, 4)])


@pytest.mark.parametrize("backend", BACKENDS)
@property_test(
    seed=seeds,
    few=st.lists(st.one_of(shapes, large), min_size=1, max_size=5),
    threads=st.sampled_from((1, 2, 3)),
    dtype=st.sampled_from(DTYPES),
)
def test_penalty(backend: str, seed: int, few: list[Any], threads: int, dtype: torch.dtype):
    """Adapters without rows or columns, anywhere in a call, have gradients of zero and change no other."""
    torch.set_num_threads(threads)
    if not serves(backend, "ewc_penalty", dtype, rank=max(r for _, _, r in few)):
        return
    case = make(Values(seed, backend), few, backend, dtype=dtype, ewc_lambda=3.0)
    value, grads = case.gradients()
    assert not any(g.isnan().any() for g in grads) and not value.isnan()
    assert_equals_oracle(case, value, grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_adapters(backend: str):
    """Empty lists give a penalty of zero and change nothing."""
    assert FE.ewc_penalty([], [], [], backend=backend).item() == 0.0
    assert FE.ewc_penalty_grad_([], [], [], backend=backend).item() == 0.0
    assert FE.merge_([], [], [], backend=backend) == []
    assert FE.soft_threshold_([], 0.5, backend=backend) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["sample", "batch"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,), (2,)], ids=str)
def test_fisher(backend: str, mode: str, shape: tuple[int, ...]):
    """Sums over no samples and no tokens leave F; F without elements stays so."""
    values = Values(1, backend)
    for d_in, d_out in ((5, 4), (0, 4), (5, 0), (0, 0)):
        if 0 not in (*shape, d_in, d_out):
            continue
        fisher = values.fisher(d_out, d_in)
        before = fisher.clone()
        x, dy = values.normal(*shape, d_in), values.normal(*shape, d_out)
        FE.fisher_accumulate_(fisher, x, dy, mode=mode, backend=backend)
        assert torch.equal(fisher, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_fisher(backend: str):
    """Packed batches of no samples, and of samples without rows."""
    values = Values(1, backend)
    fisher = values.fisher(4, 5)
    before = fisher.clone()
    for offsets in ([0], [0, 0, 0]):
        cu_seqlens = torch.tensor(offsets, device=fisher.device)
        x, dy = values.normal(0, 5), values.normal(0, 4)
        FE.fisher_accumulate_(fisher, x, dy, cu_seqlens=cu_seqlens, backend=backend)
        assert torch.equal(fisher, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_merge(backend: str, dtype: torch.dtype):
    """Weights without rows or columns are skipped, others of the call are merged."""
    values = Values(1, backend)
    sizes = [(0, 5), (3, 5), (4, 0), (0, 0), (2, 7)]
    weights = [values.normal(d_out, d_in, dtype=dtype) for d_out, d_in in sizes]
    lora_as = [values.normal(2, d_in) for _, d_in in sizes]
    lora_bs = [values.normal(d_out, 2) for d_out, _ in sizes]
    triples = zip(weights, lora_as, lora_bs, strict=True)
    expected = [(w.double() + b.double() @ a.double()).to(dtype) for w, a, b in triples]
    FE.merge_(weights, lora_as, lora_bs, backend=backend)
    for weight, right in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight, right)


@pytest.mark.parametrize("backend", BACKENDS)
def test_soft_threshold(backend: str):
    """Scales without elements are skipped, others of the call are thresholded."""
    device = device_of(backend)
    scales = [torch.empty(0, device=device), torch.ones(3, device=device), torch.empty(2, 0, device=device)]
    FE.soft_threshold_(scales, 0.25, backend=backend)
    assert scales[1].tolist() == [0.75] * 3
