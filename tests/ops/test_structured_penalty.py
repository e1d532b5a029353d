# SPDX-License-Identifier: Apache-2.0
"""Penalties of structured Fishers on every backend: the dense formulas in fp64, their derivatives, and what
is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from penalty_cases import Case
from strategies import Values, property_test, seeds, set_threads, skip_if_interpreted
from structured_cases import KINDS, SERVED, assert_structured, make_structured, structured_cases
from tolerance import EPS, assert_within
from torch import Tensor

from fused_ewclora import functional as FE
from fused_ewclora.errors import ArgumentError, DtypeError
from fused_ewclora.fishers import EightBitFisher, FactoredFisher, KroneckerFisher

pytestmark = pytest.mark.usefixtures("poisoned_memory")
served = pytest.mark.parametrize(("backend", "kind"), SERVED)
BIG = [(150, 200, 4), (37, 131, 30), (1, 1, 1), (13, 600, 70)]
FEW = [(13, 33, 3), (40, 7, 10), (1, 1, 2)]


@served
@property_test(20, data=st.data(), threads=st.sampled_from((1, 2, 3)))
def test_equals_fp64(backend, kind, data, threads):
    """Value and gradients equal fp64 for any shapes, ranks, dtypes and strides."""
    torch.set_num_threads(threads)
    case = data.draw(structured_cases(backend, kind))
    assert_structured(case, *case.gradients())


@pytest.mark.parametrize("threads", [1, 3])
@served
def test_threads(backend, kind, threads):
    """Work split over threads gives the same values, and the same bits in every run."""
    skip_if_interpreted(backend, "adapters of the size of a layer")
    set_threads(backend, threads)
    case = make_structured(kind, Values(1, backend), BIG, backend, ewc_lambda=1e7)
    value, grads = case.gradients()
    assert_structured(case, value, grads)
    again, grads_again = case.gradients()
    assert torch.equal(value, again) and all(map(torch.equal, grads, grads_again))


shapes = st.tuples(st.sampled_from((0, 1, 13)), st.sampled_from((0, 1, 33)), st.sampled_from((1, 4, 17)))


@served
@property_test(10, seed=seeds, few=st.lists(shapes, min_size=1, max_size=4))
def test_zero_sizes(backend, kind, seed, few):
    """Adapters without rows or columns have gradients of zero and change no other."""
    case = make_structured(kind, Values(seed, backend), few, backend)
    assert_structured(case, *case.gradients())


def zeros_like(fisher: Any) -> Any:
    if isinstance(fisher, EightBitFisher):
        return EightBitFisher(torch.zeros_like(fisher.codes), fisher.columns)
    return type(fisher)(*map(torch.zeros_like, fisher))


@served
def test_zero_fisher(backend, kind):
    """A Fisher of zeros gives exact zeros, also beside one that is not."""
    case = make_structured(kind, Values(2, backend), FEW, backend, ewc_lambda=1e7)
    alone = case.run(fishers=[zeros_like(case.fishers[0]), *case.fishers[1:]])
    case.fishers = [zeros_like(fisher) for fisher in case.fishers]
    value, grads = case.gradients()
    assert value.item() == 0.0 and not any(bool(grad.any()) for grad in grads)
    assert alone.item() > 0.0


@served
def test_changed_in_place(backend, kind):
    """What is prepared for a call serves the next with other values in the same memory."""
    case = make_structured(kind, Values(3, backend), FEW, backend)
    case.run()
    with torch.no_grad():
        for fisher in case.fishers:
            parts = [t for t in fisher if isinstance(t, Tensor)]
            other = make_structured(kind, Values(4, backend), FEW, backend).fishers
            place = next(i for i, f in enumerate(case.fishers) if f is fisher)
            for part, new in zip(parts, other[place], strict=False):
                part.copy_(new)
        case.lora_as[0].mul_(2.0)
    assert_structured(case, *case.gradients())


@pytest.mark.parametrize("grad_scale", [1.0, 4096.0])
@served
def test_grad_variant(backend, kind, grad_scale):
    """Gradients that are added to `.grad` are those of autograd."""
    case = make_structured(kind, Values(5, backend), FEW, backend, ewc_lambda=3.0)
    value, grads = case.gradients()
    case.leaves()[0].grad = torch.ones_like(case.leaves()[0])
    arguments = (case.fishers, case.lora_as, case.lora_bs, case.scales, case.ewc_lambda)
    found = FE.ewc_penalty_grad_(*arguments, grad_scale=grad_scale, backend=backend)
    assert torch.equal(found, value) and not found.requires_grad
    first, *rest = case.leaves()
    assert torch.equal(first.grad, torch.ones_like(first) + grad_scale * grads[0])
    for leaf, grad in zip(rest, grads[1:], strict=True):
        assert torch.equal(leaf.grad, grad_scale * grad)


@pytest.mark.parametrize("frozen", ["A", "B", "s", "everything"])
@served
def test_frozen_inputs(backend, kind, frozen):
    """Frozen inputs get no gradient and change no other."""
    case = make_structured(kind, Values(6, backend), FEW, backend)
    whole = {id(leaf): grad for leaf, grad in zip(case.leaves(), case.gradients()[1], strict=True)}
    scales = [s for s in case.scales if isinstance(s, Tensor)]
    groups = {"A": case.lora_as, "B": case.lora_bs, "s": scales, "everything": case.leaves()}
    for tensor in groups[frozen]:
        tensor.requires_grad_(False)
    if not case.leaves():
        assert not case.run().requires_grad
        return
    for leaf, grad in zip(case.leaves(), case.gradients()[1], strict=True):
        torch.testing.assert_close(grad, whole[id(leaf)], rtol=1e-5, atol=1e-6)


@served
def test_backward_twice(backend, kind):
    """Backward may run twice and scales with the incoming gradient."""
    case = make_structured(kind, Values(8, backend), FEW, backend)
    value = case.run()
    once = torch.autograd.grad(value, case.leaves(), retain_graph=True)
    again = torch.autograd.grad(4.0 * value, case.leaves())
    assert all(torch.equal(4.0 * one, two) for one, two in zip(once, again, strict=True))


@served
def test_row_parts(backend, kind):
    """Parts of the rows, of sums beside the column sums of all rows, add up to the whole."""
    if kind == "kronecker":
        pytest.skip("rows of a Kronecker Fisher depend on each other")
    case = make_structured(kind, Values(9, backend), [(21, 40, 5)], backend)
    fisher, (a,), (b,) = case.fishers[0], case.lora_as, case.lora_bs
    total = torch.zeros((), dtype=torch.float64)
    for rows in (slice(0, 8), slice(8, 21)):
        part = type(fisher)(fisher[0][rows], fisher[1])
        total += FE.ewc_penalty([part], [a], [b[rows]], [0.5], backend=backend).detach().double().cpu()
    bound = 4 * (EPS[torch.float32] + 2.0**-18) * total  # products in parts of tf32 round by blocks of rows
    assert_within(case.run().detach(), total, bound, "penalty")


@pytest.mark.parametrize("backend", [backend for backend, kind in SERVED if kind == "8 bits"])
def test_not_a_number(backend):
    """A block of codes that is not a number makes the penalty so, and leaves other blocks alone."""
    values = Values(2, backend)
    fisher = values.fisher(4, 70)
    fisher[2, 40] = math.nan
    codes = EightBitFisher.encode(fisher)
    assert codes.dense()[2, 32:64].isnan().all() and codes.dense()[:2].isfinite().all()
    a, b = values.normal(2, 70).requires_grad_(), values.normal(4, 2).requires_grad_()
    value = FE.ewc_penalty([codes], [a], [b], backend=backend)
    _, db = torch.autograd.grad(value, [a, b])
    assert value.isnan() and db[2].isnan().all() and db[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("backend", [backend for backend, kind in SERVED if kind == "factored"])
def test_sums_not_a_number(backend):
    """One sum that is not a number makes the penalty so."""
    for part in (0, 1):
        case = make_structured("factored", Values(2, backend), [(7, 33, 3)], backend)
        case.fishers[0][part][5] = math.nan
        assert case.run().isnan()


def dense(case: Case, tensors: tuple[Tensor, ...]) -> Tensor:
    """The penalty in differentiable fp64."""
    total = torch.zeros((), dtype=torch.float64)
    count = len(case.fishers)
    scales = [0.5, *tensors[2 * count :]]
    for fisher, a, b, s in zip(
        case.fishers, tensors[:count], tensors[count : 2 * count], scales, strict=True
    ):
        delta = b * s @ a
        if isinstance(fisher, KroneckerFisher):
            h = fisher.outputs.double().cpu() @ delta @ fisher.inputs.double().cpu()
        else:
            h = fisher.dense().double().cpu() * delta
        total = total + 0.5 * case.ewc_lambda * (h * delta).sum()
    return total


def flat_call(case: Case) -> tuple[Callable[..., Tensor], list[Tensor]]:
    count = len(case.fishers)

    def run(*flat: Tensor) -> Tensor:
        scales = [0.5, *flat[2 * count :]]
        return case.run(lora_as=list(flat[:count]), lora_bs=list(flat[count : 2 * count]), scales=scales)

    return run, [*case.lora_as, *case.lora_bs, *case.scales[1:]]  # type: ignore[list-item]


@served
def test_second_derivatives(backend, kind):
    """Gradients of gradients are those of the dense formulas; a Fisher that changed meanwhile is an error."""
    case = make_structured(kind, Values(7, backend), [(5, 7, 2), (3, 4, 4), (6, 2, 3)], backend)
    run, leaves = flat_call(case)

    def second(function: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Tensor, ...]:
        value = function(*tensors)
        grads = torch.autograd.grad(value * (0.3 * value).sin(), tensors, create_graph=True)
        return torch.autograd.grad(sum((g * g.detach().cos()).sum() for g in grads), tensors)  # type: ignore[arg-type]

    doubles = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    expected = second(lambda *tensors: dense(case, tensors), doubles)
    largest = max(float(e.abs().max()) for e in expected)
    for one, other in zip(second(run, leaves), expected, strict=True):
        assert float((one.double().cpu() - other).abs().max()) <= 1e-4 * largest
    value = run(*leaves)
    with torch.no_grad():
        case.fishers[1][0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value, leaves, create_graph=True)


@pytest.mark.parametrize("kind", KINDS)
def test_gradgradcheck(kind):
    """First and second derivatives in fp64, forward and reverse, against finite differences."""
    options = {"dtype": torch.float64, "fisher_dtype": torch.float64}
    case = make_structured(kind, Values(10), [(5, 7, 2), (3, 4, 4)], "reference", **options)
    run, leaves = flat_call(case)
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@served
def test_compiled(backend, kind):
    """Forward and backward compile to one graph with the same values."""
    torch._dynamo.reset()
    case = make_structured(kind, Values(11, backend), [(5, 7, 2), (3, 40, 4)], backend)
    run, leaves = flat_call(case)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    values = [(f(*leaves), torch.autograd.grad(f(*leaves), leaves)) for f in (run, compiled)]
    assert torch.equal(values[0][0], values[1][0])
    assert all(map(torch.equal, values[0][1], values[1][1]))


@pytest.mark.parametrize("backend", [backend for backend, kind in SERVED if kind == "8 bits"])
def test_codes_of_the_op(backend):
    """The op with codes keeps what its schema and its fake promise."""
    case = make_structured("8 bits", Values(12, backend), [(3, 40, 2)], backend)
    a, b = case.lora_as[0].detach(), case.lora_bs[0].detach()
    arguments = ([case.fishers[0][0]], [a], [b], [None], [0.5], 3.0, [True, True, False], backend)
    torch.library.opcheck(torch.ops.fused_ewclora.ewc_penalty.default, arguments)


T = torch.zeros
A, B = T(2, 5), T(7, 2)
CODES = EightBitFisher.encode(T(7, 5)).codes
SUMS = FactoredFisher(T(7), T(5))
REFUSED: list[tuple[Any, type[Exception], str]] = [
    ([T(7, 5), SUMS], ArgumentError, r"^fishers: expected one kind .*FactoredFisher and Tensor"),
    ([EightBitFisher(CODES, 5), SUMS], ArgumentError, r"^fishers: expected one kind"),
    ([(T(7), T(5))], DtypeError, r"^fishers: expected tensors, EightBitFisher.*got tuple"),
    ([EightBitFisher(CODES[:, :32], 5)], ArgumentError, r"fishers\[0\].*\[7, 48\].*got shape \[7, 32\]"),
    ([EightBitFisher(CODES[:6], 5)], ArgumentError, r"fishers\[0\].*\[7, 48\].*got shape \[6, 48\]"),
    ([EightBitFisher(CODES.int(), 5)], DtypeError, r"fishers\[0\].*got torch.int32"),
    ([EightBitFisher(T(7, 96, dtype=torch.uint8)[:, ::2], 5)], ArgumentError, r"contiguous rows, got"),
    ([EightBitFisher(T(7, 56, dtype=torch.uint8)[:, :48], 5)], ArgumentError, r"contiguous rows"),
    ([FactoredFisher(T(6), T(5))], ArgumentError, r"fishers\[0\].rows: expected shape \[7\].*\[6\]"),
    ([FactoredFisher(T(7), T(4))], ArgumentError, r"fishers\[0\].columns: expected shape \[5\].*\[4\]"),
    ([FactoredFisher(T(7, 1), T(5))], ArgumentError, r"fishers\[0\].rows: expected shape \[7\].*\[7, 1\]"),
    ([FactoredFisher(T(7).half(), T(5))], DtypeError, r"fishers\[0\].rows: expected .*float32.*float16"),
    ([FactoredFisher(T(7), T(5).long())], DtypeError, r"fishers\[0\].columns: expected .*int64"),
    ([KroneckerFisher(T(7), T(5, 5))], ArgumentError, r"fishers\[0\].outputs: expected shape \[7, 7\]"),
    ([KroneckerFisher(T(7, 7), T(5, 4))], ArgumentError, r"fishers\[0\].inputs: expected shape \[5, 5\]"),
    ([KroneckerFisher(T(7, 7), T(5, 5).bfloat16())], DtypeError, r"fishers\[0\].inputs: .*bfloat16"),
    ([SUMS, SUMS], ArgumentError, r"lora_as: expected 2 entries.*got 1"),
]  # fmt: skip


@pytest.mark.parametrize(("fishers", "error", "words"), REFUSED)
def test_refused(fishers, error, words):
    """Arguments that do not fit are named, with what was expected and what came."""
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    for call in (FE.ewc_penalty, FE.ewc_penalty_grad_):
        with pytest.raises(error, match=words):
            call(fishers, [a], [b])
    assert a.grad is None and b.grad is None
