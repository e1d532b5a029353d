# SPDX-License-Identifier: Apache-2.0
"""Derivatives of any order, by autograd, `torch.func` and forward-mode differentiation, are those of a dense
fp64 model, on every backend."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from strategies import BACKENDS, DROPOUT_BACKENDS, LINEAR_BACKENDS, Values, property_test
from torch import Tensor, nn
from torch.autograd import forward_ad, functional
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import fused_ewclora as fe
from fused_ewclora import functional as FE
from fused_ewclora.ops.capture import FisherCapture
from fused_ewclora.reference.philox import keep_mask

ROWS = (((0, 2), (4, 6)), ((2, 3),))  # of each adapter; row 3 and the last one have none
NAMES = ("x", "weight", "bias", "a0", "b0", "a1", "b1", "scale")
SEED = 7


class Linear:
    """Two adapters on row ranges, one of them with a scale tensor."""

    def __init__(self, backend: str, dtype: torch.dtype = torch.float32, dropout_p: float = 0.0) -> None:
        values, self.backend, self.dropout_p = Values(3, backend), backend, dropout_p
        shapes = ((2, 3, 5), (7, 5), (7,), (2, 5), (4, 2), (3, 5), (1, 3), (3,))
        self.leaves = [values.normal(*shape, dtype=dtype, std=0.5).requires_grad_() for shape in shapes]
        self.dy = values.normal(2, 3, 7, dtype=torch.float64)

    def run(self, *tensors: Tensor) -> Tensor:
        x, weight, bias, a0, b0, a1, b1, scale = tensors
        adapters = [FE.Adapter(a0, b0, 0.5, ROWS[0]), FE.Adapter(a1, b1, scale, ROWS[1])]
        how: dict[str, Any] = {"dropout_p": self.dropout_p, "training": True, "seed": SEED}
        return FE.lora_linear_adapters(x, weight, bias, adapters, backend=self.backend, **how)

    def dense(self, *tensors: Tensor) -> Tensor:
        x, weight, bias, a0, b0, a1, b1, scale = tensors
        keep = keep_mask(torch.tensor(SEED, device=x.device), x[..., 0].numel(), x.shape[-1], self.dropout_p)
        branch = x * keep.view(x.shape) / (1 - self.dropout_p)
        y = x @ weight.T + bias
        for a, b, s, ranges in ((a0, b0, 0.5, ROWS[0]), (a1, b1, scale, ROWS[1])):
            rows = torch.cat([torch.arange(*one, device=x.device) for one in ranges])
            y = y.index_add(-1, rows, branch @ (b * s @ a).T)
        return y

    def loss(self, y: Tensor) -> Tensor:
        return (y.tanh() * self.dy.to(y.dtype)).sum()


class Penalty:
    """Three adapters, two of them with a scale tensor."""

    def __init__(self, backend: str, dtype: torch.dtype = torch.float32) -> None:
        values, self.backend = Values(5, backend), backend
        sizes = ((4, 5, 2), (3, 6, 1), (5, 4, 3))
        self.fishers = [values.fisher(d_out, d_in) for d_out, d_in, _ in sizes]
        shapes = [(r, d_in) for _, d_in, r in sizes] + [(d_out, r) for d_out, _, r in sizes] + [(2,), ()]
        self.leaves = [values.normal(*shape, dtype=dtype, std=0.5).requires_grad_() for shape in shapes]

    def run(self, *tensors: Tensor) -> Tensor:
        scales = [tensors[6], 0.5, tensors[7]]
        return FE.ewc_penalty(self.fishers, tensors[:3], tensors[3:6], scales, 3.0, backend=self.backend)

    def dense(self, *tensors: Tensor) -> Tensor:
        scales = [tensors[6], 0.5, tensors[7]]
        together = zip(self.fishers, tensors[:3], tensors[3:6], scales, strict=True)
        return sum(1.5 * (f.double() * (b * s @ a).square()).sum() for f, a, b, s in together)  # type: ignore[return-value]

    def loss(self, y: Tensor) -> Tensor:
        return y * (0.3 * y).sin()  # whose gradient is no constant


Case = Linear | Penalty


def exact(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    pairs = zip(tensors, like, strict=True)
    return [t.detach().double().requires_grad_(other.requires_grad) for t, other in pairs]


def ordered(run: Callable[..., Tensor], leaves: Sequence[Tensor], order: int) -> list[Tensor]:
    """Gradients of the sum of the gradients of ... of a loss, `order` times, given its inputs."""
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    value = run(*leaves)
    for left in reversed(range(order)):
        grads = torch.autograd.grad(value, wanted, create_graph=left > 0, allow_unused=True)
        grads = tuple(torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True))
        value = torch.stack([(g * g.detach().cos()).sum() for g in grads]).sum()
    return list(grads)


def agree(found: Sequence[Tensor], expected: Sequence[Tensor], accuracy: float = 1e-4) -> None:
    """Relative to the largest element: sums of a few hundred products in fp32, three deep, in rounded order;
    a part that is missing is off by far more."""
    largest = max(float(e.abs().max()) for e in expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert float((one.detach().double() - other).abs().max()) <= accuracy * largest


def compared(case: Case, order: int, accuracy: float = 1e-4) -> None:
    leaves = case.leaves
    found = ordered(lambda *given: case.loss(case.run(*given)), leaves, order)
    expected = ordered(lambda *given: case.loss(case.dense(*given)), exact(leaves, leaves), order)
    assert all(one.dtype == leaf.dtype for one, leaf in zip(found, wanted(case), strict=True))
    agree(found, expected, accuracy)


def wanted(case: Case) -> list[Tensor]:
    return [leaf for leaf in case.leaves if leaf.requires_grad]


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
@property_test(
    examples=5,
    trained=st.lists(st.booleans(), min_size=8, max_size=8).filter(any),
    dropped=st.booleans(),
    order=st.sampled_from([2, 3]),
)
def test_linear_orders(backend, trained, dropped, order):
    """Second and third derivatives, whatever is frozen."""
    case = Linear(backend, dropout_p=0.4 if dropped and backend in DROPOUT_BACKENDS else 0.0)
    for leaf, train in zip(case.leaves, trained, strict=True):
        leaf.requires_grad_(train)
    compared(case, order, accuracy=1e-3 if order == 3 else 1e-4)


@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
@pytest.mark.parametrize("order", [2, 3])
def test_frozen_a(backend, order):
    """A layer that does not keep x is connected to it by z."""
    case = Linear(backend, dropout_p=0.4 if backend in DROPOUT_BACKENDS else 0.0)
    for name in ("weight", "a0", "a1"):
        case.leaves[NAMES.index(name)].requires_grad_(False)
    compared(case, order, accuracy=1e-3 if order == 3 else 1e-4)
    x = case.leaves[0]
    through_z = [torch.autograd.grad(g.sum(), x, retain_graph=True)[0] for g in first(case, ("b0", "scale"))]
    dense = [torch.autograd.grad(g.sum(), x64)[0] for g, x64 in first_dense(case, ("b0", "scale"))]
    agree(through_z, dense)


def first(case: Linear, names: Sequence[str]) -> list[Tensor]:
    y = case.run(*case.leaves)
    leaves = [case.leaves[NAMES.index(name)] for name in names]
    return list(torch.autograd.grad(y, leaves, case.dy.to(y.dtype), create_graph=True))


def first_dense(case: Linear, names: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    found = []
    for name in names:
        leaves = exact(case.leaves, case.leaves)
        y = case.dense(*leaves)
        (g,) = torch.autograd.grad(y, leaves[NAMES.index(name)], case.dy, create_graph=True)
        found.append((g, leaves[0]))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [2, 3])
def test_penalty_orders(backend, order):
    """Second and third derivatives, also with respect to what the penalty is multiplied by."""
    case = Penalty(backend)
    compared(case, order, accuracy=1e-3 if order == 3 else 1e-4)
    for leaf in case.leaves[1:4]:
        leaf.requires_grad_(False)
    compared(case, order, accuracy=1e-3 if order == 3 else 1e-4)


@pytest.mark.parametrize("make", [Linear, Penalty])
def test_gradgradcheck(make):
    """Forward and reverse, batched, against finite differences in fp64."""
    case = make("reference", torch.float64)
    how = {"fast_mode": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(case.run, case.leaves, check_forward_ad=True, **how)
    assert torch.autograd.gradgradcheck(case.run, case.leaves, check_fwd_over_rev=True, **how)


@pytest.mark.parametrize("make", [Linear, Penalty])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_inputs(make, backend):
    """`.backward(inputs=...)` through gradients, a gradient penalty."""
    case = make(backend)

    def penalised(run: Callable[..., Tensor], leaves: Sequence[Tensor]) -> Tensor:
        loss = case.loss(run(*leaves))
        (g,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
        return loss + g.square().sum()

    penalised(case.run, case.leaves).backward(inputs=case.leaves)
    doubles = exact(case.leaves, case.leaves)
    penalised(case.dense, doubles).backward(inputs=doubles)
    agree([leaf.grad for leaf in case.leaves], [leaf.grad for leaf in doubles])


@pytest.mark.parametrize("make", [Linear, Penalty])
@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_module(make, backend):
    """hvp, vhp and hessian of torch.autograd.functional."""
    case = make(backend)
    chosen = [leaf.detach() for leaf in case.leaves[-5:]]  # of each of these a small Hessian

    def loss(run: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
        rest = [leaf.detach().to(dtype) for leaf in case.leaves[:-5]]
        return lambda *last: case.loss(run(*rest, *last))

    ours, dense = loss(case.run, torch.float32), loss(case.dense, torch.float64)
    doubles = [t.double() for t in chosen]
    for product in (functional.hvp, functional.vhp):
        found = product(ours, tuple(chosen), tuple(t.cos() for t in chosen))[1]
        agree(found, product(dense, tuple(doubles), tuple(t.cos() for t in doubles))[1])
    for way in ({}, {"vectorize": True}, {"vectorize": True, "outer_jacobian_strategy": "forward-mode"}):
        found = functional.hessian(ours, tuple(chosen), **way)
        expected = functional.hessian(dense, tuple(doubles))
        agree([t for row in found for t in row], [t for row in expected for t in row])


@pytest.mark.parametrize("make", [Linear, Penalty])
@pytest.mark.parametrize("backend", BACKENDS)
def test_func_transforms(make, backend):
    """grad, jvp, jacrev, hessian and vmap of torch.func."""
    case = make(backend)
    leaves = tuple(leaf.detach() for leaf in case.leaves)
    doubles = tuple(leaf.double() for leaf in leaves)
    places = tuple(range(8))

    def both(transform: Callable[[Callable[..., Tensor]], Callable[..., Any]]) -> None:
        found = transform(lambda *given: case.loss(case.run(*given)))(*leaves)
        expected = transform(lambda *given: case.loss(case.dense(*given)))(*doubles)
        agree(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected))

    both(lambda f: grad(f, places))
    both(lambda f: lambda *given: jvp(f, given, tuple(t.cos() for t in given)))
    both(lambda f: hessian(f, (6, 7)))
    both(lambda f: jacrev(grad(f, 7), (0, 5)))
    stacked = [torch.stack([t, 2 * t]) for t in leaves]
    found = vmap(lambda *given: case.loss(case.run(*given)))(*stacked)
    expected = [case.loss(case.dense(*given)) for given in (doubles, [2 * t for t in doubles])]
    agree([found], [torch.stack(expected)])


@pytest.mark.parametrize("make", [Linear, Penalty])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dual_numbers(make, backend):
    """Forward-mode tangents of the call, and of its backward."""
    case = make(backend)
    leaves = [leaf.detach() for leaf in case.leaves]
    doubles = [leaf.double() for leaf in leaves]
    with forward_ad.dual_level():
        duals = [[forward_ad.make_dual(t, t.cos()) for t in tensors] for tensors in (leaves, doubles)]
        found, expected = case.run(*duals[0]), case.dense(*duals[1])
        agree(forward_ad.unpack_dual(found), [t.double() for t in forward_ad.unpack_dual(expected)])
    y = case.run(*case.leaves)
    given = torch.ones_like(y)
    (plain,) = torch.autograd.grad(y, case.leaves[0], given.cos(), retain_graph=True)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(given, given.cos())
        (g,) = torch.autograd.grad(y, case.leaves[0], dual)
        agree([forward_ad.unpack_dual(g).tangent], [plain.double()])


@pytest.mark.parametrize("make", [Linear, Penalty])
@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_gradients(make, backend):
    """`is_grads_batched` gives what one gradient after the other gives."""
    case = make(backend)
    y = case.run(*case.leaves)
    several = torch.stack([torch.ones_like(y), torch.full_like(y, 2.0), torch.zeros_like(y)])
    found = torch.autograd.grad(y, case.leaves, several, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(y, case.leaves, one, retain_graph=True) for one in several]
    agree(found, [torch.stack(one).double() for one in zip(*single, strict=True)])


def test_low_precision():
    """Second derivatives of bf16 layers are summed in fp32."""
    case = Linear("cpu" if "cpu" in BACKENDS else "reference", torch.bfloat16)
    compared(case, 2, accuracy=2.0**-4)


def adapted(lora_dropout: float = 0.0) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A small adapted model and the dense fp64 model of (A, B, head weight, x)."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    fe.inject(model, fe.LoRAConfig(r=2, lora_dropout=lora_dropout, target_modules=["0"]))
    layer, head = model[0], model[2]
    nn.init.normal_(layer.lora_B)
    head.weight.requires_grad_()
    scaling = layer.adapter_slices[0].scaling

    def dense(a: Tensor, b: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        hidden = x @ (layer.weight.double() + scaling * b @ a).T + layer.bias.double()
        return hidden.tanh() @ weight.T + head.bias.double()

    return model, dense


PARAMETERS = ("0.lora_A", "0.lora_B", "2.weight")


def test_samples_of_a_model():
    """Per-sample `vmap(grad)` of an adapted model, and its Hessian."""
    model, dense = adapted()
    x, y = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    values = tuple(p.detach() for name, p in model.named_parameters() if name in PARAMETERS)

    def loss(a: Tensor, b: Tensor, weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
        named = dict(zip(PARAMETERS, (a, b, weight), strict=True))
        return nn.functional.cross_entropy(functional_call(model, named, (x,)), y)

    def truth(a: Tensor, b: Tensor, weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(dense(a, b, weight, x), y)

    doubles = tuple(v.double() for v in values)
    found = vmap(grad(loss, (0, 1, 2)), (None, None, None, 0, 0))(*values, x, y)
    expected = [grad(truth, (0, 1, 2))(*doubles, x[n].double(), y[n]) for n in range(4)]
    agree(found, [torch.stack(one) for one in zip(*expected, strict=True)])
    found = hessian(loss, (0, 1))(*values, x, y)
    expected = hessian(truth, (0, 1))(*doubles, x.double(), y)
    agree([t for row in found for t in row], [t for row in expected for t in row])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_penalty(backend):
    """R1 and its like: the loss has the gradient of the input in it."""
    model, dense = adapted()
    data, y = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    leaves = [p for name, p in model.named_parameters() if name in PARAMETERS]

    def gradients(f: Callable[[Tensor], Tensor], ps: Sequence[Tensor], x: Tensor) -> Sequence[Tensor]:
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(f(x), y), x, create_graph=True)
        return torch.autograd.grad(nn.functional.cross_entropy(f(x), y) + g.square().sum(), ps)

    with fe.use_backend(backend):
        found = gradients(model, leaves, data)
    doubles = exact(leaves, leaves)
    agree(found, gradients(lambda x: dense(*doubles, x), doubles, data.double()))


@pytest.mark.parametrize("training", [False, True])
def test_jit_trace(training):
    """A traced model is right, saved and loaded, with another batch size; dropout draws a mask per call."""
    model, _ = adapted(0.5)
    model.train(training)
    x = torch.randn(4, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        traced = torch.jit.trace(model, x, check_trace=not training)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
    more = torch.cat([x, x, x])
    if training:
        assert not torch.equal(loaded(more), loaded(more))
    model.eval()
    if not training:
        agree([loaded(more)], [model(more).double()])
        agree([loaded(more[:, None])], [model(more[:, None]).double()])


@pytest.mark.parametrize("make", [Linear, Penalty])
def test_compiled(make):
    """Compiled transforms are right, and second derivatives of what is compiled raise."""
    case = make("reference")
    leaves = [leaf.detach() for leaf in case.leaves]
    places = tuple(range(8))
    compiled = torch.compile(grad(lambda *given: case.loss(case.run(*given)), places), backend="aot_eager")
    expected = grad(lambda *given: case.loss(case.dense(*given)), places)(*(t.double() for t in leaves))
    agree(compiled(*leaves), expected)
    compiled = torch.compile(lambda *given: case.loss(case.run(*given)), backend="aot_eager", fullgraph=True)
    value = compiled(*case.leaves)
    with pytest.raises(RuntimeError, match=r"double backward|create_graph=False"):
        grads = torch.autograd.grad(value, case.leaves, create_graph=True)
        torch.autograd.grad(grads[1].square().sum(), case.leaves, allow_unused=True)


def test_changed_operands():
    """A Fisher or factor that changed in place since the penalty was computed is an error."""
    for backend in BACKENDS:
        for change in range(3):
            case = Penalty(backend)
            value = case.run(*case.leaves)
            with torch.no_grad():
                (case.fishers[1], case.leaves[0], case.leaves[7])[change].mul_(2.0)
            with pytest.raises(RuntimeError, match=r"ewc_penalty: .* modified by an inplace operation"):
                torch.autograd.grad(value, case.leaves, create_graph=True)
            torch.autograd.grad(value, case.leaves)  # whose values were computed before


class Captured:
    """A layer in a Fisher pass."""

    def __init__(self) -> None:
        self.x, self.weight = torch.randn(4, 5, requires_grad=True), torch.randn(3, 5)
        self.a, self.b = torch.randn(2, 5, requires_grad=True), torch.randn(3, 2, requires_grad=True)
        self.fisher = torch.zeros(3, 5)
        self.capture = FisherCapture([self.fisher], [((0, 3),)], reduction="sum")

    def run(self, x: Tensor) -> Tensor:
        adapter = FE.Adapter(self.a, self.b, 1.0, ((0, 3),))
        return FE.lora_linear_adapters(x, self.weight, None, [adapter], capture=self.capture)


def test_capture_records_once():
    """A graph of the backward changes nothing that a Fisher pass records, and none of it is kept."""
    torch.manual_seed(1)
    expected = Captured()
    expected.run(expected.x).square().sum().backward()
    torch.manual_seed(1)
    found = Captured()
    found.run(found.x).square().sum().backward(create_graph=True)
    assert torch.equal(found.fisher, expected.fisher) and not found.fisher.requires_grad
    assert float(found.fisher.min()) > 0.0 and found.capture.samples == 4


def test_capture_of_penalised():
    """A loss that has gradients in it has no Fisher that a layer could record."""
    case = Captured()
    loss = case.run(case.x).square().sum()
    (g,) = torch.autograd.grad(loss, case.x, create_graph=True)
    with pytest.raises(fe.FisherError, match=r"a Fisher pass: .*create_graph=True"):
        (loss + g.square().sum()).backward()


def test_capture_of_transforms():
    """Transforms do not reach a Fisher pass."""
    case = Captured()
    message = r"a Fisher pass: expected .* torch\.func"
    with pytest.raises(fe.FisherError, match=message):
        vmap(case.run)(case.x.detach())
    with pytest.raises(fe.FisherError, match=message), forward_ad.dual_level():
        case.run(case.x)
    y = case.run(case.x)
    with pytest.raises(fe.FisherError, match=message):
        torch.autograd.grad(y, case.a, torch.ones(2, 4, 3), is_grads_batched=True)
    assert not case.fisher.any()


def test_in_place_refused():
    """What is written in place is followed by no transform, and says so before it changes anything."""
    case = Captured()
    weight, scale = case.weight.clone(), torch.ones(2)
    a, b = case.a.detach(), case.b.detach()
    calls: dict[str, Callable[[], Any]] = {
        "merge_": lambda: FE.merge_(weight, a, b),
        "soft_threshold_": lambda: FE.soft_threshold_(scale, 0.1),
        "fisher_accumulate_": lambda: FE.fisher_accumulate_(case.fisher, a, b.T),
        "ewc_penalty_grad_": lambda: FE.ewc_penalty_grad_([weight.square()], [case.a], [case.b]),
    }

    def inside(call: Callable[[], Any]) -> Callable[[Tensor], Tensor]:
        def function(t: Tensor) -> Tensor:
            call()
            return t

        return function

    for name, call in calls.items():
        with pytest.raises(fe.ArgumentError, match=f"{name}: expected a call outside of torch.func"):
            vmap(inside(call))(torch.ones(2))
        with pytest.raises(fe.ArgumentError, match=f"{name}: "), forward_ad.dual_level():
            call()
    assert torch.equal(weight, case.weight) and torch.equal(scale, torch.ones(2))
    assert not case.fisher.any() and case.a.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_inference(backend):
    """vmap without gradients."""
    case = Linear(backend)
    x, *rest = case.leaves
    with torch.no_grad():
        found = vmap(lambda one: case.run(one, *rest))(torch.stack([x, 2 * x]))
        doubles = exact(case.leaves, case.leaves)
        agree(found, [case.dense(factor * doubles[0], *doubles[1:]) for factor in (1, 2)])
