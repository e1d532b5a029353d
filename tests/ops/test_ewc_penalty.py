# SPDX-License-Identifier: Apache-2.0
"""The EWC penalty and its gradients under autograd: the formula in fp64, and its algebra."""

from __future__ import annotations

import oracles
import pytest
import torch
from hypothesis import strategies as st
from penalty_cases import BIG, assert_equals_oracle, cases, make
from strategies import (
    BACKENDS,
    LOW_PRECISION,
    Values,
    dtypes_of,
    property_test,
    seeds,
    set_threads,
    skip_if_interpreted,
)
from tolerance import EPS, assert_within, relative_error, sum_bound
from torch import Tensor

from fused_ewclora import functional as FE
from fused_ewclora.ops import schemas

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.parametrize("backend", BACKENDS)]


@property_test(40, data=st.data(), threads=st.sampled_from((1, 2, 3)))
def test_equals_fp64(backend, data, threads):
    """Value and gradients equal fp64 for any shapes, ranks, dtypes and strides."""
    torch.set_num_threads(threads)
    case = data.draw(cases(backend))
    assert_equals_oracle(case, *case.gradients())


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads(backend, threads):
    """Work split over threads gives the same values."""
    set_threads(backend, threads)
    case = make(Values(1, backend), BIG, backend, ewc_lambda=1e7)
    assert_equals_oracle(case, *case.gradients())


@pytest.mark.parametrize("threads", [2, 3])
def test_split_small_adapter(backend, threads):
    """The middle of the work lies in the small one, and rounds to rows of its neighbours, too."""
    torch.set_num_threads(threads)
    shapes = [(61, 47, 30), (13, 1, 1), (47, 61, 30)] if threads == 2 else [(61, 47, 30), (13, 1, 1)] * 3
    case = make(Values(1, backend), shapes, backend)
    assert_equals_oracle(case, *case.gradients())


@pytest.mark.parametrize("threads", [2, 3])
def test_split_near_end(backend, threads):
    """Row counts that are no multiple of a tile, cut where rounding would fall short of the last row."""
    torch.set_num_threads(threads)
    case = make(Values(3, backend), [(61, 47, 30), (13, 1, 1), (47, 61, 30)], backend)
    assert_equals_oracle(case, *case.gradients())


