# SPDX-License-Identifier: Apache-2.0
"""LoRA linear in CUDA: how kernels cut up rows, columns, ranks and adapters does not show."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from linear_cases import Case, assert_gradients, assert_output, make_scale, parameter
from strategies import Values, gap
from tolerance import EPS, relative_error

import fused_ewclora as fe
from fused_ewclora import functional as FE

REASON = fe.available_backends()["cuda"]
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=f"cuda: {REASON}"),
    pytest.mark.usefixtures("poisoned_memory"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Rows = tuple[tuple[int, int], ...]


def call(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    owners: list[tuple[int, Rows]],
    p: float = 0.0,
    bias: bool = True,
    **layouts: str,
) -> Case:
    """x [rows, d_in], W [d_out, d_in] and, per owner, fp32 factors of a rank on ranges of rows."""
    (rows, d_in, d_out), values = shape, Values(sum(shape), "cuda")
    adapters = []
    for i, (rank, ranges) in enumerate(owners):
        owned = sum(stop - start for start, stop in ranges)
        a = parameter(values.normal(rank, d_in, std=d_in**-0.5))
        b = parameter(values.normal(owned, rank, std=rank**-0.5))
        scale = make_scale(values, ("[r]", "0-d", "float")[i % 3], rank, torch.float32)
        adapters.append(FE.Adapter(a, b, scale, ranges))
    x = parameter(values.normal(rows, d_in, dtype=dtype, layout=layouts.get("x", "contiguous")))
    weight = parameter(values.normal(d_out, d_in, dtype=dtype, std=d_in**-0.5))
    beta = parameter(values.normal(d_out, dtype=dtype)) if bias else None
    dy = values.normal(rows, d_out, dtype=dtype, layout=layouts.get("dy", "contiguous"))
    return Case("cuda", x, weight, beta, adapters, dy, p, 7)


def check(case: Case) -> dict[str, torch.Tensor]:
    y, grads = case.gradients()
    assert_output(case, y)
    assert_gradients(case, grads)
    return grads


@pytest.mark.parametrize(("rank", "p"), [(16, 0.3), (32, 0.0), (40, 0.3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_column_blocks(dtype, rank, p):
    """More columns than a block walks over, both ways, and rows for two regions, that end inside a strip."""
    check(call(dtype, (75, 264, 272), [(rank, ((0, 272),))], p))


@pytest.mark.parametrize(
    ("rank", "dtype"),
    [(65, torch.float16), (129, torch.float32), (270, torch.bfloat16), (1100, torch.bfloat16)],
)
def test_ranks_come_in_parts(rank, dtype):
    check(call(dtype, (20, 24, 40), [(rank, ((0, 40),))], 0.5))


def test_rank_chunks_many_columns():
    """More ranks than shared memory holds, and more columns than the warps of a block write at a time."""
    check(call(torch.float32, (9, 136, 152), [(270, ((0, 152),))]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("first", [0, 8, 13])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unowned_rows_skipped(dtype, first, bias):
    """Without a bias the pass over dy begins at the first owned row: at a multiple of 16 bytes, or not."""
    check(call(dtype, (35, 24, 96), [(10, ((first, first + 20), (40, 44))), (7, ((80, 88),))], bias=bias))


def test_many_adapters():
    """A call may have more adapters than one launch takes."""
    owners: list[tuple[int, Rows]] = [(2, ((8 * i, 8 * i + 3), (8 * i + 5, 8 * i + 8))) for i in range(35)]
    check(call(torch.float32, (9, 24, 280), owners))


@pytest.mark.parametrize("rank", [10, 70])
def test_order_invariant(rank):
    """Sums of many parts of every kind: another order would be other bits."""
    case = call(torch.float32, (33, 40, 300), [(rank, ((0, 220),)), (3, ((220, 300),))])
    y, grads = case.gradients()
    for _ in range(2):
        again, others = case.gradients()
        assert torch.equal(y, again)
        assert all(torch.equal(grad, others[name]) for name, grad in grads.items())


@pytest.mark.parametrize("rank", [10, 40])
def test_scale_gradients_zero_b(rank):
    """Also where their sums take the place of what told the block that it is the last."""
    case = call(torch.float32, (20, 24, 100), [(rank, ((0, 100),))])
    case.adapters[0].lora_b.data.zero_()
    for _ in range(8):
        assert not check(case)["s0"].any()


@pytest.mark.parametrize("first", [0, 8])
def test_gradient_subsets(first):
    """Every set of them has its own passes: over dy for one or both of its products, over x, or neither."""
    case = call(torch.float32, (37, 24, 40), [(5, ((first, 40),))], 0.3)
    leaves, expected = case.leaves(), check(case)
    for wanted in itertools.product((False, True), repeat=len(leaves)):
        if not any(wanted):
            continue
        for leaf, needed in zip(leaves.values(), wanted, strict=True):
            leaf.requires_grad_(needed)
        for name, grad in case.gradients()[1].items():
            error = relative_error(grad, expected[name].double().cpu())
            assert error <= 4 * EPS[torch.float32], f"{name} of {wanted}: {error:.2e}"


@pytest.mark.parametrize("frozen", ["", "B", "scale"])
def test_many_row_ranges(frozen):
    """A call may have more ranges of rows than one launch takes."""
    many = tuple((2 * i, 2 * i + 1) for i in reversed(range(70)))
    few = tuple((2 * i + 1, 2 * i + 2) for i in range(40))
    rest = tuple((2 * i + 1, 2 * i + 2) for i in range(40, 70))  # beside those of `few`
    case = call(torch.float32, (9, 24, 150), [(3, few), (5, many), (4, ((141, 150),)), (2, rest)])
    for adapter in case.adapters:
        if frozen == "B":
            adapter.lora_b.requires_grad_(False)
        elif frozen == "scale" and isinstance(adapter.scale, torch.Tensor):
            adapter.scale.requires_grad_(False)
    check(case)


# Where rows begin in a wider matrix, how far they are apart, and how many columns are theirs.
PLACES = {
    "16 bytes at a time": (8, 96, 64),
    "rows that begin between multiples of 16 bytes": (8, 93, 64),
    "the last columns are part of 16 bytes": (8, 96, 61),
    "the first column lies between multiples of 16 bytes": (9, 96, 64),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_gaps_unread(dtype, place):
    """`gap`; the numbers are those of dense rows."""
    start, pitch, columns = PLACES[place]
    case = call(dtype, (50, columns, columns), [(12, ((0, columns),))], 0.2)
    expected = case.gradients()
    for name in ("x", "dy"):
        dense = getattr(case, name).detach()
        buffer = dense.new_full((52, pitch), gap(dtype))
        setattr(case, name, parameter(buffer[:50, start : start + columns].copy_(dense)))
    y, grads = case.gradients()
    torch.testing.assert_close(y, expected[0], rtol=4 * EPS[dtype], atol=4 * EPS[dtype])
    for name in ("A0", "B0", "s0", "bias"):
        assert relative_error(grads[name], expected[1][name].double().cpu()) <= 4 * EPS[torch.float32], name


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_scales_bias(dtype):
    """Scales and bias may have strides."""
    case, values = call(dtype, (20, 24, 40), [(5, ((0, 8),)), (20, ((8, 40),))]), Values(1, "cuda")
    for i, adapter in enumerate(case.adapters):
        scale = values.normal(adapter.lora_a.shape[0], layout="every other column")
        case.adapters[i] = adapter._replace(scale=parameter(scale))
    case.bias = parameter(values.normal(40, dtype=dtype, layout="every other column"))
    assert all(t.stride() == (2,) for t in (case.bias, *(adapter.scale for adapter in case.adapters)))
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_ignores_dropped_values(dtype):
    """Dropped numbers do not count, whatever their values are."""
    case = call(dtype, (40, 64, 48), [(5, ((0, 48),))], 0.4)
    for leaf in (case.x, case.weight, case.bias, case.adapters[0].lora_b, case.adapters[0].scale):
        leaf.requires_grad_(False)
    _, grads = case.gradients()
    dropped = oracles.dropout_mask(case.seed, 40, 64, 0.4).to(case.x.device) == 0
    case.x = case.x.masked_fill(dropped, math.nan)
    _, again = case.gradients()
    assert torch.equal(grads["A0"], again["A0"])


@pytest.fixture(params=["high", "medium"])
def lower_precision(request: pytest.FixtureRequest) -> Iterator[Any]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def test_matmul_precision_tf32(lower_precision):
    """Of each product two factors are rounded, u and z once more where they are factors in turn. The product
    of x and the weight is PyTorch's, which some processors compute from bf16 parts at "medium"."""
    case = call(torch.float32, (70, 136, 264), [(16, ((0, 264),))])
    y, grads = case.gradients()
    exact = oracles.lora_linear_gradients(case.dy, case.x, case.weight, case.adapters, None)
    tf32 = 2.0**-11
    for name, truth in zip(("A0", "B0", "s0"), exact.adapters[0], strict=True):
        error = relative_error(grads[name], truth)
        assert tf32 / 8 < error < 2 * tf32, f"{name}: error {error:.2e}"
    low_rank = oracles.lora_linear(case.x, case.weight, case.bias, case.adapters, None)
    base = oracles.lora_linear(case.x, case.weight, case.bias, [], None)
    own = F.linear(case.x, case.weight, case.bias).detach().cpu().double() - base
    assert (y.detach().cpu().double() - low_rank).norm() < 2 * tf32 * low_rank.norm() + own.norm()
    assert relative_error(grads["bias"], exact.bias) < 8 * EPS[torch.float32]
