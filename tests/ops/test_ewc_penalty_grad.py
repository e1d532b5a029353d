# SPDX-License-Identifier: Apache-2.0
"""Adding the penalty's gradients straight to `.grad`: the same numbers as autograd, without a graph."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import strategies as st
from penalty_cases import BIG, Case, assert_equals_oracle, cases, make
from strategies import BACKENDS, LOW_PRECISION, Values, device_of, property_test
from tolerance import EPS, assert_within
from torch import Tensor

from fused_ewclora import functional as FE

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.parametrize("backend", BACKENDS)]


def add_grads(case: Case, **options) -> Tensor:
    arguments = (case.fishers, case.lora_as, case.lora_bs, case.scales, case.ewc_lambda)
    return FE.ewc_penalty_grad_(*arguments, backend=case.backend, **options)


@property_test(data=st.data())
def test_equals_fp64(backend, data):
    """Gradients are written to `.grad` and equal fp64."""
    case = data.draw(cases(backend))
    value = add_grads(case)
    assert not value.requires_grad
    assert_equals_oracle(case, value, [leaf.grad for leaf in case.leaves()])


def test_equals_autograd(backend):
    """The gradients are those of autograd."""
    case = make(Values(1, backend), BIG, backend, ewc_lambda=1e7)
    value, grads = case.gradients()
    assert torch.equal(add_grads(case), value)
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(case.leaves(), grads, strict=True))


@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_grad_scale(backend, kind):
    """2^12 is exact in every dtype, so that equality is bitwise."""
    case = make(Values(1, backend), BIG, backend)
    value, grads = case.gradients()
    scaled = add_grads(case, grad_scale=4096.0 if kind == "float" else torch.tensor(4096.0))
    assert torch.equal(scaled, value)
    assert all(torch.equal(leaf.grad, 4096 * g) for leaf, g in zip(case.leaves(), grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
def test_adds_in_place(backend, dtype):
    """Existing gradients are added to in place."""
    case = make(Values(2, backend), BIG[:3], backend, dtype=dtype)
    _, grads = case.gradients()
    held = [torch.ones_like(leaf) for leaf in case.leaves()]
    for leaf, old in zip(case.leaves(), held, strict=True):
        leaf.grad = old
    add_grads(case)
    for leaf, old, new in zip(case.leaves(), held, grads, strict=True):
        assert leaf.grad is old
        exact = 1.0 + new.double().cpu()
        assert_within(old, exact, EPS[dtype] * exact.abs() + EPS[dtype] * new.double().cpu().abs(), "sum")


def test_adds_to_loss(backend):
    """Gradients of a loss and of the penalty add up."""
    case = make(Values(2, backend), BIG[:3], backend)
    sum(leaf.square().sum() for leaf in case.leaves()).backward()
    add_grads(case, grad_scale=2.0)
    together = [leaf.grad.clone() for leaf in case.leaves()]
    for leaf in case.leaves():
        leaf.grad = None
    (sum(leaf.square().sum() for leaf in case.leaves()) + 2.0 * case.run()).backward()
    for leaf, both in zip(case.leaves(), together, strict=True):
        exact = leaf.grad.double().cpu()
        parts = exact.abs() + 2 * leaf.detach().double().cpu().abs()
        assert_within(both, exact, 2 * EPS[torch.float32] * parts, "sum")


def test_grad_scaler(backend):
    """Loss scale on both, one unscale: what the optimiser sees is free of the scale."""
    case = make(Values(3, backend), BIG[:3], backend)
    _, grads = case.gradients()
    optimizer = torch.optim.SGD(case.leaves(), lr=1.0)
    scaler = torch.amp.GradScaler(device_of(backend), init_scale=2.0**10)
    scaler.scale(sum(0.0 * leaf.sum() for leaf in case.leaves())).backward()
    add_grads(case, grad_scale=scaler._scale)
    scaler.unscale_(optimizer)
    assert all(torch.equal(leaf.grad, g) for leaf, g in zip(case.leaves(), grads, strict=True))


@pytest.mark.parametrize("frozen", ["A", "B", "everything"])
@pytest.mark.parametrize("grad_scale", [1.0, 2.0])
def test_frozen_inputs(backend, frozen, grad_scale):
    """Frozen inputs keep `.grad` None."""
    case = make(Values(4, backend), BIG[:3], backend)
    value = case.run()
    groups = {"A": case.lora_as, "B": case.lora_bs, "everything": case.leaves()}
    for tensor in groups[frozen]:
        tensor.requires_grad_(False)
    assert torch.equal(add_grads(case, grad_scale=grad_scale), value)
    assert all(tensor.grad is None for tensor in groups[frozen])
    assert all(leaf.grad is not None for leaf in case.leaves())


def test_no_aliases(backend):
    """They may share storage, but no element."""
    case = make(Values(5, backend), BIG[:3], backend)
    add_grads(case)
    grads = [leaf.grad for leaf in case.leaves()]
    places = sorted((g.data_ptr(), g.data_ptr() + g.numel() * g.element_size()) for g in grads)
    assert all(g.is_contiguous() for g in grads)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(places))
