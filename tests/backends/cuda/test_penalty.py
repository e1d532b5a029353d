# SPDX-License-Identifier: Apache-2.0
"""EWC penalty in CUDA: neither how kernels read and cut up matrices nor which tables are kept shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import oracles
import pytest
import torch
from linear_cases import parameter
from penalty_cases import Case, assert_equals_oracle, make
from strategies import Values
from tolerance import assert_within, relative_error, sum_bound
from torch import Tensor

import fused_ewclora as fe
from fused_ewclora.backends import cuda

REASON = fe.available_backends()["cuda"]
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=f"cuda: {REASON}"),
    pytest.mark.usefixtures("poisoned_memory"),
]

FISHERS = (torch.float32, torch.bfloat16)
# Largest part of itself that a factor loses at torch's float32 matmul precisions, to tf32 and to bf16.
ROUNDED = {"high": 2.0**-11, "medium": 2.0**-8}


@pytest.fixture
def precision() -> Iterator[Callable[[str], None]]:
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def check(case: Case) -> None:
    assert_equals_oracle(case, *case.gradients())


def results(case: Case) -> list[Tensor]:
    value, grads = case.gradients()
    return [value.detach(), *grads]


def by_new_table(case: Case) -> list[Tensor]:
    cuda.extension().forget_penalty_tables()
    return results(case)


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


# ---- how F is read

# Where F begins in rows of a wider matrix, how far those are apart, and how many columns are F's.
PLACES = {
    "16 bytes at a time": (8, 64, 40),
    "rows that begin between multiples of 16 bytes": (8, 61, 40),
    "the last columns are part of 16 bytes": (8, 64, 37),
    "the first column lies between multiples of 16 bytes": (9, 64, 40),
}


@pytest.mark.parametrize("rank", [3, 30, 70])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", FISHERS)
def test_fisher_surroundings_unread(dtype, place, rank):
    """NaN: beside its rows, and behind the last of them, in the middle of a strip."""
    start, pitch, d_in = PLACES[place]
    case = make(Values(rank, "cuda"), [(37, d_in, rank)], "cuda", fisher_dtype=dtype, ewc_lambda=3.0)
    buffer = case.fishers[0].new_full((60, pitch), math.nan)
    view = buffer[:37, start : start + d_in].copy_(case.fishers[0])
    check(Case("cuda", [view], case.lora_as, case.lora_bs, case.scales, 3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_may_have_strides(dtype):
    values = Values(1, "cuda")
    case = make(values, [(20, 24, 5), (33, 17, 30), (18, 40, 70)], "cuda", dtype=dtype)
    for i, a in enumerate(case.lora_as):
        scale = values.normal(a.shape[0], dtype=dtype, layout="every other column")
        case.scales[i] = scale.detach().requires_grad_()
        assert scale.stride() == (2,)
    check(case)


def test_mixed_fishers():
    """Each way of reading is a launch of its own, for the largest rank in it; the penalty is that of all."""
    values = Values(2, "cuda")
    shapes = [(20, 32, 40), (33, 40, 20), (40, 24, 20), (40, 48, 5), (17, 40, 70), (50, 33, 5)]
    case = make(values, shapes, "cuda", ewc_lambda=3.0)
    for i in (1, 3, 5):
        case.fishers[i] = case.fishers[i].bfloat16()
    check(case)
    assert same_bits(results(case), results(case))


# ---- how work is cut up


@pytest.mark.parametrize("rank", [70, 130])
def test_rank_chunks(rank):
    """Regions of rows and blocks of columns meet in every chunk of ranks."""
    check(make(Values(3, "cuda"), [(40, 20, rank), (40, 150, rank), (5, 300, rank)], "cuda"))


# Cut, for the four multiprocessors of the emulator, into regions of 80 and of 50 rows: blocks walk down
# several strips, of which the last is ragged.
LONG = {
    "A in shared memory": ("highest", (130, 264, 30), torch.float32),
    "parts of A where they are multiplied": ("highest", (130, 520, 10), torch.float32),
    "A in registers": ("high", (130, 520, 10), torch.float32),
    "half as many bytes": ("high", (130, 520, 16), torch.bfloat16),
    "bf16": ("medium", (130, 520, 20), torch.bfloat16),
    "bf16, A in registers": ("medium", (130, 520, 16), torch.float32),
    "wide rank": ("highest", (130, 200, 40), torch.bfloat16),
    "chunks of ranks, by elements": ("highest", (130, 99, 70), torch.float32),
}


@pytest.mark.parametrize("what", LONG)
def test_several_strips(precision, what):
    """One block walks down several strips of rows."""
    name, shape, fisher_dtype = LONG[what]
    case = make(Values(4, "cuda"), [shape], "cuda", fisher_dtype=fisher_dtype)
    case.scales = [parameter(case.lora_bs[0][0])]
    precision(name)
    assert_rounded(case, results(case), ROUNDED.get(name, 0.0))


def truths(case: Case) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What is computed, by name: the fp64 truth, and what it is for absolute values."""
    exact = (case.fishers, case.lora_as, case.lora_bs, case.scales)
    value, grads = oracles.ewc_penalty(*exact, case.ewc_lambda)
    wide, wides = oracles.ewc_penalty(*[list(map(oracles.magnitude, t)) for t in exact], case.ewc_lambda)
    yield "penalty", value, wide
    for i, (scale, triple, magnitudes) in enumerate(zip(case.scales, grads, wides, strict=True)):
        for kind, truth, magnitude in zip(("dA", "dB", "ds"), triple, magnitudes, strict=True):
            if kind != "ds":
                yield f"{kind} of {i}", truth, magnitude
            elif isinstance(scale, Tensor):
                one = scale.dim() == 0
                yield f"ds of {i}", truth.sum() if one else truth, magnitude.sum() if one else magnitude