def penalty_of(fisher: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return 0.5 * (fisher * (scale * b @ a) ** 2).sum()


def test_same_memory_other_call(backend):
    """What is prepared for one call serves no other with the same tensors: not of another scale, nor of
    another view of the same memory."""
    values = Values(5, backend)
    fisher, a, b = values.normal(19, 19).square(), values.normal(3, 19), values.normal(19, 3)
    for view in (fisher, fisher.T):
        for scale in (1.0, 0.5, -3.0):
            found = FE.ewc_penalty([view], [a], [b], [scale], backend=backend)
            torch.testing.assert_close(found, penalty_of(view, a, b, scale), rtol=1e-4, atol=0.0)
    for view_a, view_b in ((a, b), (values.normal(19, 3).T, values.normal(3, 19).T)):
        found = FE.ewc_penalty([fisher], [view_a], [view_b], backend=backend)
        torch.testing.assert_close(found, penalty_of(fisher, view_a, view_b, 1.0), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("one_number", [False, True])
def test_factor_beside_a_scale(backend, one_number):
    """An op that is given both multiplies them, in the value and in every gradient."""
    values = Values(6, backend)
    fisher, a, b = values.normal(19, 33).square(), values.normal(3, 33), values.normal(19, 3)
    scale = values.normal() if one_number else values.normal(3)
    needs = [True, True, True]
    arguments = [fisher], [a], [b]
    value, flat = schemas.ewc_penalty(*arguments, [scale], [0.5], 2.0, needs, backend)
    expected, flat_expected = schemas.ewc_penalty(*arguments, [0.5 * scale], [1.0], 2.0, needs, backend)
    flat_expected = flat_expected.clone()
    flat_expected[a.numel() + b.numel() :] *= 0.5
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(flat, flat_expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_deterministic(backend, threads):
    """Runs repeat bit by bit with the same number of threads."""
    set_threads(backend, threads)
    case = make(Values(1, backend), BIG, backend)
    value, grads = case.gradients()
    for _ in range(3):
        value2, grads2 = case.gradients()
        assert torch.equal(value, value2) and all(map(torch.equal, grads, grads2))


def test_long_sums(backend):
    """4 million equal terms: a single fp32 accumulator would be off by about 1e-3."""
    skip_if_interpreted(backend, "4 million elements")
    values = Values(0, backend)
    fisher, a, b = values.full((4096, 1024), 1.0), values.full((1, 1024), 0.1), values.full((4096, 1), 0.3)
    value = FE.ewc_penalty([fisher], [a], [b], backend=backend)
    exact = 0.5 * fisher.numel() * (float(a[0, 0]) * float(b[0, 0])) ** 2
    bound = sum_bound(torch.tensor(exact, dtype=torch.float64), 1024, torch.float32, backend)
    assert_within(value, torch.tensor(exact, dtype=torch.float64), bound, "penalty")


def test_beyond_fp32(backend):
    """A penalty that fp32 does not hold is Inf, with gradients that are finite where they fit."""
    values = Values(0, backend)
    fisher, a, b = values.full((3, 5), 1e30), values.full((2, 5), 1.0), values.full((3, 2), 1.0)
    a.requires_grad_()
    value = FE.ewc_penalty([fisher], [a], [b], ewc_lambda=1e8, backend=backend)
    assert value.item() == float("inf")
    value = FE.ewc_penalty([fisher], [a], [0 * b], ewc_lambda=1e10, backend=backend)
    (da,) = torch.autograd.grad(value, a)
    assert value.item() == 0.0 and bool((da == 0).all())


@pytest.mark.parametrize("width", [1, 16, 37])
@pytest.mark.parametrize("factor", ["lora_a", "lora_b"])
def test_infinite_factor(backend, factor, width):
    """An infinite element of a factor makes a penalty that is not finite, on CPUs the Inf of the formula with
    its gradients, whatever columns pad the last vector."""
    values = Values(3, backend)
    fisher, a, b = values.full((5, width), 0.5), values.full((2, width), 1.0), values.full((5, 2), 1.0)
    {"lora_a": a, "lora_b": b}[factor][1, -1] = float("inf")
    results = {}
    for name in (backend, "reference"):
        factors = [a.clone().requires_grad_(), b.clone().requires_grad_()]
        value = FE.ewc_penalty([fisher], *([factor] for factor in factors), backend=name)
        results[name] = [value.detach(), *torch.autograd.grad(value, factors)]
    assert not bool(results[backend][0].isfinite())
    if backend in ("reference", "cpu"):
        assert results[backend][0].item() == float("inf")
        torch.testing.assert_close(
            results[backend], results["reference"], equal_nan=True, rtol=1e-6, atol=0.0
        )


def test_zero_fisher(backend):
    """A zero Fisher gives exact zeros."""
    case = make(Values(2, backend), BIG[:3], backend, ewc_lambda=1e7)
    case.fishers = [torch.zeros_like(f) for f in case.fishers]
    value, grads = case.gradients()
    assert value.item() == 0.0 and not any(bool(grad.any()) for grad in grads)


def test_zero_b(backend):
    """At the start of a task B is zero, and so are value and gradient of A."""
    case = make(Values(2, backend), BIG[:3], backend, ewc_lambda=1e7)
    case.lora_bs = [torch.zeros_like(b).requires_grad_() for b in case.lora_bs]
    value, grads = case.gradients()
    assert value.item() == 0.0 and not any(bool(grad.any()) for grad in grads)


def test_no_adapters_give_zero(backend):
    assert FE.ewc_penalty([], [], [], backend=backend).item() == 0.0
    assert FE.ewc_penalty_grad_([], [], [], backend=backend).item() == 0.0


@property_test(seed=seeds, power=st.integers(-3, 3))
def test_homogeneity(backend, seed, power):
    """Bitwise, since the factors are powers of two."""
    case, factor = make(Values(seed, backend), [(13, 17, 3), (5, 33, 10)], backend), 2.0**power
    value = case.run()
    assert torch.equal(case.run(lora_bs=[factor * b for b in case.lora_bs]), factor**2 * value)
    assert torch.equal(case.run(ewc_lambda=factor), factor * value)
    assert torch.equal(case.run(fishers=[factor * f for f in case.fishers]), factor * value)


@property_test(seed=seeds)
def test_additive(backend, seed):
    """The penalty is additive over adapters and does not depend on their order."""
    case = make(Values(seed, backend), [(13, 17, 3), (5, 33, 10), (40, 2, 31)], backend)
    columns = list(zip(case.fishers, case.lora_as, case.lora_bs, case.scales, strict=True))
    parts = sum(FE.ewc_penalty(*([c] for c in column), backend=backend).double() for column in columns)
    swapped = FE.ewc_penalty(*map(list, zip(*columns[::-1], strict=True)), backend=backend)
    bound = (
        8 * EPS[torch.float32] * float(parts.detach())
    )  # one rounding of the total, of each part, and of each term
    assert_within(case.run(), parts.detach().cpu(), bound, "sum of the parts")
    assert_within(swapped, parts.detach().cpu(), bound, "other order")


def test_scale_folded(backend):
    """diag(s) is a reparametrisation: P(A, B, s) = P(diag(s) A, B, 1), and dA carries the factor s."""
    values = Values(4, backend)
    case = make(values, [(31, 47, 10)] * 3, backend)
    case.scales = [s if isinstance(s, Tensor) else values.full((10,), s) for s in case.scales]
    folded = [
        (a * s.reshape(-1, 1)).detach().requires_grad_()
        for a, s in zip(case.lora_as, case.scales, strict=True)
    ]
    value = case.run(lora_as=folded, scales=None)
    wide = oracles.ewc_penalty(
        *[list(map(oracles.magnitude, t)) for t in (case.fishers, case.lora_as, case.lora_bs, case.scales)],
        1.0,
    )
    assert_within(value, case.run().double().cpu(), sum_bound(wide[0], 47, torch.float32, backend), "penalty")
    grads = torch.autograd.grad(case.run(), case.lora_as)
    others = torch.autograd.grad(value, folded)
    for g, h, s, (da, _, _) in zip(grads, others, case.scales, wide[1], strict=True):
        exact = (h.double() * s.detach().double().reshape(-1, 1)).cpu()
        assert_within(g, exact, sum_bound(da, 31 + 47, torch.float32, backend), "dA")


def test_anchor(backend):
    """lambda/2 sum F (B A - B0 A0)^2 is the penalty of [B, -B0] and [A; A0]; the first r gradients count."""
    values = Values(6, backend)
    f = values.fisher(31, 47)
    a, b, a0, b0 = (values.normal(*shape, std=0.3) for shape in ((5, 47), (31, 5), (5, 47), (31, 5)))
    joint_a, joint_b = torch.cat([a, a0]).requires_grad_(), torch.cat([b, -b0], dim=1).requires_grad_()
    value = FE.ewc_penalty([f], [joint_a], [joint_b], None, 3.0, backend=backend)
    da, db = torch.autograd.grad(value, [joint_a, joint_b])
    a64, b64 = oracles.exact(a).requires_grad_(), oracles.exact(b).requires_grad_()
    delta = b64 @ a64 - oracles.exact(b0) @ oracles.exact(a0)
    exact = 1.5 * (oracles.exact(f) * delta.square()).sum()
    da64, db64 = torch.autograd.grad(exact, [a64, b64])
    joint = ([f], [joint_a], [joint_b], [1.0])
    wide, ((wa, wb, _),) = oracles.ewc_penalty(*[list(map(oracles.magnitude, t)) for t in joint], 3.0)
    assert_within(value, exact.detach(), sum_bound(wide, 47 + 20, torch.float32, backend), "penalty")
    assert_within(da[:5], da64, sum_bound(wa[:5], 31 + 10, torch.float32, backend), "dA")
    assert_within(db[:, :5], db64, sum_bound(wb[:, :5], 47 + 10, torch.float32, backend), "dB")


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("fisher_dtype", [torch.float32, torch.bfloat16])
def test_published_lambda(backend, dtype, fisher_dtype):
    """lambda F overflows fp16 by far; the penalty and its gradients do not, as long as they can be held."""
    values = Values(7, backend)
    case = make(values, [(97, 131, 10)], backend, dtype=dtype, fisher_dtype=fisher_dtype, ewc_lambda=1e7)
    case.fishers = [f * 1e-4 for f in case.fishers]
    value, grads = case.gradients()
    assert value.item() > 65504.0 and all(bool(grad.isfinite().all()) for grad in grads)
    assert_equals_oracle(case, value, grads)


def test_backward_twice(backend):
    """Backward may run twice and scales with the incoming gradient."""
    case = make(Values(8, backend), BIG[:3], backend)
    value = case.run()
    once = torch.autograd.grad(value, case.leaves(), retain_graph=True)
    again = torch.autograd.grad(4.0 * value, case.leaves())
    assert all(torch.equal(4.0 * one, two) for one, two in zip(once, again, strict=True))


@pytest.mark.parametrize("frozen", ["A", "B", "s", "A and B"])
def test_frozen_inputs(backend, frozen):
    """Frozen inputs get no gradient and change no other."""
    case = make(Values(9, backend), BIG[:3], backend)
    whole = {id(leaf): grad for leaf, grad in zip(case.leaves(), case.gradients()[1], strict=True)}
    scales = [s for s in case.scales if isinstance(s, Tensor)]
    groups = {"A": case.lora_as, "B": case.lora_bs, "s": scales, "A and B": case.lora_as + case.lora_bs}
    for tensor in groups[frozen]:
        tensor.requires_grad_(False)
    _, grads = case.gradients()
    assert 0 < len(grads) < len(whole)
    for leaf, grad in zip(case.leaves(), grads, strict=True):
        assert relative_error(grad, whole[id(leaf)].double().cpu()) <= 4 * EPS[torch.float32]
    case.lora_as[0].requires_grad_(True)  # one of several: the others still get none
    case.run().backward()
    assert all((t.grad is None) == (not t.requires_grad) for t in groups[frozen])


def test_no_graph(backend):
    """Nothing is recorded where no gradients are asked for."""
    case = make(Values(9, backend), BIG[:2], backend)
    for leaf in case.leaves():
        leaf.requires_grad_(False)
    assert not case.run().requires_grad


def test_gradcheck(backend):
    """Gradients in fp64 agree with finite differences."""
    if torch.float64 not in dtypes_of(backend, "ewc_penalty"):
        pytest.skip("no fp64")
    case = make(Values(10), [(5, 7, 2), (3, 4, 6), (6, 2, 3)], backend, dtype=torch.float64)
    a, b, s = case.lora_as, case.lora_bs, case.scales[1:]

    def run(*flat: Tensor) -> Tensor:
        return case.run(lora_as=flat[:3], lora_bs=flat[3:6], scales=[0.5, *flat[6:]])

    assert torch.autograd.gradcheck(run, [*a, *b, *s])
