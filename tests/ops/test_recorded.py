# SPDX-License-Identifier: Apache-2.0
"""Calls whose backward is C++: they give what the Functions in Python give, and behave as those do under
everything that looks at a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import BACKENDS, device_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_ewclora import functional as FE
from fused_ewclora.backends import native
from fused_ewclora.ops import dispatch
from fused_ewclora.ops.ewc_penalty import PenaltyFunction
from fused_ewclora.ops.lora_linear import LoRALinearFunction

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"cpu: {native.unavailable()}")
RECORDED = [name for name in BACKENDS if name in ("cpu", "cuda")]


@contextmanager
def in_python() -> Iterator[None]:
    """Without what the extension puts on the tape."""
    before = dispatch.annotate(lambda op, candidate: candidate._replace(linear=None))
    penalty, dispatch.recorded_penalty = dispatch.recorded_penalty, lambda: None
    terms, dispatch.penalty_terms = dispatch.penalty_terms, lambda: None
    try:
        yield
    finally:
        dispatch.annotate(before)
        dispatch.recorded_penalty, dispatch.penalty_terms = penalty, terms


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


class Linear:
    """Two adapters, on slices, one of them with a scale tensor."""

    def __init__(
        self,
        backend: str = "cpu",
        dtype: torch.dtype = torch.float32,
        dropout_p: float = 0.0,
        bias: bool = True,
    ) -> None:
        device = device_of(backend)

        def normal_there(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return normal(*shape, dtype=dtype).to(device).requires_grad_()

        self.backend, self.dropout_p = backend, dropout_p
        self.x, self.weight = normal_there(2, 5, 12, dtype=dtype), normal_there(9, 12, dtype=dtype)
        self.bias = normal_there(9, dtype=dtype) if bias else None
        self.factors = [normal_there(*shape) for shape in ((3, 12), (4, 3), (2, 12), (3, 2))]
        self.scale = normal_there(2)
        leaves = [self.x, self.weight, self.bias, *self.factors, self.scale]
        self.leaves = [leaf for leaf in leaves if leaf is not None]

    def run(self) -> Tensor:
        a0, b0, a1, b1 = self.factors
        slices = [(0, 4, a0, b0, 0.5), (5, 8, a1, b1, self.scale)]
        how = {"dropout_p": self.dropout_p, "training": True, "seed": 7, "backend": self.backend}
        return FE.lora_linear_slices(self.x, self.weight, self.bias, slices, **how)


class Penalty:
    def __init__(self) -> None:
        self.fishers = [torch.rand(4, 6), torch.rand(5, 3), torch.rand(4, 6)]
        self.a, self.b = (
            [normal(2, 6), normal(3, 3), normal(1, 6)],
            [normal(4, 2), normal(5, 3), normal(4, 1)],
        )
        self.scales = [normal(2), 0.5, torch.randn(())]
        self.leaves = [*self.a, *self.b, self.scales[0], self.scales[2]]
        for leaf in self.leaves:
            leaf.requires_grad_()

    def run(self) -> Tensor:
        return FE.ewc_penalty(self.fishers, self.a, self.b, self.scales, 3.0, backend="cpu")


class Norm(Penalty):
    def run(self) -> Tensor:
        return FE.l1_penalty(self.a, self.b, self.scales, 3.0, backend="cpu")


CASES = [Linear, Penalty, Norm]


def is_in_python(y: Tensor) -> bool:
    return isinstance(y.grad_fn, (LoRALinearFunction._backward_cls, PenaltyFunction._backward_cls))


@pytest.mark.parametrize("make", CASES)
def test_who_records(make):
    """Eager calls are recorded in C++ and observed ones in Python."""
    case = make()
    assert case.run().requires_grad and not is_in_python(case.run())
    with in_python():
        assert is_in_python(case.run())
    with torch.profiler.profile():
        assert is_in_python(case.run())
    with torch.no_grad():
        assert case.run().grad_fn is None
    for leaf in case.leaves:
        leaf.requires_grad_(False)
    assert case.run().grad_fn is None


@pytest.mark.parametrize("backend", RECORDED)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    dropout_p=st.sampled_from([0.0, 0.4]),
    bias=st.booleans(),
    wanted=st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_linear_gradients(backend, dtype, dropout_p, bias, wanted):
    """Any selection of gradients of a linear equals that of Python."""
    case = Linear(backend, dtype, dropout_p, bias)
    wanted = wanted[: len(case.leaves)]
    assume(any(wanted))
    same_gradients(case, wanted)


@pytest.mark.parametrize("make", [Penalty, Norm])
@given(wanted=st.lists(st.booleans(), min_size=8, max_size=8).filter(any))
def test_penalty_gradients(make, wanted):
    """Any selection of gradients of a penalty equals that of Python."""
    same_gradients(make(), wanted)


def same_gradients(case: Linear | Penalty, wanted: list[bool]) -> None:
    """Bit for bit: both call the same kernels. Asked for by requires_grad, and by naming some of all."""
    chosen = [leaf for leaf, want in zip(case.leaves, wanted, strict=True) if want]
    dy = torch.randn_like(case.run())

    def found() -> tuple[Tensor, list[Tensor]]:
        y = case.run()
        return y, [*torch.autograd.grad(y, chosen, dy)]

    named = found()
    for leaf, want in zip(case.leaves, wanted, strict=True):
        leaf.requires_grad_(want)
    required = found()
    with in_python():
        expected = found()
    for y, grads in (named, required):
        assert torch.equal(y, expected[0])
        for grad, other in zip(grads, expected[1], strict=True):
            assert grad.dtype == other.dtype and torch.equal(grad, other)


def saved_sizes(run: Callable[[], Tensor]) -> list[tuple[int, ...]]:
    sizes: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sorted(sizes)


@pytest.mark.parametrize("frozen", [(), ("adapters",), ("adapters", "weight"), ("weight", "bias")])
def test_saved_tensors(frozen):
    """Hooks on saved tensors (activation offloading) see all of it."""
    case = Linear()
    groups = {"adapters": [*case.factors, case.scale], "weight": [case.weight], "bias": [case.bias]}
    for name in frozen:
        for leaf in groups[name]:
            leaf.requires_grad_(False)
    sizes = saved_sizes(case.run)
    with in_python():
        assert sizes == saved_sizes(case.run)
    assert (tuple(case.x.shape) in sizes) == ("weight" not in frozen or "adapters" not in frozen)
    penalty = Penalty()
    gradients = (sum(leaf.numel() for leaf in penalty.leaves),)
    assert saved_sizes(penalty.run) == [(0,), gradients]  # an empty one owns references to the operands


@pytest.mark.parametrize("make", CASES)
def test_graph_used_once(make):
    """A graph is used once unless it is kept."""
    case = make()
    y = case.run().sum()
    first = torch.autograd.grad(y, case.leaves, retain_graph=True)
    again = torch.autograd.grad(y, case.leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, case.leaves)


def test_changed_operand():
    """An operand that changed in place is an error."""
    case = Linear()
    y = case.run().sum()
    with torch.no_grad():
        case.factors[0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_result_in_place():
    """`loss += ...` and activations in place."""
    linear, penalty = Linear(), Penalty()
    with in_python():
        expected = [
            torch.autograd.grad(linear.run().relu(), linear.leaves, torch.ones(2, 5, 9)),
            torch.autograd.grad(penalty.run() * 2.0 + 1.0, penalty.leaves),
        ]
    y, loss = linear.run(), penalty.run()
    torch.relu_(y)
    loss *= 2.0
    loss += 1.0
    found = [
        torch.autograd.grad(y, linear.leaves, torch.ones(2, 5, 9)),
        torch.autograd.grad(loss, penalty.leaves),
    ]
    for grads, others in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_calls(reentrant):
    """Checkpointed calls give the same gradients."""
    case = Linear(dropout_p=0.3)
    expected = torch.autograd.grad(case.run().sum(), case.leaves)
    hidden = case.x.clone()  # reentrant checkpoints want their input on the tape

    def block(x: Tensor) -> Tensor:
        case.x = x
        return case.run()

    leaf = case.leaves[0]
    y = checkpoint(block, hidden, use_reentrant=reentrant)
    y.sum().backward()
    for found, other in zip([leaf, *case.leaves[1:]], expected, strict=True):
        assert found.grad is not None and torch.equal(found.grad, other)


def test_autocast_outside():
    """Autocast does not reach the products inside."""
    case, losses = Linear(), []
    for how in (in_python, nullcontext):
        with how(), torch.autocast("cpu", dtype=torch.bfloat16):
            y = case.run()
            losses.append((y, *torch.autograd.grad(y.float().sum(), case.leaves)))
    for one, other in zip(*losses, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    y = case.run()
    expected = torch.autograd.grad(y.sum(), case.leaves, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # of the backward alone
        found = torch.autograd.grad(y.sum(), case.leaves)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the penalty stays in fp32, its backward too
        loss = Penalty().run()
        assert loss.dtype == torch.float32
        loss.backward()


def test_penalty_no_gradients():
    """An evaluation that logs the penalty does not pay for its gradients."""
    case, seen = Penalty(), []

    def noting(op: str, candidate: dispatch.Candidate) -> dispatch.Candidate:
        def run(*args: object) -> object:
            seen.append(args[-1])
            return candidate.run(*args)

        return candidate._replace(run=run)

    before = dispatch.annotate(noting)
    try:
        with torch.no_grad():
            case.run()
        case.run()
    finally:
        dispatch.annotate(before)
    assert seen == [[False] * 3, [True] * 3]


@pytest.mark.parametrize("make", CASES)
def test_compiled_autograd(make):
    """Compiled autograd runs recorded calls unchanged."""
    case = make()
    expected = torch.autograd.grad(case.run().sum(), case.leaves)
    loss = case.run().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    for leaf, grad in zip(case.leaves, expected, strict=True):
        assert leaf.grad is not None and torch.equal(leaf.grad, grad)