def assert_rounded(case: Case, found: list[Tensor], part: float) -> None:
    """B s, A and F D lose up to `part` of themselves where they are factors, four of them at most on the way
    to any result: D is two, and comes squared in the penalty, beside its own F D in a gradient."""
    for (what, truth, magnitude), result in zip(truths(case), found, strict=True):
        longest = max(sum(f.shape) + 2 * a.shape[0] for f, a in zip(case.fishers, case.lora_as, strict=True))
        sums = sum_bound(magnitude, longest, torch.float32, "cuda")
        assert_within(result, truth, sums + ((1 + part) ** 4 - 1) * magnitude, what)


@pytest.mark.parametrize("shape", [(70, 264, 10), (37, 48, 16), (40, 24, 30), (40, 152, 50), (24, 32, 70)])
@pytest.mark.parametrize("fisher_dtype", FISHERS)
@pytest.mark.parametrize("name", ROUNDED)
def test_matmul_precision_rounding(precision, name, fisher_dtype, shape):
    """Lower matmul precision rounds the factors and leaves the sums alone."""
    case = make(Values(sum(shape), "cuda"), [shape] * 3, "cuda", fisher_dtype=fisher_dtype, ewc_lambda=3.0)
    exactly = results(case)
    precision(name)
    rounded = results(case)
    assert_rounded(case, exactly, 0.0)
    assert_rounded(case, rounded, ROUNDED[name])
    for (what, truth, _), more, less in zip(truths(case), exactly, rounded, strict=True):
        if what.startswith(("dA", "dB")):  # in few numbers errors may cancel
            assert relative_error(more, truth) < ROUNDED[name] / 16 < relative_error(less, truth), what
            assert relative_error(less, truth) < 2 * ROUNDED[name], what


# ---- which table serves a call


