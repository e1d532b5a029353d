# SPDX-License-Identifier: Apache-2.0
"""The differentiable reference functions, which everything else is measured by, against the fp64 oracles."""

from __future__ import annotations

import oracles
import pytest
import torch
from strategies import Values
from tolerance import EPS, assert_within, sum_bound

from fused_ewclora import functional as FE
from fused_ewclora.reference import ewc_penalty as penalty
from fused_ewclora.reference import lora_linear as linear

ROWS = ((20, 29), (3, 8))


def leaves() -> list[torch.Tensor]:
    """x, W, bias, A, B, s in fp64."""
    values = Values(0)
    shapes = ((2, 5, 33), (29, 33), (29,), (5, 33), (29, 5), (5,))
    return [values.normal(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "training": True}])
def test_linear(options):
    """Two derivations of one gradient: autograd of the forward, and the backward written by hand."""
    inputs = leaves()
    seed = torch.tensor(5) if options else None
    y, fused = (
        linear.lora_linear(*inputs, **options, seed=seed),
        FE.lora_linear(*inputs, **options, seed=seed),
    )
    assert_within(fused, y.detach(), 1e3 * EPS[torch.float64], "y")
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in (fused, y)]
    for mine, truth in zip(*grads, strict=True):
        # sums of at most 10 x 29 products of a few units each, squared: 1e3 roundings of the largest element
        assert_within(mine, truth, 1e3 * EPS[torch.float64] * float(truth.abs().max()), "gradient")


def test_slices():
    """Slices of the reference equal the oracle and the op."""
    x, w, bias, a, b, s = leaves()
    slices = [(*ROWS[0], a, b[:9], s), (*ROWS[1], a, b[9:14], 0.5)]
    y = linear.lora_linear_slices(x, w, bias, slices)
    exact = oracles.lora_linear(x, w, bias, [(a, b[:9], s, ROWS[:1]), (a, b[9:14], 0.5, ROWS[1:])])
    bound = 1e3 * EPS[torch.float64] * float(exact.abs().max())
    assert_within(y, exact, bound, "y")
    assert_within(FE.lora_linear_slices(x, w, bias, slices), exact, bound, "y of the op")


@pytest.mark.parametrize("scales", [None, "tensors"])
def test_penalty(scales):
    """The penalty under autograd equals the oracle."""
    _, w, _, a, b, s = leaves()
    fishers, kept = [w.detach().square(), w.detach().exp()], None if scales is None else [s, 0.5]
    value = penalty.ewc_penalty(fishers, [a, a], [b, b], kept, 3.0)
    exact, ((da, db, _), (da2, db2, _)) = oracles.ewc_penalty(
        fishers, [a, a], [b, b], kept or [1.0, 1.0], 3.0
    )
    assert_within(value, exact, sum_bound(exact.abs() * 10, 29 * 33, torch.float64), "penalty")
    grads = torch.autograd.grad(value, [a, b])
    for grad, truth in zip(grads, (da + da2, db + db2), strict=True):
        assert_within(grad, truth, 1e3 * EPS[torch.float64] * float(truth.abs().max()), "gradient")


def test_penalty_of_nothing():
    """The penalty of nothing is zero."""
    assert penalty.ewc_penalty([], [], []).item() == 0.0
