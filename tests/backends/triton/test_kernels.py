# SPDX-License-Identifier: Apache-2.0
"""What is particular to Triton's kernels, in its interpreter and on GPUs alike: tiles, descriptors and
pointers, groups of adapters, unwritten memory, the order of sums."""

from __future__ import annotations

import every_operation
import oracles
import pytest
import torch
from fisher_cases import Case as FisherCase
from fisher_cases import assert_accumulates, per_sample
from linear_cases import Case, assert_gradients, assert_output, parameter
from penalty_cases import assert_equals_oracle, make
from strategies import LINEAR_BACKENDS, Values, family, refusal, refused_linear
from tolerance import assert_within, rounding_bound, sum_bound

import fused_ewclora as fe
from fused_ewclora import functional as FE
from fused_ewclora.ops.dispatch import LinearShape

WHY = fe.available_backends()["triton"]
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(WHY is not None, reason=f"Triton: {WHY}"),
]
ALGORITHMS = [name for name in LINEAR_BACKENDS if family(name) == "triton"]
each_algorithm = pytest.mark.parametrize("backend", ALGORITHMS)
DTYPES = [torch.float32, torch.bfloat16]
WIDE = torch.cuda.is_available()  # blocks are larger there than the interpreter's


def at_offset(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """The same values and strides that many elements further into a buffer: 0 is where allocations start."""
    buffer = tensor.new_empty(tensor.numel() + elements)
    return buffer[elements:].view(tensor.shape).copy_(tensor)


def linear(backend: str, dtype: torch.dtype, ranges: list, ranks: list[int], **sizes: int) -> Case:
    """One call with fp32 factors; adapter i owns ranges[i] with rank ranks[i]."""
    values, offset = Values(2, backend), sizes.get("offset", 0)
    rows, d_in, d_out = sizes.get("rows", 37), sizes.get("d_in", 72), sizes.get("d_out", 80)
    adapters = []
    for i, (owned, rank) in enumerate(zip(ranges, ranks[: len(ranges)], strict=True)):
        height = sum(stop - start for start, stop in owned)
        a, b = values.normal(rank, d_in, std=d_in**-0.5), values.normal(height, rank)
        scale = parameter(values.normal(rank)) if i % 2 else 0.75
        adapters.append(FE.Adapter(parameter(a), parameter(b), scale, tuple(owned)))
    x, dy = values.normal(rows, d_in, dtype=dtype), values.normal(rows, d_out, dtype=dtype)
    weight = values.normal(d_out, d_in, dtype=dtype, std=d_in**-0.5)
    x, weight, dy = (at_offset(t, offset) for t in (x, weight, dy))
    bias = values.normal(d_out, dtype=dtype)
    return Case(backend, parameter(x), parameter(weight), parameter(bias), adapters, dy)


def assert_right(case: Case) -> None:
    y, grads = case.gradients()
    assert_output(case, y)
    assert_gradients(case, grads)


@each_algorithm
@pytest.mark.parametrize("rank", [1, 4, 10, 16, 30, 64])
def test_padded_ranks(backend, rank):
    """The ranks used in publications are padded with zeros."""
    assert_right(linear(backend, torch.bfloat16, [[(0, 80)]], [rank]))


@each_algorithm
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
def test_misaligned_views(backend, dtype, offset):
    """One element into a buffer: no longer at a multiple of 16 bytes, so that tiles come through pointers."""
    from fused_ewclora.backends.triton import launch

    case = linear(backend, dtype, [[(0, 80)]], [10], offset=offset)
    tileable = [launch.tileable(t.detach(), (16, 16)) for t in (case.x, case.weight, case.dy)]
    assert tileable == [offset == 0] * 3
    assert_right(case)


@each_algorithm
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_row_ranges(backend, dtype):
    """k and v of five heads, one row and most rows of a tile, ranges out of order and rows of nobody."""
    heads = [[(16 * h + 5, 16 * h + 9) for h in range(5)], [(16 * h + 9, 16 * h + 16) for h in range(5)]]
    assert_right(linear(backend, dtype, heads, [3, 17]))
    uneven = [[(70, 79)], [(0, 1), (40, 69)], [(2, 33)]]
    assert_right(linear(backend, dtype, uneven, [1, 30, 4]))


@each_algorithm
def test_many_adapters(backend):
    """A call may have more adapters than one launch packs."""
    ranges = [[(8 * i, 8 * i + 7)] for i in range(9)]
    assert_right(linear(backend, torch.float32, ranges, [1, 10, 2, 7, 16, 3, 5, 1, 9]))


@each_algorithm
@pytest.mark.parametrize("shape", [{"rows": 1}, {"d_in": 1}, {"d_out": 1}, {"rows": 33, "d_in": 129}])
def test_shapes_beside_tile_sizes(backend, shape):
    d_out = shape.get("d_out", 65)
    assert_right(linear(backend, torch.float16, [[(0, d_out)]], [4], **{"d_out": d_out, **shape}))


@each_algorithm
@pytest.mark.parametrize("blocks", [(16, 64, 16), (64, 16, 64), (64, 64, 32)])
def test_config_invariant(backend, blocks):
    """What a table or the tuner may choose changes speed, not results."""
    from fused_ewclora.backends.triton import tables

    m, n, k = blocks
    common = {"num_warps": 4, "num_stages": 2, "TMA": False}
    kernels = {
        "lora_linear_kernel": {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 4},
        "lowrank_rows_kernel": {"BLOCK_M": m, "BLOCK_N": n},
        "lowrank_columns_kernel": {"BLOCK_M": m, "BLOCK_N": n},
        "lowrank_columns_kernel:with_u": {"BLOCK_M": n, "BLOCK_N": m},
    }
    entries = [
        {"kernel": name, "config": {**config, **common}, "source": "test"} for name, config in kernels.items()
    ]
    case = linear(backend, torch.float32, [[(0, 80)]], [10], d_in=80)
    with tables.override(*entries), tables.watching() as seen:
        assert_right(case)
    assert {key.kernel for key in seen} >= {"lowrank_columns_kernel", "lowrank_columns_kernel:with_u"}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("ranges", [[[(0, 72)]], [[(8, 30)], [(40, 41), (50, 70)]]])
def test_finished_in_launch(monkeypatch, ranges, dropout):
    """Sums over more chunks of ragged rows than are added at once are finished by the launches that make
    them, four for a backward; the counters end at zero, and the next call repeats every bit."""
    from fused_ewclora.backends.triton import kept, lowrank

    counters, made = {}, []
    new, run = kept.zeros, lowrank.launch

    def zeros(like, size):
        return counters.setdefault(size, new(like, size))

    def noted(kernel, grid, *arguments, **options):
        made.append((kernel.fn.__name__, grid))
        run(kernel, grid, *arguments, **options)

    monkeypatch.setattr(lowrank, "multiprocessors", lambda like: 1000)
    monkeypatch.setattr(kept, "zeros", zeros)
    monkeypatch.setattr(lowrank, "launch", noted)
    case = linear("triton:prologue", torch.float32, ranges, [10, 3], rows=1170 if WIDE else 293, d_out=72)
    case.dropout_p = dropout
    assert_right(case)
    assert counters and not any(int(count.abs().max()) for count in counters.values())
    backward = made[-4:]
    names = ("pack", "columns", "linear", "columns")
    assert all(name in kernel for name, (kernel, _) in zip(names, backward, strict=True)), backward
    assert all(grid[1] > 9 for kernel, grid in backward if "columns" in kernel)
    (_, grads), (_, again) = case.gradients(), case.gradients()
    assert all(torch.equal(grad, again[name]) for name, grad in grads.items())


def test_dropout_matches_reference():
    """Also in those that have no backward with dropout."""
    served = []
    for name in [*ALGORITHMS, "reference"]:
        shape = LinearShape(64, 64, 64, 33, dropout=True)
        if refusal(name, "lora_linear", torch.float32, shape=shape) is None:
            values = Values(0, name)
            eye, x = torch.eye(33, device=values.device), values.full((50, 33), 1.0)
            options = {"dropout_p": 0.3, "training": True, "seed": -7, "backend": name}
            served.append(FE.lora_linear(x, torch.zeros_like(eye), None, eye, eye, **options).cpu() != 0)
    assert len(served) >= 3 and all(torch.equal(served[-1], kept) for kept in served)
    assert 0.5 < float(served[-1].double().mean()) < 0.9


def test_operations_deterministic():
    """Every operation repeats bit for bit."""
    first, again = every_operation.results("triton"), every_operation.results("triton")
    assert all(torch.equal(value, again[name]) for name, value in first.items())


@each_algorithm
def test_algorithms_deterministic(backend):
    """Every algorithm repeats bit for bit."""
    p = 0.5 if refused_linear(backend, 10, dropout=True) is None else 0.0
    case = linear(backend, torch.bfloat16, [[(0, 80)]], [10], rows=70)
    case.dropout_p = p
    (y, grads), (y2, grads2) = case.gradients(), case.gradients()
    assert torch.equal(y, y2) and all(torch.equal(grad, grads2[name]) for name, grad in grads.items())


@pytest.mark.parametrize("fisher_dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
def test_penalty_any_alignment(fisher_dtype, offset):
    """The penalty reads tensors at any alignment."""
    case = make(
        Values(3, "triton"), [(48, 80, 10), (33, 72, 30), (64, 16, 64)], "triton", fisher_dtype=fisher_dtype
    )
    case.fishers = [at_offset(f, offset) for f in case.fishers]
    case.lora_as = [parameter(at_offset(a.detach(), offset)) for a in case.lora_as]
    assert_equals_oracle(case, *case.gradients())


@pytest.mark.parametrize("slices", [1, 2, 4, 8])
def test_penalty_slices(slices):
    """The number of slices of a block of columns changes only the order of sums."""
    from fused_ewclora.backends.triton import launch, tables

    sizes = {"BLOCK_M": 16, "BLOCK_N": 128, "SLICES": slices, "num_warps": slices, "num_stages": 2}
    entries = [
        {"kernel": f"ewc_penalty_kernel:{launch.precision()}{variant}", "config": sizes}
        for variant in ("", "+ds")
    ]
    case = make(Values(4, "triton"), [(37, 131, 30), (50, 300, 4)], "triton")
    with tables.override(*entries):
        assert_equals_oracle(case, *case.gradients())


def test_penalty_rounds():
    """Regions of rows are whole tiles, cut so that programs run in rounds that are nearly full."""
    from fused_ewclora.backends.triton import ewc_penalty

    cases = (24, 768, 264), (48, 1024, 264), (64, 1280, 264), (1, 5, 264), (48, 1024, 2)
    for layers, width, slots in cases:
        fisher = torch.empty(width, width, device="meta")
        members = [ewc_penalty.Member(fisher, fisher, fisher, None, (0, 0, 0))] * layers
        height = ewc_penalty._height(width, ewc_penalty._rows(members, 16, 256, slots), 16)
        items = layers * -(-width // height) * -(-width // 256)
        rounds = -(-items // slots)
        assert height % 16 == 0
        assert items < slots or items > 0.8 * slots * rounds, f"{layers} of {width}: {items} items"


def test_penalty_mixed_dtypes():
    """Adapters are grouped by dtype, one launch each."""
    values = Values(4, "triton")
    case = make(values, [(33, 40, 3), (17, 72, 10), (20, 16, 4)], "triton")
    case.fishers[1] = case.fishers[1].bfloat16()
    assert_equals_oracle(case, *case.gradients())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("mode", "tokens"), [("sample", 37), ("sample", 1), ("batch", 37)])
def test_fisher_any_alignment(mode, tokens, dtype, offset):
    """Fisher accumulation reads tensors at any alignment."""
    values = Values(5, "triton")
    x, dy = values.normal(3, tokens, 72, dtype=dtype), values.normal(3, tokens, 40, dtype=dtype)
    x, dy = at_offset(x, offset), at_offset(dy, offset)
    fisher = at_offset(values.fisher(40, 72), offset)
    assert_accumulates(FisherCase(fisher, x, dy, per_sample(x, dy), mode, 0.5), "triton")


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,)])
def test_fisher_empty_batch(shape):
    """Without samples or tokens, no bit of the Fisher changes."""
    values = Values(6, "triton")
    fisher = values.fisher(17, 24)
    before = fisher.clone()
    for mode in ("sample", "batch"):
        FE.fisher_accumulate_(
            fisher, values.zeros(*shape, 24), values.zeros(*shape, 17), mode=mode, backend="triton"
        )
    assert torch.equal(fisher, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
def test_merge_any_alignment(dtype, offset):
    """Merging writes weights at any alignment."""
    values = Values(7, "triton")
    weight, a, b = values.normal(40, 72, dtype=dtype), values.normal(10, 72), values.normal(40, 10)
    weight, a, b = (at_offset(t, offset) for t in (weight, a, b))
    exact = oracles.merged(weight, a, b, 0.5)
    bound = sum_bound(oracles.merged(weight.abs(), a.abs(), b.abs(), 0.5), 10, torch.float32, "triton")
    FE.merge_(weight, a, b, 0.5, backend="triton")
    assert_within(weight, exact, bound + rounding_bound(exact.abs() + bound, dtype), "weight")
