# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: graphs, streams, no waiting for the device, offsets past 2^31, compiled steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import oracles
import pytest
import torch
from strategies import LINEAR_BACKENDS, Values, family, refused_linear
from tolerance import EPS, assert_within, relative_error, rounding_bound, sum_bound
from torch import Tensor

import fused_ewclora as fe
from fused_ewclora import functional as FE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
WHY = {name: fe.available_backends()[name] for name in ("triton", "cuda")}
ALGORITHMS = [name for name in LINEAR_BACKENDS if WHY.get(family(name), "") is None]
each_algorithm = pytest.mark.parametrize("backend", ALGORITHMS)
each_backend = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.skipif(why is not None, reason=f"{name}: {why}"))
        for name, why in WHY.items()
    ],
)
GIB = 2**30
Step = Callable[[], Sequence[Tensor]]


def needs_memory(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < gib:
        pytest.skip(f"{free:.0f} GiB of GPU memory are free, {gib:.0f} are needed")


class Linear:
    """Inputs that stay in place, and a step that computes y and the gradients of all but the base weight."""

    def __init__(self, backend: str, dtype: torch.dtype, dropout: bool = False) -> None:
        values = Values(0, backend)
        self.x = values.normal(197, 384, dtype=dtype).requires_grad_()
        self.dy, self.weight = values.normal(197, 320, dtype=dtype), values.normal(320, 384, dtype=dtype)
        self.factors = [
            values.normal(*s, std=0.1).requires_grad_()
            for s in ((10, 384), (160, 10), (10,), (4, 384), (128, 4))
        ]
        a, b, s, a2, b2 = self.factors
        self.adapters = [FE.Adapter(a, b, s, ((160, 320),)), FE.Adapter(a2, b2, 0.5, ((0, 128),))]
        self.options: dict[str, Any] = {"backend": backend}
        if dropout:
            seed = torch.tensor(7, device="cuda")
            self.options |= {"dropout_p": 0.3, "training": True, "seed": seed}

    def renew(self) -> None:
        """Other values in the same places."""
        with torch.no_grad():
            for tensor in (self.x, self.dy, *self.factors):
                tensor.copy_(torch.randn_like(tensor) * tensor.std())

    def __call__(self) -> list[Tensor]:
        y = FE.lora_linear_adapters(self.x, self.weight, None, self.adapters, **self.options)
        return [y.detach(), *torch.autograd.grad(y, [self.x, *self.factors], self.dy)]


class Others:
    """The other operations on tensors that stay in place; what they write is set anew in every step."""

    def __init__(self, backend: str) -> None:
        values = Values(1, backend)
        self.backend = backend
        shapes = [(256, 192, 10), (128, 320, 16), (97, 131, 4)] * 4
        self.fishers = [values.fisher(m, n) for m, n, _ in shapes]
        self.lora_as = [values.normal(r, n, std=0.1).requires_grad_() for _, n, r in shapes]
        self.lora_bs = [values.normal(m, r, std=0.1).requires_grad_() for m, _, r in shapes]
        self.x, self.dy = values.normal(5, 197, 192), values.normal(5, 197, 256)
        self.fisher, self.weight = values.zeros(256, 192), values.normal(256, 192, dtype=torch.bfloat16)
        self.before, self.scale = self.weight.clone(), values.normal(300)
        self.scale_before = self.scale.clone()
        for leaf in self.leaves():
            leaf.grad = torch.zeros_like(leaf)

    def leaves(self) -> list[Tensor]:
        return [*self.lora_as, *self.lora_bs]

    def renew(self) -> None:
        with torch.no_grad():
            for tensor in (*self.leaves(), self.x, self.dy, self.before, self.scale_before):
                tensor.copy_(torch.randn_like(tensor) * 0.1)

    def penalty(self) -> list[Tensor]:
        value = FE.ewc_penalty(self.fishers, self.lora_as, self.lora_bs, None, 1e4, backend=self.backend)
        return [value.detach(), *torch.autograd.grad(value, self.leaves())]

    def penalty_grad(self) -> list[Tensor]:
        grads = [leaf.grad for leaf in self.leaves()]
        torch._foreach_zero_(grads)
        value = FE.ewc_penalty_grad_(
            self.fishers, self.lora_as, self.lora_bs, None, 1e4, backend=self.backend
        )
        return [value, *grads]

    def fisher_of(self, mode: str, tokens: slice = slice(None)) -> list[Tensor]:
        self.fisher.zero_()
        x, dy = self.x[:, tokens], self.dy[:, tokens]
        return [
            FE.fisher_accumulate_(self.fisher, x, dy, mode=mode, check_finite=False, backend=self.backend),
        ]

    def fisher_sample(self) -> list[Tensor]:
        return self.fisher_of("sample")

    def fisher_batch(self) -> list[Tensor]:
        return self.fisher_of("batch")

    def fisher_token(self) -> list[Tensor]:
        return self.fisher_of("sample", slice(0, 1))

    def merge(self) -> list[Tensor]:
        self.weight.copy_(self.before)
        a, b = self.lora_as[0].detach(), self.lora_bs[0].detach()
        return [FE.merge_(self.weight, a, b, 0.5, backend=self.backend)]

    def threshold(self) -> list[Tensor]:
        self.scale.copy_(self.scale_before)
        return [FE.soft_threshold_(self.scale, 0.05, backend=self.backend)]


OTHERS = ("penalty", "penalty_grad", "fisher_sample", "fisher_batch", "fisher_token", "merge", "threshold")


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


def captured(step: Step) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor]]:
    """A graph of `step` and the places of its results; kernels are compiled before the capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor], exact: bool) -> None:
    """The same bits; or up to roundings of BLAS, which may choose otherwise inside a graph or on a stream."""
    for got, other in zip(found, expected, strict=True):
        if exact:
            assert torch.equal(got, other)
        else:
            assert relative_error(got, oracles.exact(other)) <= 4 * EPS[other.dtype]


def without_blas(backend: str, name: str = "linear") -> bool:
    if name == "linear":
        return backend in ("triton:full", "triton:prologue")
    return not (backend == "cuda" and name == "fisher_batch")


def assert_replays(work: Any, step: Step, exact: bool) -> None:
    """Replays on new values give what the eager step gives."""
    graph, results = captured(step)
    for _ in range(2):
        work.renew()
        graph.replay()
        replayed = copies(results)
        assert_same(replayed, step(), exact)


@each_algorithm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_graph_forward_backward(backend, dtype):
    """A graph of forward and backward replays on new values."""
    step = Linear(backend, dtype)
    assert_replays(step, step, without_blas(backend))


@each_backend
def test_graph_dropout_seed(backend):
    """A graph with dropout reads its seed when it replays."""
    step = Linear(backend, torch.bfloat16, dropout=True)
    graph, results = captured(step)
    graph.replay()
    first = results[0].clone()
    step.options["seed"].fill_(8)
    graph.replay()
    assert not torch.equal(results[0], first)
    assert relative_error(results[0], oracles.exact(step()[0])) <= 4 * EPS[torch.bfloat16]


@each_backend
@pytest.mark.parametrize("name", OTHERS)
def test_graph_other_operations(backend, name):
    """A graph of any other operation replays on new values."""
    work = Others(backend)
    assert_replays(work, getattr(work, name), without_blas(backend, name))


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def penalty_of(work: Others, factor: float) -> list[Tensor]:
    """Penalty and gradients with a number as the scale."""
    scales = [factor + i / 16 for i in range(len(work.fishers))]
    value = FE.ewc_penalty(work.fishers, work.lora_as, work.lora_bs, scales, 1e4, backend=work.backend)
    return [value.detach(), *torch.autograd.grad(value, work.leaves())]


@each_backend
@pytest.mark.parametrize("warm", [True, False])
def test_graph_outlives_tables(backend, warm):
    """A graph replays its own table and factors after 20 other tables and other factors of the same one."""
    fe.forget_tables()
    work = Others(backend)
    penalty_of(work, 0.25)  # compiles
    if not warm:
        fe.forget_tables()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = penalty_of(work, 0.5)
    rest = []
    for i in range(20):
        penalty_of(work, 0.5 + 0.01 * i)
        other = Others(backend)
        other.fishers, other.lora_as, other.lora_bs = (
            tensors[: 1 + i % 12] for tensors in (other.fishers, other.lora_as, other.lora_bs)
        )
        penalty_of(other, 0.5)
        rest.append(torch.randint(-(2**62), 2**62, (2048 + 512 * i,), device="cuda"))  # over what was freed
    for _ in range(2):
        work.renew()
        graph.replay()
        replayed = copies(results)
        assert_same(replayed, penalty_of(work, 0.5), exact=True)


@each_backend
def test_streams_with_factors(backend):
    """Two streams use one table with different factors at the same time, and a third sees it evicted."""
    fe.forget_tables()
    work = Others(backend)
    expected = {factor: copies(penalty_of(work, factor)) for factor in (0.5, 2.0)}
    streams = {factor: torch.cuda.Stream() for factor in expected}
    torch.cuda.synchronize()
    found: dict[float, list[list[Tensor]]] = {factor: [] for factor in expected}
    for _ in range(10):
        for factor, stream in streams.items():
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1_000_000)
                found[factor].append(penalty_of(work, factor))
    for i in range(20):  # the table is let go while the streams still have to read it
        other = Others(backend)
        penalty_of(other, 1.0 + i)
    torch.cuda.synchronize()
    for factor, rounds in found.items():
        for each in rounds:
            assert_same(each, expected[factor], exact=True)


@each_backend
def test_changing_factors_no_sync(backend):
    """Factors that change from step to step make nobody wait for the device."""
    work = Others(backend)
    penalty_of(work, 0.25)
    with no_waiting():
        for i in range(20):
            penalty_of(work, 0.5 + 0.01 * i)


@each_backend
def test_graph_whole_step(backend):
    """A graph of a step of EWC-LoRA (linear, penalty, backward, update) does what eager steps do."""

    def made() -> Callable[[], Tensor]:
        linear, others = Linear(backend, torch.float32), Others(backend)
        leaves = [*linear.factors, *others.leaves()]
        for leaf in leaves:
            leaf.grad = torch.zeros_like(leaf)

        def step() -> Tensor:
            for leaf in leaves:
                leaf.grad.zero_()
            y = FE.lora_linear_adapters(linear.x, linear.weight, None, linear.adapters, backend=backend)
            penalty = FE.ewc_penalty(
                others.fishers, others.lora_as, others.lora_bs, None, 10.0, backend=backend
            )
            loss = (y * linear.dy).sum() * 1e-3 + penalty
            for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                leaf.grad.add_(grad)
            with torch.no_grad():
                for leaf in leaves:
                    leaf.sub_(leaf.grad, alpha=1e-4)
            return loss.detach()

        return step

    step, eager_step = made(), made()
    graph, losses = captured(lambda: [step()])  # three steps of warm-up; the capture itself computes nothing
    for _ in range(3):
        eager_step()
    for _ in range(3):
        graph.replay()
        assert_same(losses, [eager_step()], exact=False)


@each_backend
def test_compiled_reduce_overhead(backend):
    """A step compiled with CUDA graphs trains as it does eagerly, and nothing stays in their pool."""
    fe.forget_tables()
    linear, others = Linear(backend, torch.float32), Others(backend)
    leaves = [*linear.factors, *others.leaves()]
    fixed = [*leaves, *others.fishers, linear.weight, linear.dy]
    for tensor in fixed:
        torch._dynamo.mark_static_address(tensor)

    def loss(x: Tensor, factor: float) -> Tensor:
        y = FE.lora_linear_adapters(x, linear.weight, None, linear.adapters, backend=backend)
        scales = [factor] * len(others.fishers)
        penalty = FE.ewc_penalty(
            others.fishers, others.lora_as, others.lora_bs, scales, 10.0, backend=backend
        )
        return (y * linear.dy).sum() * 1e-3 + penalty

    compiled = torch.compile(loss, mode="reduce-overhead", fullgraph=True)
    for factor in (0.5, 0.5, 0.5, 0.5, 2.0, 2.0, 2.0, 2.0, 0.5):  # warms up, records, replays
        expected = torch.autograd.grad(loss(linear.x, factor), leaves)
        torch.compiler.cudagraph_mark_step_begin()
        value = compiled(linear.x, factor)
        for got, eager in zip(torch.autograd.grad(value, leaves), expected, strict=True):
            assert relative_error(got, oracles.exact(eager)) <= 4 * EPS[torch.float32]
        linear.renew()
        others.renew()


def test_sync_detected():
    """The guard against waiting for the device notices such a wait."""
    ones = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        ones.sum().item()


@each_algorithm
@pytest.mark.parametrize("dropout", [False, True])
def test_linear_no_sync(backend, dropout):
    """Forward and backward never wait for the device."""
    if dropout and (reason := refused_linear(backend, 14, dropout=True)) is not None:
        pytest.skip(reason)
    step = Linear(backend, torch.bfloat16, dropout)
    step()
    with no_waiting():
        step()


@each_backend
@pytest.mark.parametrize("name", OTHERS)
def test_other_operations_no_sync(backend, name):
    """No other operation waits for the device."""
    work = Others(backend)
    step = getattr(work, name)
    step()
    with no_waiting():
        step()


@each_algorithm
def test_linear_deterministic(backend):
    """LoRA linears repeat bit for bit."""
    step = Linear(backend, torch.bfloat16)
    first = copies(step())
    for _ in range(20):
        assert all(map(torch.equal, step(), first))


@each_backend
@pytest.mark.parametrize("name", OTHERS)
def test_other_operations_deterministic(backend, name):
    """The other operations repeat bit for bit."""
    work = Others(backend)
    step = getattr(work, name)
    first = copies(step())
    for _ in range(20):
        assert all(map(torch.equal, step(), first))


@each_backend
@pytest.mark.parametrize("name", ["linear", *OTHERS])
def test_current_stream(backend, name):
    """Inputs appear late on that stream alone: kernels on another one would read the old values."""
    work: Any = Linear(backend, torch.bfloat16) if name == "linear" else Others(backend)
    step = work if name == "linear" else getattr(work, name)
    step()
    inputs = [work.x, work.dy, *(work.factors if name == "linear" else [*work.leaves(), work.before])]
    fresh = [torch.randn_like(t) * 0.1 for t in inputs]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(200_000_000)
        for tensor, value in zip(inputs, fresh, strict=True):
            tensor.copy_(value)
        with torch.enable_grad():
            late = copies(step())
    torch.cuda.synchronize()
    assert_same(late, step(), exact=backend == "triton" or (name != "linear" and without_blas(backend, name)))


@each_backend
@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_int64_fisher(backend, mode):
    """A Fisher may have more than 2^31 elements."""
    needs_memory(24)
    d, last = 46_400, slice(-7, None)
    fisher = torch.zeros(d, d, dtype=torch.bfloat16, device="cuda")
    assert fisher.numel() > 2**31
    x, dy = (torch.randn(1, 2, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    FE.fisher_accumulate_(fisher, x, dy, mode=mode, backend=backend)
    for rows in (slice(0, 7), slice(46_280, 46_300), last):  # 2^31 / d = 46283
        g = oracles.exact(dy[0, :, rows]).T @ oracles.exact(x[0])
        e = sum_bound(
            oracles.magnitude(dy[0, :, rows]).T @ oracles.magnitude(x[0]), 2, torch.bfloat16, backend
        )
        bound = 2 * g.abs() * e + e.square() + rounding_bound(g.square(), torch.bfloat16)
        assert_within(fisher[rows], g.square(), bound + 2 * EPS[torch.float32] * g.square(), "fisher")


@each_backend
def test_int64_merge(backend):
    """Weights of more than 2^31 elements are merged."""
    needs_memory(16)
    d = 46_400
    weight = torch.zeros(d, d, dtype=torch.bfloat16, device="cuda")
    a, b = torch.randn(4, d, device="cuda"), torch.randn(d, 4, device="cuda")
    FE.merge_(weight, a, b, 0.5, backend=backend)
    for rows in (slice(0, 7), slice(46_280, 46_300), slice(-7, None)):
        exact = 0.5 * oracles.exact(b[rows]) @ oracles.exact(a)
        wide = 0.5 * oracles.magnitude(b[rows]) @ oracles.magnitude(a)
        bound = sum_bound(wide, 4, torch.float32, backend)
        assert_within(
            weight[rows], exact, bound + rounding_bound(exact.abs() + bound, torch.bfloat16), "weight"
        )


@each_backend
def test_int64_penalty(backend):
    """With F = 1 the penalty is half of sum (B^T B) * (A A^T)."""
    needs_memory(16)
    d = 46_400
    fisher = torch.ones(d, d, dtype=torch.bfloat16, device="cuda")
    a = torch.randn(4, d, device="cuda").requires_grad_()
    b = torch.randn(d, 4, device="cuda").requires_grad_()
    value = FE.ewc_penalty([fisher], [a], [b], backend=backend)
    da, db = torch.autograd.grad(value, [a, b])
    a64, b64 = oracles.exact(a), oracles.exact(b)
    exact = 0.5 * ((b64.T @ b64) * (a64 @ a64.T)).sum()
    assert abs(float(value) / float(exact) - 1.0) <= 1e-5
    assert relative_error(da, b64.T @ b64 @ a64) <= 1e-5
    assert relative_error(db, b64 @ (a64 @ a64.T)) <= 1e-5


@each_algorithm
def test_int64_linear_input(backend):
    """Inputs may have more than 2^31 elements."""
    needs_memory(24)
    rows, d_in, d_out = 2**21 + 5, 1024, 64
    x = torch.zeros(rows, d_in, device="cuda", dtype=torch.bfloat16)
    x[-3:].normal_(), x[:3].normal_()
    weight = torch.randn(d_out, d_in, device="cuda", dtype=torch.bfloat16) * d_in**-0.5
    a, b = torch.randn(4, d_in, device="cuda") * d_in**-0.5, torch.randn(d_out, 4, device="cuda")
    b.requires_grad_(), a.requires_grad_()
    y = FE.lora_linear(x, weight, None, a, b, backend=backend)
    da, db = torch.autograd.grad(y, [a, b], torch.ones_like(y))
    few = torch.cat([x[:3], x[-3:]])
    y2 = FE.lora_linear(few, weight, None, a, b, backend=backend)
    da2, db2 = torch.autograd.grad(y2, [a, b], torch.ones_like(y2))
    assert relative_error(torch.cat([y[:3], y[-3:]]), oracles.exact(y2)) <= 4 * EPS[torch.bfloat16]
    for got, expected in ((da, da2), (db, db2)):  # rows of zeros add nothing
        assert relative_error(got, oracles.exact(expected)) <= 4 * EPS[torch.bfloat16]


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compile_matches_eager(backend, dtype):
    """A compiled training step is one graph and gives the eager gradients."""
    linear, others = Linear(backend, dtype), Others(backend)
    leaves = [*linear.factors, *others.leaves()]

    def loss(x: Tensor) -> Tensor:
        y = FE.lora_linear_adapters(x, linear.weight, None, linear.adapters, backend=backend)
        penalty = FE.ewc_penalty(others.fishers, others.lora_as, others.lora_bs, None, 10.0, backend=backend)
        return (y.float() * linear.dy.float()).sum() + penalty

    expected = torch.autograd.grad(loss(linear.x), leaves)
    compiled = torch.compile(loss, fullgraph=True)
    value = compiled(linear.x)
    for got, eager in zip(torch.autograd.grad(value, leaves), expected, strict=True):
        assert relative_error(got, oracles.exact(eager)) <= 4 * EPS[torch.float32]


@each_backend
def test_autocast_dtype(backend):
    """Autocast takes the kernels of its dtype."""
    step = Linear(backend, torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = FE.lora_linear_adapters(step.x, step.weight, None, step.adapters, backend=backend)
    x, weight = step.x.bfloat16(), step.weight.bfloat16()
    expected = FE.lora_linear_adapters(x, weight, None, step.adapters, backend=backend)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)


@each_backend
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_matmul_precision_error(backend, precision):
    """tf32 rounds each factor to 2^-11 of itself, bf16 to 2^-8; two products, and sums of random sign."""
    before = torch.get_float32_matmul_precision()
    work = Others(backend)
    exact = [oracles.exact(t) for t in work.penalty()]
    try:
        torch.set_float32_matmul_precision(precision)
        rounded = work.penalty()
    finally:
        torch.set_float32_matmul_precision(before)
    limit = 4 * (2.0**-11 if precision == "high" else 2.0**-8)
    for got, truth in zip(rounded, exact, strict=True):
        assert relative_error(got, truth) <= limit
