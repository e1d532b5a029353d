# SPDX-License-Identifier: Apache-2.0
"""Fisher accumulation in CUDA: neither how kernels cut up tokens and samples nor how they read shows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import oracles
import pytest
import torch
from strategies import Values, device_of, with_layout
from tolerance import EPS, assert_within, rounding_bound, sum_bound
from torch import Tensor

import fused_ewclora as fe
from fused_ewclora import functional as FE

REASON = fe.available_backends()["cuda"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"cuda: {REASON}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNEVEN = ("transposed", "every other column", "columns of a wider matrix", "expanded")
# Samples so long, and so many of one token, that a device of four multiprocessors or more splits them: into
# samples, and in two.
LONG, MANY = 320, 120


def accumulate(fisher: Tensor, x: Tensor, dy: Tensor, **options: Any) -> Tensor:
    return FE.fisher_accumulate_(fisher, x, dy, backend="cuda", **options)


def zeros(x: Tensor, dy: Tensor) -> Tensor:
    return torch.zeros(dy.shape[-1], x.shape[-1], device=x.device)


def integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Small enough for every sum below to be exact in fp32, in any order."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-2, 3, shape, generator=generator)
    return values.to(dtype).to(device_of("cuda"))


def exact(x: Tensor, dy: Tensor) -> Tensor:
    return oracles.fisher(list(zip(x, dy, strict=True)))


@pytest.fixture(params=["highest", "high", "medium"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("width", [48, 49], ids=["wide", "by elements"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [2, 15, 16, 17, 31, 32, 33, 48, 65, 133])
def test_sample_boundaries(dtype, tokens, width):
    """Neither into what lies behind the tokens of a sample in memory: NaN here."""
    x, dy = integers(3, tokens, width, dtype=dtype), integers(3, tokens, 32, dtype=dtype, seed=1)
    buffers = [t.new_full((3, tokens + 3, t.shape[-1]), math.nan) for t in (x, dy)]
    views = [buffer[:, :tokens].copy_(t) for buffer, t in zip(buffers, (x, dy), strict=True)]
    fisher = accumulate(zeros(x, dy), *views)
    assert torch.equal(fisher.cpu().double(), exact(x, dy))


@pytest.mark.parametrize("layout", UNEVEN)
@pytest.mark.parametrize("shape", [(3, 37), (45,)], ids=["tokens", "one token"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_agree(dtype, shape, layout):
    """All layouts of the same numbers give the same result."""
    x, dy = integers(*shape, 72, dtype=dtype), integers(*shape, 40, dtype=dtype, seed=1)
    if layout == "expanded":
        x = x[..., :1, :].contiguous().expand(x.shape)
    straight = accumulate(zeros(x, dy), x.contiguous(), dy)
    for a, b in ((with_layout(x, layout), dy), (x, with_layout(dy, layout))):
        if layout == "expanded" and b is not dy:
            continue
        assert torch.equal(accumulate(zeros(x, dy), a, b), straight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_rows(dtype):
    """Rows that do not begin at a multiple of 16 bytes are read element by element."""
    x, dy = integers(2, 5, 64, dtype=dtype), integers(2, 5, 32, dtype=dtype, seed=1)
    storage = x.new_full((x.numel() + 1,), math.nan)
    moved = storage[1:].view(x.shape).copy_(x)
    assert torch.equal(accumulate(zeros(x, dy), moved, dy), accumulate(zeros(x, dy), x, dy))


@pytest.mark.parametrize(
    "shape, parts",
    [((3, LONG), (0, 1, 2, 3)), ((MANY,), (0, MANY // 2, MANY))],
    ids=["tokens", "one token"],
)
def test_splits_add_in_order(shape, parts):
    """Bit for bit what a call for each part does, in this order and in no other."""
    values = Values(1, "cuda")
    x, dy, fisher = values.normal(*shape, 70), values.normal(*shape, 33), values.fisher(33, 70)
    expected, reversed_ = fisher.clone(), fisher.clone()
    ranges = list(itertools.pairwise(parts))
    for first, last in ranges:
        accumulate(expected, x[first:last], dy[first:last], weight=0.7)
    for first, last in ranges[::-1]:
        accumulate(reversed_, x[first:last], dy[first:last], weight=0.7)
    accumulate(fisher, x, dy, weight=0.7)
    assert torch.equal(fisher, expected)
    assert not torch.equal(reversed_, expected)


def test_locks_reused():
    """A launch leaves its locks as it found them, for launches with fewer tiles and with more."""
    for width in (70, 33, 200, 70):
        x, dy = integers(3, LONG, width), integers(3, LONG, 20, seed=1)
        split, parts = zeros(x, dy), zeros(x, dy)
        accumulate(split, x, dy)
        for n in range(3):
            accumulate(parts, x[n : n + 1], dy[n : n + 1])
        assert torch.equal(split, parts)


@pytest.mark.parametrize("tokens", [21, LONG])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_packed_equals_dense(tokens, kind):
    """Packed samples give, bit for bit, the result of samples of one length."""
    values = Values(2, "cuda")
    x, dy = values.normal(3, tokens, 31), values.normal(3, tokens, 40)
    fisher = accumulate(zeros(x, dy), x, dy)
    offsets = torch.arange(4, dtype=kind, device=x.device) * tokens
    packed = accumulate(zeros(x, dy), x.reshape(-1, 31), dy.reshape(-1, 40), cu_seqlens=offsets)
    assert torch.equal(fisher, packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "lengths", [(0, 0, 0), (0, 33), (33, 0), (0, 1, 0, 0, 40, 0), (0, LONG, 0, 0, LONG), (1, 1, 1)]
)
def test_empty_samples(lengths, dtype):
    """Also where they begin, end or make up all of a split's part."""
    offsets = list(itertools.accumulate(lengths, initial=0))
    x, dy = integers(offsets[-1], 48, dtype=dtype), integers(offsets[-1], 24, dtype=dtype, seed=1)
    samples = [(x[a:b], dy[a:b]) for a, b in itertools.pairwise(offsets)]
    cu_seqlens = torch.tensor(offsets, device=x.device)
    fisher = accumulate(zeros(x, dy), x, dy, cu_seqlens=cu_seqlens)
    assert torch.equal(fisher.cpu().double(), oracles.fisher(samples))


