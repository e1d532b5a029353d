# SPDX-License-Identifier: Apache-2.0
"""Device memory that outlives a call: not from pools of CUDA graphs, held for them, safe between streams."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from typing import Any

import every_operation
import pytest
import torch
from penalty_cases import Case, assert_equals_oracle, make
from pools import private_pool
from strategies import Values
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import fused_ewclora as fe
from fused_ewclora import functional as FE
from fused_ewclora.backends import cuda
from fused_ewclora.backends.triton import ewc_penalty as host
from fused_ewclora.backends.triton import kept, lowrank
from fused_ewclora.ops import dispatch

WHY = fe.available_backends()
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py asks the GPU itself")
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(WHY[name] is not None, reason=f"{name}: {WHY[name]}"))
    for name in ("triton", "cuda")
]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
triton_only = pytest.mark.skipif(WHY["triton"] is not None, reason=f"triton: {WHY['triton']}")


class Pretended:
    """What the GPU is said to do: its current stream, and whether that is being captured."""

    def __init__(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self._backend, self._stream, self._capturing = backend, 0, False
        self.recorded: list[int] = []  # streams of which uses were recorded
        if backend == "triton":
            monkeypatch.setattr(kept, "stream", lambda device: self._stream)
            monkeypatch.setattr(kept, "capturing", lambda device: self._capturing)
            monkeypatch.setattr(kept, "used", lambda tensors: self.recorded.append(self._stream))

    def set(self, stream: int = 0, capturing: bool = False) -> None:
        self._stream, self._capturing = stream, capturing
        if self._backend == "cuda":
            cuda.extension().pretend(stream, capturing)

    def uses(self) -> int:
        return len(self.recorded) if self._backend == "triton" else int(cuda.extension().uses())


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Pretended]]:
    made: list[Pretended] = []

    def pretend(backend: str) -> Pretended:
        made.append(Pretended(backend, monkeypatch))
        return made[-1]

    fe.forget_tables()
    yield pretend
    for each in made:
        each.set()
    fe.forget_tables()


def small(backend: str, seed: int = 0) -> Case:
    case = make(Values(seed, backend), [(20, 24, 3), (17, 40, 5)], backend, ewc_lambda=3.0)
    case.scales = [0.5, 0.25]
    return case


def results(case: Case) -> list[Tensor]:
    value, grads = case.gradients()
    return [value.detach(), *grads]


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


# ---- private pools


def test_pool_notices_kept():
    """The model of a private pool notices memory that stays behind, and lets results pass."""
    stays: list[Tensor] = []
    with pytest.raises(AssertionError, match="not tracked"), private_pool([]):
        stays.append(torch.zeros(3))
    outputs: list[Tensor] = []
    with private_pool(outputs):
        outputs.append(torch.zeros(3) + torch.ones(3))


@each_backend
def test_pool_every_operation(backend):
    """No operation leaves anything in a private pool, whatever it keeps for later calls."""
    fe.forget_tables()
    outputs: list[Tensor] = []
    with private_pool(outputs):
        outputs += every_operation.results(backend).values()
    fe.forget_tables()


@each_backend
def test_pool_sliced_linear(backend):
    """Adapters of slices of the rows leave nothing in a private pool."""
    values = Values(1, backend)
    x, w, dy = values.normal(9, 24), values.normal(30, 24), values.normal(9, 30)
    a, b = values.normal(3, 24).requires_grad_(), values.normal(20, 3).requires_grad_()
    outputs: list[Tensor] = []
    fe.forget_tables()
    with private_pool(outputs):
        y = FE.lora_linear_adapters(x, w, None, [FE.Adapter(a, b, 0.5, ((0, 10), (20, 30)))], backend=backend)
        outputs += [y.detach(), *torch.autograd.grad(y, [a, b], dy)]
        del y
    fe.forget_tables()


@each_backend
def test_pool_streams_and_factors(backend, pretended):
    """What a new stream or new factors need is allocated outside of private pools, too."""
    gpu, case = pretended(backend), small(backend)
    results(case)
    for stream in (0, 64):
        gpu.set(stream)
        case.scales = [0.5 + stream, 0.125]
        outputs: list[Tensor] = []
        with private_pool(outputs):
            outputs += results(case)


# ---- factors


@each_backend
def test_factors_renewed(backend, pretended, monkeypatch):
    """Penalties follow factors that change, by the same table."""
    gpu, case = pretended(backend), small(backend)
    results(case)
    if backend == "triton":
        monkeypatch.setattr(host, "_prepare", lambda *args: pytest.fail("another table"))
    for stream, scales in ((0, [2.0, 0.25]), (64, [2.0, 2.0]), (0, [0.75, -1.5]), (64, [2.0, 2.0])):
        gpu.set(stream)
        case.scales = scales
        assert_equals_oracle(case, *case.gradients())


@each_backend
def test_factors_many(backend):
    """There may be more factors than one kernel takes arguments."""
    case = make(Values(3, backend), [(2, 3, 1)] * 130, backend)
    case.scales = [0.5 + i / 64 for i in range(130)]
    case.fishers[7] = case.fishers[7].bfloat16()
    assert_equals_oracle(case, *case.gradients())


@triton_only
@pytest.mark.parametrize("values", [[1.5] * 5, [1.0, -2.0, 0.1], [], [math.inf, 1.0], [2**62 + 1, -(2**40)]])
def test_numbers_written(values):
    """Numbers that travel as arguments arrive as they are, whatever was there."""
    dtype = torch.int64 if any(isinstance(value, int) for value in values) else torch.float32
    expected = torch.tensor(values, dtype=dtype)
    assert torch.equal(kept.by_value(expected, torch.device("cpu")), expected)
    to = torch.full((len(values),), 7, dtype=dtype)
    kept.write(to, expected.tolist())
    assert torch.equal(to, expected)


def test_inference_mode_first():
    """Memory that is kept since a call in inference mode serves calls outside of it."""
    for backend in [name for name in ("triton", "cuda") if WHY[name] is None]:
        fe.forget_tables()
        case = small(backend)
        with torch.inference_mode():
            case.run()
        case.scales = [0.125, 3.0]
        assert_equals_oracle(case, *case.gradients())


# ---- captured graphs


@each_backend
def test_captured_factors_own(backend, pretended):
    """A graph keeps the factors that it was captured with; the stream keeps its own."""
    gpu, case = pretended(backend), small(backend)
    before = results(case)
    gpu.set(capturing=True)
    case.scales = [2.0, 0.75]
    assert_equals_oracle(case, *case.gradients())
    gpu.set()
    case.scales = [0.5, 0.25]
    assert same_bits(results(case), before)


@each_backend
def test_captured_new_tensors(backend, pretended):
    """A capture needs no call before it: what a graph needs for itself is written by its own kernels."""
    gpu, case = pretended(backend), small(backend)
    gpu.set(capturing=True)
    outputs: list[Tensor] = []
    with private_pool(outputs):
        outputs += results(case)
    assert_equals_oracle(case, outputs[0], outputs[1:])


@triton_only
def test_captured_new_slices(pretended):
    """The rows of slices are numbered by the graph itself, if no call has done so before."""
    gpu, rows = pretended("triton"), (0, 2, 5, 1, 0, 4, 0, 7, 9)
    gpu.set(capturing=True)
    captured = lowrank._owner(rows, 2, 11, torch.device("cpu"))
    gpu.set()
    eager = lowrank._owner(rows, 2, 11, torch.device("cpu"))
    assert captured[1:] == eager[1:] == (0, 9)
    owner = torch.full((2, 11), -1, dtype=torch.int32)
    owner[0, 2:5], owner[0, 7:9], owner[1, 0:4] = torch.arange(3), torch.arange(3, 5), torch.arange(4)
    for found in (captured[0], eager[0]):
        assert found is not None and torch.equal(found, owner)


def tables() -> list[StorageWeakRef]:
    """The memory of the tables of the latest plan."""
    plan = host._plans._latest[1]
    assert plan is not None
    return [StorageWeakRef(t.untyped_storage()) for t in plan.tensors()]


def others(count: int) -> None:
    for seed in range(count):
        results(make(Values(seed, "triton"), [(4, 5 + seed, 2)], "triton"))


@triton_only
def test_captured_table_survives(pretended):
    """The table of a captured graph is alive after any number of other calls, until it is to be forgotten."""
    gpu, case = pretended("triton"), small("triton")
    results(case)
    plain = tables()
    other = small("triton", 1)
    results(other)
    captured = tables()
    gpu.set(capturing=True)
    results(other)
    gpu.set()
    others(host.KEPT + 4)
    gc.collect()
    assert len(host._plans) == host.KEPT
    assert all(where.expired() for where in plain)
    assert not any(where.expired() for where in captured)
    fe.forget_tables()
    gc.collect()
    assert all(where.expired() for where in captured)


@each_backend
def test_captured_then_evicted(backend, pretended):
    """Calls after the eviction of a captured plan compute what they computed before."""
    gpu, case = pretended(backend), small(backend)
    before = results(case)
    gpu.set(capturing=True)
    results(case)
    gpu.set()
    for seed in range(20):
        results(make(Values(seed, backend), [(4, 5 + seed, 2)], backend))
    assert same_bits(results(case), before)


# ---- streams


@each_backend
def test_streams_recorded(backend, pretended):
    """Each stream that reads a table is made known to the allocator, once."""
    gpu, case = pretended(backend), small(backend)
    results(case)
    first = gpu.uses()
    for stream in (64, 64, 128, 64):
        gpu.set(stream)
        results(case)
    assert (gpu.uses() - first) % 2 == 0 and gpu.uses() > first
    again = gpu.uses()
    for stream in (0, 64, 128):
        gpu.set(stream)
        results(case)
    assert gpu.uses() == again


@triton_only
def test_streams_share_nothing(pretended, monkeypatch):
    """Launches that may overlap on two streams share neither counters nor factors."""
    gpu, case, seen = pretended("triton"), small("triton"), []
    original = host.launch

    def noting(kernel: Any, grid: Any, table: Tensor, factors: Tensor, *rest: Any, **options: Any) -> None:
        seen.append((factors.data_ptr(), rest[2].data_ptr()))
        original(kernel, grid, table, factors, *rest, **options)

    monkeypatch.setattr(host, "launch", noting)
    for stream in (0, 64, 0, 64):
        gpu.set(stream)
        results(case)
    assert seen[0] == seen[2] and seen[1] == seen[3]
    assert not set(seen[0]) & set(seen[1])


def test_forgetting_public():
    """`forget_tables` reaches every backend and may be called before any of them has run."""
    dispatch.forget_tables()
    fe.forget_tables()
