# SPDX-License-Identifier: Apache-2.0
"""The l1 norm in CUDA: neither how work is cut up nor which tables are kept shows, and at every precision of
products only what is near 0 changes its sign."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from l1_cases import assert_equals_oracle, gradients
from linear_cases import parameter
from penalty_cases import Case, make
from strategies import Values
from torch import Tensor

import fused_ewclora as fe
from fused_ewclora.backends import cuda
from fused_ewclora.ops import schemas

REASON = fe.available_backends()["cuda"]
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=f"cuda: {REASON}"),
    pytest.mark.usefixtures("poisoned_memory"),
]

# Largest part of itself that a factor loses at torch's float32 matmul precisions, to tf32 and to bf16.
ROUNDED = {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-8}


@pytest.fixture
def precision() -> Iterator[Callable[[str], None]]:
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def results(case: Case) -> list[Tensor]:
    value, grads = gradients(case)
    return [value.detach(), *grads]


def check(case: Case, part: float = 0.0) -> None:
    found = results(case)
    assert_equals_oracle(case, found[0], found[1:], part)


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


# Blocks walk down several strips of rows, of which the last is ragged; every layout of shared memory.
SHAPES = [(130, 520, 10), (130, 264, 30), (70, 150, 50), (70, 99, 70), (40, 150, 130)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ROUNDED)
def test_precisions(precision, name, shape):
    """Lower matmul precision rounds the factors; signs and sums lose nothing."""
    case = make(Values(sum(shape), "cuda"), [shape], "cuda", ewc_lambda=3.0)
    case.scales = [parameter(case.lora_bs[0][0])]
    precision(name)
    check(case, ROUNDED[name])


@pytest.mark.parametrize("name", ["high", "medium"])
def test_precision_used(precision, name):
    """Lower matmul precision changes the value by about as much as the factors lose."""
    case = make(Values(1, "cuda"), [(130, 264, 10)], "cuda")
    exactly = results(case)[0]
    precision(name)
    change = (results(case)[0] / exactly - 1.0).abs().item()
    assert 0.0 < change < 2 * ROUNDED[name]


def test_ranks_together():
    """Adapters of up to 64 ranks are one launch, others another; the penalty is that of all."""
    values = Values(2, "cuda")
    shapes = [(20, 32, 40), (33, 40, 129), (40, 48, 5), (17, 40, 70), (50, 33, 20)]
    case = make(values, shapes, "cuda", ewc_lambda=3.0)
    check(case)
    assert same_bits(results(case), results(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_may_have_strides(dtype):
    values = Values(1, "cuda")
    case = make(values, [(20, 24, 5), (33, 17, 30), (18, 40, 70)], "cuda", dtype=dtype)
    for i, a in enumerate(case.lora_as):
        scale = values.normal(a.shape[0], dtype=dtype, layout="every other column")
        case.scales[i] = scale.detach().requires_grad_()
        assert scale.stride() == (2,)
    check(case)


@pytest.mark.parametrize("needs", [(False, False, False), (True, False, True), (False, True, False)])
@pytest.mark.parametrize("rank", [10, 30, 70])
def test_needs(rank, needs):
    """What is not asked for is left out; what is has the bits of a call that asks for everything."""
    values = Values(rank, "cuda")
    a, b, s = values.normal(rank, 67), values.normal(37, rank), values.normal(rank)
    op = schemas.penalties["l1_penalty"]
    value, whole = op([], [a], [b], [s], [1.0], 2.0, [True] * 3, "cuda")
    found, flat = op([], [a], [b], [s], [1.0], 2.0, list(needs), "cuda")
    wanted = [
        part for part, need in zip(whole.split([t.numel() for t in (a, b, s)]), needs, strict=True) if need
    ]
    assert torch.equal(found, value) and torch.equal(flat, torch.cat(wanted or [whole[:0]]))


@pytest.mark.parametrize("shape", [(0, 24, 3), (24, 0, 3), (0, 0, 70)])
@pytest.mark.parametrize("alone", [True, False])
def test_empty_adapter_gradients(shape, alone):
    """Adapters without elements have gradients of zero."""
    check(make(Values(6, "cuda"), [shape] if alone else [(20, 24, 3), shape, (20, 24, 3)], "cuda"))


def test_not_a_number_inside():
    """Elements of B A that are no number have the slope 0, and the penalty is none."""
    values = Values(3, "cuda")
    a, b = values.normal(2, 40), values.normal(20, 2)
    b[3] = torch.nan
    op = schemas.penalties["l1_penalty"]
    value, flat = op([], [a], [b], [None], [1.0], 2.0, [True, True, False], "cuda")
    assert value.isnan()
    assert torch.equal(flat[a.numel() :].view(20, 2)[3], torch.zeros(2, device=flat.device))
    _, rest = op([], [a], [b[4:]], [None], [1.0], 2.0, [False, True, False], "cuda")
    assert torch.equal(flat[a.numel() :].view(20, 2)[4:], rest.view(16, 2))


# ---- which table serves a call


def by_new_table(case: Case) -> list[Tensor]:
    cuda.extension().forget_penalty_tables()
    return results(case)


def test_tables():
    """A table serves other factors and values in place, and no other addresses or penalties."""
    case = make(Values(4, "cuda"), [(24, 24, 24), (24, 24, 24)], "cuda", ewc_lambda=2.0)
    case.scales = [0.5, 0.25]
    first = by_new_table(case)
    assert same_bits(results(case), first)
    squares = [case.run().detach(), *case.gradients()[1]]  # the EWC penalty of the same adapters
    assert same_bits(results(case), first) and not same_bits(squares, first)
    case.scales = [0.5, 0.125]
    assert same_bits(results(case), by_new_table(case))
    check(case)
    with torch.no_grad():
        for leaf in case.leaves():
            leaf.mul_(0.75)
    check(case)
    case.lora_bs = [(2.0 * b).detach().requires_grad_() for b in case.lora_bs]
    check(case)