@pytest.mark.parametrize("mode", ["sample", "batch"])
@pytest.mark.parametrize("shape", [(3, LONG), (MANY,)], ids=["tokens", "one token"])
def test_bf16_rounded_once(shape, mode):
    """A bf16 Fisher is rounded once, however many multiprocessors are idle."""
    values = Values(3, "cuda")
    x, dy = 0.1 * values.normal(*shape, 40), 0.1 * values.normal(*shape, 16)
    fisher = values.fisher(16, 40, dtype=torch.bfloat16)
    before, wide = oracles.exact(fisher), accumulate(zeros(x, dy), x, dy, mode=mode)
    accumulate(fisher, x, dy, mode=mode)
    total = before + oracles.exact(wide)  # of which the order of sums is another one
    bound = rounding_bound(total, torch.bfloat16) + 8 * EPS[torch.float32] * total
    assert_within(fisher, total, bound, "fisher")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["sample", "batch"])
@pytest.mark.parametrize("transposed", [False, True])
def test_view_surroundings_untouched(mode, transposed, dtype):
    """Three views of which two are read 16 bytes at a time."""
    x, dy = integers(2, 9, 40), integers(2, 9, 33, seed=1)
    expected = accumulate(zeros(x, dy), x, dy, mode=mode).to(dtype)
    for first, columns in ((8, 72), (8, 70), (5, 72)):
        buffer = torch.full((50, columns), math.nan, dtype=dtype, device=x.device)
        view = buffer[first : first + 40, 8:41].T if transposed else buffer[8:41, first : first + 40]
        accumulate(view.zero_(), x, dy, mode=mode)
        assert torch.equal(view, expected)
        view.fill_(math.nan)
        assert bool(buffer.isnan().all())


@pytest.mark.parametrize("width", [8, 9], ids=["wide", "by elements"])
def test_int64_sample_stride(width):
    """The last of five; only the pages that are read exist."""
    x = integers(5, 3, width, dtype=torch.float16)
    dy = integers(5, 3, 16, dtype=torch.float16, seed=1)
    buffer = torch.empty((1 << 31) + 3 * width, dtype=torch.float16, device=x.device)
    far = buffer.as_strided((5, 3, width), (1 << 29, width, 1)).copy_(x)
    assert torch.equal(accumulate(zeros(x, dy), far, dy).cpu().double(), exact(x, dy))
    fisher = accumulate(zeros(x, dy), far[:, 0], dy[:, 0])
    assert torch.equal(fisher.cpu().double(), exact(x[:, :1], dy[:, :1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_single_token_fp32(dtype):
    """Of numbers with all bits set, whose squares no 16-bit type and no single tf32 holds."""
    values = Values(5, "cuda")
    x, dy = values.normal(300, 33, dtype=dtype), values.normal(300, 17, dtype=dtype)
    truth = oracles.exact(dy).square().T @ oracles.exact(x).square()
    fisher = accumulate(zeros(x, dy), x, dy)
    assert_within(fisher, truth, sum_bound(truth, 300, dtype, "cuda"), "fisher")


@pytest.mark.parametrize("shape", [(2, 40), (80,)], ids=["tokens", "one token"])
def test_matmul_precision_tf32(precision, shape):
    """At lower matmul precisions fp32 is rounded to tf32, never to bf16."""
    values = Values(6, "cuda")
    x, dy = values.normal(*shape, 33), values.normal(*shape, 17)
    samples = [(a.reshape(-1, 33), b.reshape(-1, 17)) for a, b in zip(x, dy, strict=True)]
    truth, bound = torch.zeros(17, 33, dtype=torch.float64), torch.zeros(17, 33, dtype=torch.float64)
    for a, b in samples:
        g, magnitude = (
            oracles.exact(b).T @ oracles.exact(a),
            oracles.exact(b).abs().T @ oracles.exact(a).abs(),
        )
        # A factor, or its square, loses up to half a unit of 11 bits.
        e = 2 * 2.0**-11 * magnitude + sum_bound(magnitude, len(a), torch.float32, "cuda")
        truth, bound = truth + g.square(), bound + 2 * g.abs() * e + e.square()
    fisher = accumulate(zeros(x, dy), x, dy)
    assert_within(fisher, truth, bound, "fisher")
    error = float((fisher.cpu().double() - truth).norm() / truth.norm())
    assert (error < 2e-6) == (precision == "highest"), f"relative error {error:.2g} at {precision}"


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_empty_launches_nothing(mode):
    """With nothing to add, no kernel is launched."""
    device = device_of("cuda")
    for samples, tokens, d_in, d_out in ((0, 4, 3, 5), (2, 0, 3, 5), (2, 4, 0, 5), (2, 4, 3, 0)):
        fisher = torch.ones(d_out, d_in, device=device)
        x, dy = (torch.ones(samples, tokens, d, device=device) for d in (d_in, d_out))
        assert torch.equal(accumulate(fisher, x, dy, mode=mode), torch.ones_like(fisher))
