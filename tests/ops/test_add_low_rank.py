# SPDX-License-Identifier: Apache-2.0
"""`add_low_rank`: the op's own formulas on a product that is given."""

from __future__ import annotations

import itertools

import pytest
import seeding
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fused_ewclora as fe
from fused_ewclora import functional as FE
from fused_ewclora.functional import Adapter
from fused_ewclora.ops.capture import FisherCapture

WIDE = torch.float64
D_IN, D_OUT = 8, 12


WRONG = Adapter(torch.zeros(2, 9, dtype=WIDE), torch.zeros(12, 2, dtype=WIDE), 1.0, ((0, 12),))


def leaf(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=WIDE).requires_grad_()


def case(slices: bool = False):
    """(x, W, R, adapters, leaves)."""
    draw = seeding.generator(1)
    x, a, b, s = (
        leaf(draw, 2, 3, D_IN),
        leaf(draw, 2, D_IN),
        leaf(draw, 4 if slices else D_OUT, 2),
        leaf(draw, 2),
    )
    weight = torch.randn(D_OUT, D_IN, generator=draw, dtype=WIDE)
    residual = torch.randn(D_OUT, D_IN, generator=draw).to(torch.bfloat16)
    if not slices:
        return x, weight, residual, [Adapter(a, b, s, ((0, D_OUT),))], [x, a, b, s]
    other_a, other_b = leaf(draw, 3, D_IN), leaf(draw, 6, 3)
    adapters = [Adapter(a, b, s, ((0, 4),)), Adapter(other_a, other_b, 0.5, ((6, 9), (9, 12)))]
    return x, weight, residual, adapters, [x, a, b, other_a, other_b, s]


