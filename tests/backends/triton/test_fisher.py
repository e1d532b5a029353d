# SPDX-License-Identifier: Apache-2.0
"""Fisher accumulation on Triton: neither how kernels cut up tokens and samples nor how they read shows."""

from __future__ import annotations

import itertools
import math
from typing import Any

import oracles
import pytest
import torch
from strategies import Values, device_of
from tolerance import EPS, assert_within, sum_bound
from torch import Tensor

import fused_ewclora as fe
from fused_ewclora import functional as FE

REASON = fe.available_backends()["triton"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"triton: {REASON}")
if REASON is None:
    from fused_ewclora.backends.triton import fisher_accumulate as host
    from fused_ewclora.backends.triton import launch, tables

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def accumulate(fisher: Tensor, x: Tensor, dy: Tensor, **options: Any) -> Tensor:
    return FE.fisher_accumulate_(fisher, x, dy, backend="triton", **options)


def integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Small enough for every sum below to be exact in fp32, in any order."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-2, 3, shape, generator=generator)
    return values.to(dtype).to(device_of("triton"))


def exact(x: Tensor, dy: Tensor) -> Tensor:
    return oracles.fisher(list(zip(x, dy, strict=True)))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...], dict[str, Any]]]:
    """(kernel, grid, options) of every launch made by the test."""
    made: list[tuple[str, tuple[int, ...], dict[str, Any]]] = []
    run = launch.launch

    def noted(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        made.append((kernel.fn.__name__, grid, options))
        run(kernel, grid, *arguments, **options)

    monkeypatch.setattr(launch, "launch", noted)
    return made


def split_into(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    monkeypatch.setattr(host, "choose_splits", lambda *_: splits)


def block_of_tokens(dtype: torch.dtype) -> int:
    device = torch.empty(0, device=device_of("triton"))
    return int(tables.lookup("fisher_sample_kernel", launch.arch(device), dtype)["BLOCK_T"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks, extra", [(0, 2), (1, -1), (1, 0), (1, 1), (2, -1), (3, 5)])
def test_sample_boundaries(launches, dtype, blocks, extra):
    """Neither into what lies behind the tokens of a sample in memory: NaN here."""
    tokens = blocks * block_of_tokens(dtype) + extra
    x, dy = integers(3, tokens, 48, dtype=dtype), integers(3, tokens, 32, dtype=dtype, seed=1)
    buffers = [t.new_full((3, tokens + 3, t.shape[-1]), math.nan) for t in (x, dy)]
    views = [buffer[:, :tokens].copy_(t) for buffer, t in zip(buffers, (x, dy), strict=True)]
    fisher = accumulate(torch.zeros(32, 48, device=x.device), *views)
    assert torch.equal(fisher.cpu().double(), exact(x, dy))
    assert [name for name, _, _ in launches] == ["fisher_sample_kernel"]


@pytest.mark.parametrize("tokens", [7, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_descriptors_equal_pointers(monkeypatch, launches, dtype, tokens):
    """Descriptors and pointers read the same numbers."""
    x, dy = integers(5, tokens, 72, dtype=dtype), integers(5, tokens, 40, dtype=dtype, seed=1)
    by_descriptor = accumulate(torch.zeros(40, 72, device=x.device), x, dy)
    monkeypatch.setattr(launch, "tileable", lambda tensor, shape: False)
    by_pointer = accumulate(torch.zeros(40, 72, device=x.device), x, dy)
    assert torch.equal(by_descriptor, by_pointer)
    config = tables.lookup("fisher_sample_kernel", launch.arch(x), dtype)
    assert [options["TMA"] for _, _, options in launches] == [config["TMA"], False]


def test_packed_gradient_slices(launches):
    """Slices of a packed gradient are read in place by descriptor."""
    x, packed = integers(3, 20, 32), integers(3, 20, 3 * 32, seed=1)
    fisher = accumulate(torch.zeros(32, 32, device=x.device), x, packed[..., 32:64])
    assert torch.equal(fisher.cpu().double(), exact(x, packed[..., 32:64]))
    ((_, _, options),) = launches
    assert options["TMA"] == tables.lookup("fisher_sample_kernel", launch.arch(x), x.dtype)["TMA"]


@pytest.mark.parametrize("splits", [2, 3, 7])
@pytest.mark.parametrize("shape", [(11, 5), (40,)], ids=["tokens", "one token"])
def test_splits_add_in_order(monkeypatch, launches, shape, splits):
    """Bit for bit what as many calls on the parts do."""
    values = Values(1, "triton")
    x, dy, fisher = values.normal(*shape, 70), values.normal(*shape, 33), values.fisher(33, 70)
    expected = fisher.clone()
    split_into(monkeypatch, splits)
    accumulate(fisher, x, dy, weight=0.7)
    split_into(monkeypatch, 1)
    for first, last in itertools.pairwise(shape[0] * part // splits for part in range(splits + 1)):
        accumulate(expected, x[first:last], dy[first:last], weight=0.7)
    assert torch.equal(fisher, expected)
    programs = [grid[0] for _, grid, _ in launches]
    assert programs[0] == splits * programs[1]


@pytest.mark.skipif(device_of("triton") != "cpu", reason="a GPU starts programs as it likes")
@pytest.mark.parametrize("shape", [(6, 5), (40,)], ids=["tokens", "one token"])
def test_any_start_order(monkeypatch, shape):
    """Splits end, and add in the same order, when the last program starts first and ends before the others
    start; the next launch finds its locks as the first one did."""
    from triton.runtime import interpreter

    values = Values(6, "triton")
    x, dy, fisher = values.normal(*shape, 70), values.normal(*shape, 33), values.fisher(33, 70)
    split_into(monkeypatch, 3)
    expected = accumulate(accumulate(fisher.clone(), x, dy), x, dy)
    builder = interpreter.interpreter_builder
    place = type(builder).set_grid_idx
    monkeypatch.setattr(
        builder, "set_grid_idx", lambda i, j, k: place(builder, builder.grid_dim[0] - 1 - i, j, k)
    )
    assert torch.equal(accumulate(accumulate(fisher, x, dy), x, dy), expected)


@pytest.mark.parametrize("splits", [1, 3])
def test_packed_equals_dense(monkeypatch, splits):
    """Packed samples give, bit for bit, the result of samples of one length."""
    split_into(monkeypatch, splits)
    values = Values(2, "triton")
    x, dy = values.normal(6, 21, 31), values.normal(6, 21, 40)
    fisher, packed = values.zeros(40, 31), values.zeros(40, 31)
    accumulate(fisher, x, dy)
    offsets = torch.arange(7, device=x.device) * 21
    accumulate(packed, x.reshape(-1, 31), dy.reshape(-1, 40), cu_seqlens=offsets)
    assert torch.equal(fisher, packed)


@pytest.mark.parametrize("shape", [(11, 5), (40,)], ids=["tokens", "one token"])
def test_bf16_rounded_once(monkeypatch, launches, shape):
    """A bf16 Fisher is rounded once, whatever number of splits takes least time."""
    values = Values(3, "triton")
    x, dy = values.normal(*shape, 31), values.normal(*shape, 17)
    before = values.fisher(17, 31, dtype=torch.bfloat16)
    fisher, wide = before.clone(), before.float()
    split_into(monkeypatch, 3)
    accumulate(fisher, x, dy)
    split_into(monkeypatch, 1)
    accumulate(wide, x, dy)
    assert torch.equal(fisher, wide.bfloat16())
    assert launches[0][1] == launches[1][1]


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_view_surroundings_untouched(monkeypatch, mode):
    """Elements around a view of the Fisher keep their bits."""
    split_into(monkeypatch, 2)
    values = Values(4, "triton")
    x, dy = values.normal(4, 9, 40), values.normal(4, 9, 33)
    expected = accumulate(values.zeros(33, 40), x, dy, mode=mode)
    for transposed in (False, True):
        buffer = values.full((50, 50), math.nan)
        view = buffer.T[8:41, 8:48] if transposed else buffer[8:41, 8:48]
        accumulate(view.zero_(), x, dy, mode=mode)
        assert_within(
            view, oracles.exact(expected), 8 * EPS[torch.float32] * oracles.exact(expected), "fisher"
        )
        view.fill_(math.nan)
        assert bool(buffer.isnan().all())


@pytest.mark.parametrize("pointers", [False, True])
def test_int64_sample_stride(monkeypatch, pointers):
    """The last of five; only the pages that are read exist."""
    if pointers:
        monkeypatch.setattr(launch, "tileable", lambda tensor, shape: False)
    x, dy = integers(5, 3, 8, dtype=torch.float16), integers(5, 3, 16, dtype=torch.float16, seed=1)
    buffer = torch.empty((1 << 31) + 24, dtype=torch.float16, device=x.device)
    far = buffer.as_strided((5, 3, 8), (1 << 29, 8, 1)).copy_(x)
    fisher = accumulate(torch.zeros(16, 8, device=x.device), far, dy)
    assert torch.equal(fisher.cpu().double(), exact(x, dy))
    fisher = accumulate(torch.zeros(16, 8, device=x.device), far[:, 0], dy[:, 0])
    assert torch.equal(fisher.cpu().double(), exact(x[:, :1], dy[:, :1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_single_token_fp32(dtype):
    """Of numbers with all bits set, whose squares no 16-bit type and no single tf32 holds."""
    values = Values(5, "triton")
    x, dy = values.normal(300, 33, dtype=dtype), values.normal(300, 17, dtype=dtype)
    truth = oracles.exact(dy).square().T @ oracles.exact(x).square()
    fisher = accumulate(values.zeros(17, 33), x, dy)
    assert_within(fisher, truth, sum_bound(truth, 300, dtype, "triton"), "fisher")


@pytest.mark.parametrize("samples", [1, 2, 64, 1000])
@pytest.mark.parametrize("tiles", [1, 7, 36, 64, 100, 131, 132, 256, 1024])
def test_split_wave_cost(tiles, samples):
    """In the model that chooses them, at the tokens of a ViT; and no split is empty."""
    splits = host.choose_splits(tiles, samples, 224, 132)
    assert 1 <= splits <= min(samples, host.MAX_SPLITS)

    def samples_in_a_row(splits: int) -> int:
        return -(-tiles * splits // 132) * -(-samples // splits)

    assert samples_in_a_row(splits) <= samples_in_a_row(1)
    if tiles <= 66 and samples >= 64:  # at least half the device would idle
        assert splits > 1


def test_vit_grid_h200():
    """k of ViT-B, 36 tiles of 128 x 128 for 132 multiprocessors."""
    x = torch.empty(64, 197, 768, dtype=torch.bfloat16, device="meta")
    fisher = torch.empty(768, 768, device="meta")
    with launch.noting("sm_90") as noted:
        host.fisher_accumulate_(fisher, x, x, "sample", 1.0, None)
    (only,) = noted
    assert 0.8 * 132 <= only.grid[0] <= 132 and only.options["TMA"]
