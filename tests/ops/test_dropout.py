# SPDX-License-Identifier: Apache-2.0
"""Dropout of the low-rank branch: how many elements, and the same ones in forward and backward."""

from __future__ import annotations

import itertools
import math

import oracles
import pytest
import torch
from hypothesis import strategies as st
from strategies import DROPOUT_BACKENDS, Values, device_of, property_test, seeds
from tolerance import assert_same_factors, assert_within, sum_bound

from fused_ewclora import functional as FE

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_backend = pytest.mark.parametrize("backend", DROPOUT_BACKENDS)


def call(backend, x, **options):
    """y = dropout(x): W = 0, A = B = I."""
    d = x.shape[-1]
    eye, zeros = torch.eye(d, dtype=x.dtype, device=x.device), x.new_zeros(d, d)
    return FE.lora_linear(x, zeros, None, eye, eye, backend=backend, **{"training": True, **options})


@each_backend
@property_test(seed=seeds, p=st.sampled_from((0.05, 0.3, 0.9)), rows=st.integers(1, 60), d=st.integers(1, 40))
def test_backward_same_mask(backend, seed, p, rows, d):
    """Backward drops the elements that forward dropped."""
    values = Values(seed, backend)
    x = torch.ones(rows, d, device=values.device, requires_grad=True)
    a = torch.eye(d, device=values.device, requires_grad=True)
    eye, zeros = torch.eye(d, device=values.device), x.new_zeros(d, d)
    y = FE.lora_linear(x, zeros, None, a, eye, dropout_p=p, training=True, seed=seed, backend=backend)
    dx, da = torch.autograd.grad(y.sum(), [x, a])
    assert_same_factors(dx, y, backend)  # dx = dy * mask with dy = 1, and x = 1
    kept = y.detach().sum(0).expand(d, d)  # dA[k, j] = sum_m mask[m, j]
    exact = oracles.exact(kept)
    assert_within(da, exact, sum_bound(exact, rows, torch.float32, backend), "dA")


@each_backend
@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_share_kept(backend, p):
    """Six standard deviations: a false alarm in 5e8 seeds."""
    rows, d = 512, 64
    x = torch.ones(rows, d, device=device_of(backend))
    kept = float((call(backend, x, dropout_p=p, seed=2024) != 0).double().mean())
    bound = 6 * math.sqrt(p * (1 - p) / (rows * d))
    assert abs(kept - (1 - p)) <= bound, f"kept {kept:.5f} of p = {p}, bound {bound:.5f}"