def square(dtype: torch.dtype = torch.float32) -> Case:
    """Everything as wide as it is tall, so that other views of the same memory are calls, too."""
    case = make(Values(4, "cuda"), [(24, 24, 24), (24, 24, 24)], "cuda", dtype=dtype, ewc_lambda=2.0)
    case.scales = [0.5, 0.25]
    return case


def as_leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


def other_addresses(case: Case) -> None:
    case.lora_bs = as_leaves([2.0 * b for b in case.lora_bs])


def other_fishers(case: Case) -> None:
    case.fishers = [2.0 * f for f in case.fishers]


def fewer_rows(case: Case) -> None:
    case.fishers, case.lora_bs = [f[:17] for f in case.fishers], as_leaves([b[:17] for b in case.lora_bs])


def fewer_columns(case: Case) -> None:
    case.fishers, case.lora_as = (
        [f[:, :17] for f in case.fishers],
        as_leaves([a[:, :17] for a in case.lora_as]),
    )


def fewer_ranks(case: Case) -> None:
    case.lora_as = as_leaves([a[:9] for a in case.lora_as])
    case.lora_bs = as_leaves([b[:, :9] for b in case.lora_bs])


def transposed_fisher(case: Case) -> None:
    case.fishers = [f.T for f in case.fishers]


def transposed_factor(case: Case) -> None:
    case.lora_as = as_leaves([a.T for a in case.lora_as])


def other_dtype(case: Case) -> None:
    """The same bits, read as fp16."""
    case.lora_as = as_leaves([a.detach().view(torch.float16) for a in case.lora_as])
    case.lora_bs = as_leaves([b.detach().view(torch.float16) for b in case.lora_bs])


def other_factor(case: Case) -> None:
    case.scales = [0.5, 0.125]


def fewer_adapters(case: Case) -> None:
    case.fishers, case.lora_as, case.lora_bs, case.scales = (
        t[:1] for t in (case.fishers, case.lora_as, case.lora_bs, case.scales)
    )


def other_lambda(case: Case) -> None:
    case.ewc_lambda = 6.0


def other_precision(case: Case) -> None:
    torch.set_float32_matmul_precision("high")


def other_gradients(case: Case) -> None:
    for a in case.lora_as:
        a.requires_grad_(False)


CHANGES = (
    other_addresses, other_fishers, fewer_rows, fewer_columns, fewer_ranks, transposed_fisher,
    transposed_factor, other_dtype, other_factor, fewer_adapters, other_lambda, other_precision,
    other_gradients,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_table_not_shared(precision, change):
    """A table serves no call but its own."""
    case = square(torch.bfloat16 if change is other_dtype else torch.float32)
    first = by_new_table(case)
    assert same_bits(results(case), first)
    change(case)
    changed = results(case)
    assert not same_bits(changed, first)
    assert same_bits(changed, by_new_table(case))


def test_inplace_update_seen():
    """A table holds where tensors are, not what they hold: optimisers write in place."""
    case = make(Values(5, "cuda"), [(24, 40, 5), (20, 24, 10), (33, 17, 3)], "cuda")
    results(case)
    with torch.no_grad():
        for tensor in (*case.fishers, *case.leaves()):
            tensor.mul_(0.75)
    check(case)


def test_table_eviction():
    """There may be more calls than tables are kept for."""
    cases = [make(Values(i, "cuda"), [(17, 8 + i, 3)], "cuda") for i in range(20)]
    first = [results(case) for case in cases]
    for _ in range(2):
        assert all(same_bits(results(case), before) for case, before in zip(cases, first, strict=True))


@pytest.mark.parametrize("shape", [(0, 24, 3), (24, 0, 3), (0, 0, 3)])
@pytest.mark.parametrize("alone", [True, False])
def test_empty_adapter_gradients(shape, alone):
    """Adapters without elements have gradients of zero."""
    case = make(Values(6, "cuda"), [shape] if alone else [(20, 24, 3), shape, (20, 24, 3)], "cuda")
    check(case)