@pytest.mark.parametrize("slices", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_equals_lora_linear(slices, dropout_p):
    """Output, gradients and their gradients are those of the LoRA linear with W + R, with the same mask."""
    x, weight, residual, adapters, leaves = case(slices)
    options = {"dropout_p": dropout_p, "training": True, "seed": 3}
    y = FE.add_low_rank(F.linear(x, weight), x, adapters, residual, **options)
    expected = FE.lora_linear_adapters(x, weight + residual.to(WIDE), None, adapters, **options)
    dy = torch.randn(y.shape, generator=seeding.generator(2), dtype=WIDE)
    results = []
    for output in (y, expected):
        first = torch.autograd.grad(output, leaves, dy, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)
        results.append([output, *first, *second])
    for actual, exact in zip(*results, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-10)


@given(
    sizes=st.tuples(*(st.integers(low, 6) for low in (0, 1, 1, 1))),
    cuts=st.lists(st.integers(0, 6), max_size=4),
    seed=st.integers(0, 99),
)
def test_any_shapes(sizes, cuts, seed):
    """Any numbers of rows and ranks, and any disjoint ranges, whichever order they are in."""
    m, d_in, d_out, r = sizes
    draw = seeding.generator(seed)
    bounds = sorted({min(cut, d_out) for cut in cuts} | {0, d_out})
    ranges = [*itertools.pairwise(bounds)][::-2]
    x = leaf(draw, m, d_in)
    leaves = [(leaf(draw, r, d_in), leaf(draw, stop - start, r)) for start, stop in ranges]
    adapters = [Adapter(a, b, 0.5, (rows,)) for (a, b), rows in zip(leaves, ranges, strict=True)]
    weight = torch.randn(d_out, d_in, generator=draw, dtype=WIDE)
    dy = torch.randn(m, d_out, generator=draw, dtype=WIDE)
    wanted = [x, *itertools.chain(*leaves)]
    y = FE.add_low_rank(F.linear(x, weight), x, adapters)
    expected = FE.lora_linear_adapters(x, weight, None, adapters)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for one, other in zip(*(torch.autograd.grad(out, wanted, dy) for out in (y, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_plain_backward():
    """A backward without a graph gives the gradients that one with a graph gives."""
    x, weight, residual, adapters, leaves = case(slices=True)
    y = FE.add_low_rank(F.linear(x, weight), x, adapters, residual)
    plain = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
    followed = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    for actual, exact in zip(plain, followed, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)


def test_transforms_agree():
    """Inside torch.func the same values and gradients come out."""
    x, weight, residual, adapters, _ = case()

    def loss(x):
        return FE.add_low_rank(F.linear(x, weight), x, adapters, residual).square().sum()

    expected = torch.autograd.grad(loss(x), x)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected, rtol=1e-12, atol=1e-12)
    per_sample = torch.func.vmap(torch.func.grad(loss))(x.detach())
    torch.testing.assert_close(per_sample, expected, rtol=1e-12, atol=1e-12)


def test_fisher_of_capture():
    """A capture gets x and dy of the call: the sum of squared per-sample gradients."""
    x, weight, _, adapters, _ = case()
    fisher = torch.zeros(D_OUT, D_IN, dtype=WIDE)
    capture = FisherCapture([fisher], [((0, D_OUT),)], reduction="sum")
    y = FE.add_low_rank(F.linear(x, weight), x, adapters, capture=capture)
    dy = torch.randn(y.shape, generator=seeding.generator(2), dtype=WIDE)
    y.backward(dy)
    expected = sum((dy[n].T @ x[n]).detach().square() for n in range(x.shape[0]))
    torch.testing.assert_close(fisher, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes(dtype):
    """Sums are fp32 and rounded once to the dtype of y; gradients have the dtypes of their tensors."""
    draw = seeding.generator(4)
    x = torch.randn(5, D_IN, generator=draw).to(dtype).requires_grad_()
    y = torch.randn(5, D_OUT, generator=draw).to(dtype).requires_grad_()
    a, b = (torch.randn(*shape, generator=draw).requires_grad_() for shape in ((2, D_IN), (D_OUT, 2)))
    result = FE.add_low_rank(y, x, [Adapter(a, b, 0.5, ((0, D_OUT),))])
    exact = y.double() + 0.5 * (x.double() @ a.double().T) @ b.double().T
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)
    grads = torch.autograd.grad(result.float().sum(), [y, x, a, b])
    assert [grad.dtype for grad in grads] == [dtype, dtype, torch.float32, torch.float32]


def test_nothing_to_add():
    """Without adapters and residual a new tensor equal to y; an empty batch stays empty."""
    y = torch.randn(3, D_OUT, generator=seeding.generator(1))
    result = FE.add_low_rank(y, torch.zeros(3, D_IN), [])
    assert torch.equal(result, y) and result.data_ptr() != y.data_ptr()
    x, _, residual, adapters, leaves = case()
    empty = FE.add_low_rank(torch.zeros(0, D_OUT, dtype=WIDE), x[0, :0], adapters, residual)
    grads = torch.autograd.grad(empty.sum(), leaves)
    assert empty.shape == (0, D_OUT) and all(not grad.any() for grad in grads)


def test_compiles_whole():
    """torch.compile traces forward and backward into one graph each."""
    x, weight, residual, adapters, leaves = case(slices=True)

    def run(x):
        return FE.add_low_rank(F.linear(x, weight), x, adapters, residual)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(run(x).square().sum(), leaves)
    actual = torch.autograd.grad(compiled(x).square().sum(), leaves)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(4, D_OUT, dtype=WIDE)}, "y: expected leading shape"),
        ({"residual": torch.zeros(D_IN, D_OUT)}, r"residual: expected shape \[12, 8\]"),
        ({"dropout_p": 2.0}, "dropout_p: expected a probability"),
        ({"adapters": [WRONG]}, "lora_a: expected 8 columns"),
        ({"y": torch.zeros(2, 3, D_OUT, dtype=torch.int64)}, "y: expected a floating-point"),
    ],
)  # fmt: skip
def test_wrong_arguments(change, message):
    """Arguments that do not fit are refused by name."""
    x, weight, residual, adapters, _ = case()
    given = {"y": F.linear(x, weight), "x": x, "adapters": adapters, "residual": residual, **change}
    with pytest.raises(fe.EWCLoRAError, match=message):
        FE.add_low_rank(**given)