@each_backend
def test_masks_uncorrelated(backend):
    """Correlation of n independent signs is within six times 1 / sqrt(n)."""
    x = torch.ones(256, 64, device=device_of(backend))
    masks = [(call(backend, x, dropout_p=0.5, seed=s) != 0).double() * 2 - 1 for s in (1, 2, 2**32 + 1)]
    pairs = [(m[1:], m[:-1]) for m in masks[:1]] + [(m[:, 1:], m[:, :-1]) for m in masks[:1]]
    for one, two in pairs + list(itertools.combinations(masks, 2)):
        assert abs(float((one * two).mean())) <= 6 / math.sqrt(one.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_on_backends(dtype):
    """A seed gives the same elements on every backend."""
    ones = [torch.ones(50, 37, dtype=dtype, device=device_of(name)) for name in DROPOUT_BACKENDS]
    calls = zip(DROPOUT_BACKENDS, ones, strict=True)
    kept = [call(name, x, dropout_p=0.3, seed=7).cpu() != 0 for name, x in calls]
    assert all(torch.equal(kept[0], other) for other in kept[1:])


@each_backend
def test_mask_arguments(backend):
    """More rows or threads, another dtype, several leading dimensions: the same elements are dropped."""
    x = torch.ones(120, 33, device=device_of(backend))
    torch.set_num_threads(1)
    mask = call(backend, x, dropout_p=0.3, seed=7) != 0
    torch.set_num_threads(3)
    assert torch.equal(call(backend, x, dropout_p=0.3, seed=7) != 0, mask)
    assert torch.equal(call(backend, x[:11], dropout_p=0.3, seed=7) != 0, mask[:11])
    assert torch.equal(call(backend, x.bfloat16(), dropout_p=0.3, seed=7) != 0, mask)
    assert torch.equal(call(backend, x.view(2, 3, 20, 33), dropout_p=0.3, seed=7).view(120, 33) != 0, mask)


@each_backend
def test_adapters_share_mask(backend):
    """All adapters of a call see the same dropped x."""
    x, eye = torch.ones(20, 13, device=device_of(backend)), torch.eye(13, device=device_of(backend))
    slices = [(0, 13, eye, eye, 1.0), (13, 26, eye, eye, 1.0)]
    options = {"dropout_p": 0.5, "training": True, "seed": 3, "backend": backend}
    y = FE.lora_linear_slices(x, x.new_zeros(26, 13), None, slices, **options)
    assert torch.equal(y[:, :13], y[:, 13:])


@each_backend
def test_manual_seed(backend):
    """Runs repeat under `torch.manual_seed` and differ without it."""
    x = torch.ones(20, 30, device=device_of(backend))
    torch.manual_seed(11)
    first, second = call(backend, x, dropout_p=0.5), call(backend, x, dropout_p=0.5)
    torch.manual_seed(11)
    assert torch.equal(call(backend, x, dropout_p=0.5), first)
    assert not torch.equal(first, second)


@each_backend
def test_tensor_seed(backend):
    """A tensor as seed means the number that it holds."""
    x = torch.ones(20, 30, device=device_of(backend))
    number = call(backend, x, dropout_p=0.5, seed=-5)
    for seed in (torch.tensor(-5), torch.tensor([-5]), torch.tensor(-5, device=x.device)):
        assert torch.equal(call(backend, x, dropout_p=0.5, seed=seed), number)


@each_backend
def test_p_zero(backend):
    """At p = 0 or in evaluation nothing is dropped and no random number is drawn."""
    values = Values(0, backend)
    x, w, a, b = values.normal(9, 30), values.normal(7, 30), values.normal(3, 30), values.normal(7, 3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    plain = FE.lora_linear(x, w, None, a, b, backend=backend)
    for options in ({"dropout_p": 0.0, "training": True}, {"dropout_p": 0.5, "training": False}):
        assert torch.equal(FE.lora_linear(x, w, None, a, b, **options, backend=backend), plain)
    assert torch.equal(torch.get_rng_state(), state)


@each_backend
def test_p_one(backend):
    """At p = 1 the low-rank branch vanishes and the base remains."""
    values = Values(0, backend)
    x, w, a, b = values.normal(9, 30), values.normal(7, 30), values.normal(3, 30), values.normal(7, 3)
    x.requires_grad_(), a.requires_grad_(), b.requires_grad_()
    y = FE.lora_linear(x, w, None, a, b, dropout_p=1.0, training=True, backend=backend)
    exact, wide = oracles.exact(x) @ oracles.exact(w).T, oracles.magnitude(x) @ oracles.magnitude(w).T
    assert_within(y, exact, sum_bound(wide, 30, x.dtype, backend), "y")
    dx, da, db = torch.autograd.grad(y.sum(), [x, a, b])
    exact, wide = oracles.exact(w).sum(0).expand(9, 30), oracles.magnitude(w).sum(0).expand(9, 30)
    assert_within(dx, exact, sum_bound(wide, 7, x.dtype, backend), "dx")
    assert not da.any() and not db.any()


def test_gradcheck():
    """Gradients agree with finite differences under a fixed seed."""
    values = Values(0)
    shapes = ((5, 6), (7, 6), (7,), (3, 6), (7, 3), (3,))
    tensors = [values.normal(*shape, dtype=torch.float64) for shape in shapes]
    leaves = [t.requires_grad_() for t in tensors]

    def run(*args):
        return FE.lora_linear(*args, dropout_p=0.4, training=True, seed=9)

    assert torch.autograd.gradcheck(run, leaves)
