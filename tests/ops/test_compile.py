# SPDX-License-Identifier: Apache-2.0
"""Under torch.compile: one graph, the same values, no recompilation for other values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from strategies import BACKENDS, Values, device_of
from structured_cases import implements
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map_only

import fused_ewclora as fe
from fused_ewclora import functional as FE
from fused_ewclora.ops import dispatch
from fused_ewclora.ops.schemas import SCHEMAS

OPS = torch.ops.fused_ewclora


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def parameters(seed: int = 0, rows: int = 6) -> list[Tensor]:
    """x, W, bias, A, B, s."""
    values = Values(seed)
    shapes = ((rows, 5), (7, 5), (7,), (3, 5), (7, 3), (3,))
    return [values.normal(*shape).requires_grad_() for shape in shapes]


def linear(x: Tensor, *rest: Tensor) -> Tensor:
    return FE.lora_linear(x, *rest)


def dropout(x: Tensor, *rest: Tensor) -> Tensor:
    return FE.lora_linear(x, *rest, dropout_p=0.5, training=True, seed=7)


def slices(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    return FE.lora_linear_slices(x, w, bias, [(4, 6, a, b[:2], s), (0, 3, 2 * a, b[2:5], 0.5)])


def penalty(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    fisher = torch.arange(35.0).reshape(7, 5)
    value = FE.ewc_penalty([fisher, fisher], [a, 2 * a], [b, 2 * b], [s, 0.5], 10.0)
    return value + x.sum() * w.sum() * bias.sum()


DIFFERENTIABLE = [linear, dropout, slices, penalty]


def with_gradients(function: Callable[..., Tensor], arguments: list[Tensor]) -> list[Tensor]:
    y = function(*arguments)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), arguments)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", DIFFERENTIABLE)
def test_one_graph_same_bits(function, dynamic):
    """Forward and backward compile to one graph and give the same bits."""
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (6, 9, 1) if dynamic else (6,):
        arguments = parameters(rows, rows)
        expected, got = with_gradients(function, arguments), with_gradients(compiled, arguments)
        for one, two in zip(expected, got, strict=True):
            torch.testing.assert_close(one, two, rtol=4e-7, atol=0.0)  # sums outside the op may be reordered


def fisher_step(fisher: Tensor, x: Tensor, dy: Tensor) -> Tensor:
    return FE.fisher_accumulate_(fisher, x, dy, weight=2.0, check_finite=False) * 1.0


def merge_step(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return FE.merge_(weight, a, b, 0.5) * 1.0


def threshold_step(scale: Tensor) -> Tensor:
    return FE.soft_threshold_(scale, 0.3) * 1.0


def penalty_grad_step(fisher: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return FE.ewc_penalty_grad_([fisher], [a], [b], None, 3.0)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (fisher_step, ((7, 5), (2, 3, 5), (2, 3, 7))),
        (merge_step, ((7, 5), (2, 5), (7, 2))),
        (threshold_step, ((9,),)),
        (penalty_grad_step, ((7, 5), (2, 5), (7, 2))),
    ],
)
def test_mutating_one_graph(function, shapes):
    """Mutating operations compile to one graph."""
    tensors = [Values(1).normal(*shape) for shape in shapes]
    first, second = [t.clone() for t in tensors], [t.clone() for t in tensors]
    value = function(*first)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*second), value)
    assert all(map(torch.equal, first, second))


def test_penalty_grad_compiled():
    """Gradients added in a compiled step are those of an eager step."""
    fisher, a, b = (Values(1).fisher(7, 5), Values(2).normal(2, 5), Values(3).normal(7, 2))
    results = []
    for compiled in (False, True):
        leaves = [t.clone().requires_grad_() for t in (a, b)]
        for leaf in leaves:
            leaf.grad = torch.ones_like(leaf)
        step = torch.compile(penalty_grad_step, backend="aot_eager") if compiled else penalty_grad_step
        step(fisher, *leaves)
        results.append([leaf.grad for leaf in leaves])
    assert all(map(torch.equal, *results))


def test_inductor_both_passes():
    """Inductor runs forward and backward."""
    arguments = parameters()
    compiled = torch.compile(linear, fullgraph=True)
    expected = with_gradients(linear, arguments)
    for one, two in zip(expected, with_gradients(compiled, arguments), strict=True):
        torch.testing.assert_close(one, two, rtol=4e-7, atol=0.0)


def test_no_recompilation():
    """New data, new seeds, new scale tensors: one compilation for all of them."""
    counter = CompileCounterWithBackend("aot_eager")

    def step(seed: Tensor, *tensors: Tensor) -> Tensor:
        y = FE.lora_linear(*tensors, dropout_p=0.5, training=True, seed=seed)
        return y.sum() + FE.ewc_penalty([tensors[1].detach()], [tensors[3]], [tensors[4]], [tensors[5]], 10.0)

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for seed in range(4):
        compiled(torch.tensor(seed), *parameters(seed)).backward()
    assert counter.frame_count == 1


def shared_factors(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    return FE.lora_linear_slices(x, w, bias, [(0, 3, a, b[:3], s), (4, 7, a, b[4:], s)])


def shared_penalty(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    fisher = torch.arange(35.0).reshape(7, 5)
    value = FE.ewc_penalty([fisher, fisher], [a, a], [b, b], [s, s], 10.0)
    return value + x.sum() * w.sum() * bias.sum()


@pytest.mark.parametrize("function", [shared_factors, shared_penalty])
def test_shared_tensor(function):
    """Adapters that share a tensor compile to one graph and add up their gradients."""
    arguments = parameters()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    expected, got = with_gradients(function, arguments), with_gradients(compiled, arguments)
    for one, two in zip(expected, got, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=0.0)  # two addends, in either order


@pytest.fixture
def first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no operation had asked for the backend in this process."""
    monkeypatch.setattr(dispatch, "_chosen", None)
    dispatch._of_environment.cache_clear()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_first_call_once(first_call, backend):
    """The first call of a process compiles once."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda *t: FE.lora_linear(*t, backend=backend), backend=counter, fullgraph=True)
    arguments = parameters()
    first = compiled(*arguments)
    torch.testing.assert_close(FE.lora_linear(*arguments, backend=backend), first)  # eager, between the two
    compiled(*arguments)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_named_backend(backend):
    """Forward and backward, and the penalty; as in eager calls."""

    def step(fisher: Tensor, *t: Tensor) -> Tensor:
        y = FE.lora_linear(*t, backend=backend)
        return y.square().sum() + FE.ewc_penalty([fisher], [t[3]], [t[4]], [t[5]], 2.0, backend=backend)

    arguments = [t.detach().to(device_of(backend)).requires_grad_() for t in parameters()]
    fisher = Values(5).fisher(7, 5).to(device_of(backend))
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    expected = torch.autograd.grad(step(fisher, *arguments), arguments)
    got = torch.autograd.grad(compiled(fisher, *arguments), arguments)
    for one, two in zip(expected, got, strict=True):
        torch.testing.assert_close(one, two, rtol=4e-7, atol=0.0)  # sums outside the op may be reordered


def test_missing_backend(monkeypatch):
    """A missing backend raises the same error in compiled calls."""
    missing = {**fe.available_backends(), "cuda": "there is no GPU"}
    monkeypatch.setattr(dispatch, "available_backends", lambda: missing)
    dispatch.choose.cache_clear()
    compiled = torch.compile(lambda *t: FE.lora_linear(*t, backend="cuda"), backend="eager", fullgraph=True)
    with pytest.raises(fe.BackendError, match="'cuda' is not available: there is no GPU"):
        compiled(*parameters())


@pytest.mark.parametrize(("p", "graphs"), [(0.0, 1), (0.5, 2)])
def test_train_eval_graph(p, graphs):
    """Training and evaluation share a graph unless there is dropout."""
    counter = CompileCounterWithBackend("eager")
    layer = fe.LoRALinear(5, 7, r=3, lora_dropout=p)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for mode in (True, False, True, False):
        layer.train(mode)
        compiled(torch.ones(2, 5))
    assert counter.frame_count == graphs


def test_changing_lambda():
    """A lambda that changes compiles without a graph break."""
    counter = CompileCounterWithBackend("eager")
    _, _, _, a, b, s = parameters()
    fisher, strength = Values(5).fisher(7, 5), [1.0]
    compiled = torch.compile(
        lambda: FE.ewc_penalty([fisher], [a], [b], [s], strength[0]), backend=counter, fullgraph=True
    )
    for graphs, strength[0] in enumerate((1.0, 3.0, 5.0), start=1):
        expected = FE.ewc_penalty([fisher], [a], [b], [s], strength[0])
        assert torch.equal(compiled(), expected)
        assert counter.frame_count <= graphs


def test_dropout_unseeded():
    """Dropout without a seed draws a new mask in every compiled call."""
    compiled = torch.compile(
        lambda *t: FE.lora_linear(*t, dropout_p=0.5, training=True), backend="aot_eager", fullgraph=True
    )
    arguments = parameters()
    torch.manual_seed(3)
    first, second = compiled(*arguments), compiled(*arguments)
    torch.manual_seed(3)
    assert torch.equal(compiled(*arguments), first)
    assert not torch.equal(first, second)


def op_calls() -> dict[str, list[tuple[Any, ...]]]:
    """Several argument lists for each op, with and without the optional ones."""
    x, w, bias, a, b, s = (t.detach() for t in parameters())
    dy, seed, fisher = Values(4).normal(6, 7), torch.tensor(3), Values(5).fisher(7, 5)
    one = ([a], [b], [s], [1.0], [0, 0, 7])
    two = ([a, a], [b[:2], b[:4]], [None, s[0].clone()], [0.5, 1.0], [1, 0, 2, 0, 3, 5, 1, 5, 7])
    z, z2 = torch.ones(6, 3), torch.ones(6, 6)
    everything, frozen_a = [True] * 6, [True, False, False, False, True, False]
    backward = [
        (dy, x, w, bias, z, *one, 0.0, None, everything),
        (dy, x, w, bias, z, *one, 0.5, seed, everything),
        (dy, None, w, None, z, *one, 0.0, None, frozen_a),
        (dy, x, w, None, z2, *two, 0.0, None, [True, False, False] + [True] * 4 + [False, True]),
    ]
    tokens, grads = Values(6).normal(3, 2, 5), Values(7).normal(3, 2, 7)
    offsets = torch.tensor([0, 1, 6])
    return {
        "lora_linear": [
            (x, w, bias, *one, 0.0, None),
            (x.view(2, 3, 5), w, None, *two, 0.0, None),
            (x, w, bias, *one, 0.5, seed),
            (x.bfloat16(), w.bfloat16(), None, *one, 0.0, None),
        ],
        "lora_linear_backward": backward,
        "ewc_penalty": [
            ([fisher], [a], [b], [s], [1.0], 3.0, [True, True, True]),
            ([fisher, fisher], [a, a], [b, b], [None, s], [0.5, 1.0], 3.0, [False, True, False]),
            ([fisher.bfloat16()], [a.bfloat16()], [b.bfloat16()], [None], [0.5], 3.0, [True, False, False]),
        ],
        "factored_penalty": [
            ([fisher.sum(1), fisher.sum(0)], [a], [b], [s], [1.0], 3.0, [True, True, True]),
            (
                [fisher.sum(1)] * 2 + [fisher.sum(0)] * 2,
                [a, a],
                [b, b],
                [None, s],
                [0.5, 1.0],
                3.0,
                [False, True, False],
            ),
        ],
        "kronecker_penalty": [
            ([fisher @ fisher.T, fisher.T @ fisher], [a], [b], [s], [1.0], 3.0, [True, True, True]),
        ],
        "l1_penalty": [
            ([], [a], [b], [s], [1.0], 3.0, [True, True, True]),
            ([], [a.bfloat16()] * 2, [b.bfloat16()] * 2, [None] * 2, [0.5, 1.0], 3.0, [False, True, False]),
        ],
        "fisher_accumulate_": [
            (fisher, tokens, grads, "sample", 1.0, None),
            (fisher, tokens, grads, "batch", 0.5, None),
            (fisher, x, dy, "sample", 1.0, offsets),
        ],
        "fisher_sums_": [
            (fisher.sum(1), fisher.sum(0), tokens, grads, "sample", 1.0, None),
            (fisher.sum(1), fisher.sum(0), tokens, grads, "batch", 0.5, None),
            (fisher.sum(1), fisher.sum(0), x, dy, "sample", 1.0, offsets),
        ],
        "merge_": [
            ([w.clone()], [a], [b], [None], [0.5]),
            ([w.clone(), w.bfloat16()], [a, a], [b, b], [s, None], [1.0, 2.0]),
        ],
        "soft_threshold_": [([s.clone()], 0.1), ([s.clone(), w.bfloat16()], 0.1)],
    }


def test_every_op_is_checked():
    assert op_calls().keys() == SCHEMAS.keys()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", SCHEMAS)
def test_registrations_are_sound(op, backend):
    """Schema (what is written, what aliases), shapes and dtypes of fakes, tracing with dynamic shapes."""
    if not implements(backend, op):
        pytest.skip("no implementation of its own")
    for arguments in op_calls()[op]:
        near = tree_map_only(Tensor, lambda t: t.to(device_of(backend)), arguments)
        torch.library.opcheck(getattr(OPS, op).default, (*near, backend))
