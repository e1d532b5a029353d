# SPDX-License-Identifier: Apache-2.0
"""Structured Fishers in CUDA: how kernels read codes, cut up factors and add up parts does not show."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import oracles
import pytest
import torch
from penalty_cases import Case
from strategies import Values, device_of
from structured_cases import assert_structured, make_structured
from tolerance import relative_error
from torch import Tensor

import fused_ewclora as fe
from fused_ewclora import functional as FE
from fused_ewclora.backends import cuda
from fused_ewclora.fishers import EightBitFisher, FactoredFisher

REASON = fe.available_backends()["cuda"]
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=f"cuda: {REASON}"),
    pytest.mark.usefixtures("poisoned_memory"),
]


@pytest.fixture
def precision() -> Iterator[Callable[[str], None]]:
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def results(case: Case) -> list[Tensor]:
    value, grads = case.gradients()
    return [value.detach(), *grads]


def dense(case: Case) -> Case:
    """The same call with the decoded Fishers."""
    return replace(case, fishers=[fisher.dense() for fisher in case.fishers])  # type: ignore[attr-defined]


# ---- codes


@pytest.mark.parametrize("rank", [3, 30, 50, 70])
@pytest.mark.parametrize("d_in", [1, 40, 289])
def test_codes_surroundings_unread(d_in, rank):
    """Rows of codes lie among bytes that stand for NaN, in the middle of a strip as behind the last row."""
    case = make_structured("8 bits", Values(rank, "cuda"), [(37, d_in, rank)], "cuda", ewc_lambda=3.0)
    codes = case.fishers[0][0]
    buffer = torch.full((60, codes.shape[1] + 64), 0xFF, dtype=torch.uint8, device=codes.device)
    view = buffer[:37, 32 : 32 + codes.shape[1]].copy_(codes)
    found = replace(case, fishers=[EightBitFisher(view, d_in)])
    assert_structured(found, *found.gradients())
    assert all(map(torch.equal, results(found), results(case)))


# Regions of several strips, the last of them ragged, with an odd number of blocks in a row.
LONG = [(130, 520, 10), (130, 264, 30), (130, 200, 40), (70, 99, 70)]


@pytest.mark.parametrize("shape", LONG)
@pytest.mark.parametrize("name", ["highest", "high", "medium"])
def test_codes_equal_dense(precision, name, shape):
    """At every matmul precision codes are the fp32 numbers that they stand for: products round the same
    factors."""
    precision(name)
    case = make_structured("8 bits", Values(sum(shape), "cuda"), [shape], "cuda")
    for found, expected in zip(results(case), results(dense(case)), strict=True):
        assert relative_error(found, oracles.exact(expected)) < 1e-5


def test_codes_beside_numbers():
    """One call of the op takes both; each way of reading is a launch of its own."""
    values = Values(2, "cuda")
    case = make_structured("8 bits", values, [(20, 32, 40), (33, 40, 20), (40, 24, 70), (17, 50, 5)], "cuda")
    numbers = dense(case).fishers
    tensors = [f if i % 2 else case.fishers[i][0] for i, f in enumerate(numbers)]
    factors = ([a.detach() for a in case.lora_as], [b.detach() for b in case.lora_bs])
    rest = ([None] * 4, [0.5] * 4, 3.0, [True, True, False])
    run = cuda.extension().ewc_penalty  # type: ignore[union-attr]
    for mixed, plain in zip(run(tensors, *factors, *rest), run(numbers, *factors, *rest), strict=True):
        assert relative_error(mixed, oracles.exact(plain)) < 1e-6


# ---- factors

FACTORED = [(40, 20, 70), (40, 150, 130), (700, 33, 5), (300, 500, 17), (5, 1, 1)]


@pytest.mark.parametrize("shapes", [FACTORED, FACTORED[2:], FACTORED[3:4]], ids=["64", "32", "one"])
def test_factored_parts(shapes):
    """Tiles of ranks and chunks of rows and columns meet, in the same order in every run."""
    case = make_structured("factored", Values(3, "cuda"), shapes, "cuda", ewc_lambda=3.0)
    first = results(case)
    assert_structured(case, first[0], first[1:])
    assert all(map(torch.equal, first, results(case)))


@pytest.mark.parametrize("need", list(itertools.product((False, True), repeat=3)), ids=str)
def test_factored_needs(need):
    """What is not asked for is not waited for, and the penalty is the same."""
    case = make_structured("factored", Values(4, "cuda"), [(40, 60, 5), (9, 33, 3)], "cuda")
    value, grads = case.gradients()
    whole = {id(leaf): grad for leaf, grad in zip(case.leaves(), grads, strict=True)}
    for tensors, wanted in zip((case.lora_as, case.lora_bs, case.scales), need, strict=True):
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                tensor.requires_grad_(wanted)
    for _ in range(2):
        found = case.run()
        assert torch.equal(found, value)
        grads = torch.autograd.grad(found, case.leaves()) if any(need) else ()
        assert all(torch.equal(g, whole[id(leaf)]) for leaf, g in zip(case.leaves(), grads, strict=True))


def other_sums(case: Case) -> None:
    case.fishers = [type(f)(2.0 * f[0], f[1] ** 2) for f in case.fishers]


def swapped_sums(case: Case) -> None:
    case.fishers = [type(f)(f[1], f[0]) for f in case.fishers]


def other_factor(case: Case) -> None:
    case.scales = [0.125, *case.scales[1:]]


def fewer_adapters(case: Case) -> None:
    case.fishers, case.lora_as, case.lora_bs, case.scales = (
        t[:1] for t in (case.fishers, case.lora_as, case.lora_bs, case.scales)
    )


@pytest.mark.parametrize("change", [other_sums, swapped_sums, other_factor, fewer_adapters])
def test_factored_table_not_shared(change):
    """A table serves no call but its own."""
    case = make_structured("factored", Values(5, "cuda"), [(24, 24, 3), (24, 24, 3)], "cuda")
    before = results(case)
    change(case)
    found = results(case)
    assert_structured(case, found[0], found[1:])
    assert not torch.equal(found[0], before[0])


def test_unfit_sums_not_hidden():
    """Column sums that are not a number make the penalty so; their sum may be zero, which is no penalty."""
    case = make_structured("factored", Values(6, "cuda"), [(9, 12, 3)], "cuda")
    rows, columns = case.fishers[0]
    spoiled = columns.clone()
    spoiled[7] = math.nan
    assert case.run(fishers=[FactoredFisher(rows, spoiled)]).isnan()
    assert case.run(fishers=[FactoredFisher(rows, torch.zeros_like(columns))]).item() == 0.0


# ---- sums

# Samples so long, and so many of one token, that a device of four multiprocessors splits them.
MANY = 80
SHAPES = [((3, 21), 40, 24), ((5, MANY), 70, 33), ((2, 5), 300, 150), ((200,), 72, 33), ((70, 1), 300, 9)]


def integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Small enough for every sum below to be exact in fp32, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).to(dtype).to(device_of("cuda"))


def sums(x: Tensor, dy: Tensor, **options: object) -> list[Tensor]:
    """Row and column sums, in every other element of poisoned memory."""
    parts = [x.new_full((2 * t.shape[-1],), math.nan, dtype=torch.float32) for t in (dy, x)]
    views = [part[::2].zero_() for part in parts]
    FE.fisher_accumulate_(FactoredFisher(*views), x, dy, backend="cuda", **options)  # type: ignore[call-overload]
    assert all(bool(part[1::2].isnan().all()) for part in parts)
    return views


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("leading", "d_in", "d_out"), SHAPES, ids=str)
def test_sums_exact(leading, d_in, d_out, dtype):
    """Integers are summed exactly, whatever lies behind the tokens, in splits and by elements as well."""
    x, dy = integers(*leading, d_in, dtype=dtype), integers(*leading, d_out, dtype=dtype, seed=1)
    buffers = [t.new_full((*leading[:-1], leading[-1] + 3, t.shape[-1]), math.nan) for t in (x, dy)]
    views = [b[..., : leading[-1], :].copy_(t) for b, t in zip(buffers, (x, dy), strict=True)]
    truth = oracles.fisher(list(zip(*(t.reshape(leading[0], -1, t.shape[-1]) for t in (x, dy)), strict=True)))
    found = sums(*views)
    assert torch.equal(found[0].cpu().double(), truth.sum(1))
    assert torch.equal(found[1].cpu().double(), truth.sum(0))


@pytest.mark.parametrize(("leading", "d_in", "d_out"), SHAPES[:4], ids=str)
def test_batch_sums_exact(leading, d_in, d_out):
    """A batch is one sample of all tokens."""
    x, dy = integers(*leading, d_in, dtype=torch.bfloat16), integers(*leading, d_out, dtype=torch.bfloat16)
    truth = oracles.fisher([(x.reshape(-1, d_in), dy.reshape(-1, d_out))])
    found = sums(x, dy, mode="batch")
    torch.testing.assert_close(found[0].cpu().double(), truth.sum(1), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(found[1].cpu().double(), truth.sum(0), rtol=1e-6, atol=0.0)


def test_sums_counters_reused():
    """A launch leaves its counters as it found them, for launches with fewer tiles and with more."""
    for width in (70, 33, 200, 70):
        for shape in ((3, MANY), (90,)):
            x, dy = integers(*shape, width), integers(*shape, 20, seed=1)
            one, other = sums(x, dy), sums(x, dy)
            assert all(map(torch.equal, one, other)) and bool(one[0].any())
