# SPDX-License-Identifier: Apache-2.0
"""The l1 norm of B diag(s) A and its gradients on every backend: fp64 formulas, memory, derivatives, and what
is refused."""

from __future__ import annotations

from collections.abc import Callable

import oracles
import pytest
import torch
from allocations import MIB, peak_and_largest
from hypothesis import strategies as st
from l1_cases import assert_equals_oracle, cases, gradients, run
from penalty_cases import make
from strategies import BACKENDS, Values, property_test, set_threads
from tolerance import EPS, assert_within
from torch import Tensor
from torch.func import grad, hessian, vmap

from fused_ewclora import functional as FE
from fused_ewclora.errors import ArgumentError, DtypeError
from fused_ewclora.ops import schemas
from fused_ewclora.reference import l1_penalty as blocks

pytestmark = pytest.mark.usefixtures("poisoned_memory")
on_backends = pytest.mark.parametrize("backend", BACKENDS)
BIG = [(300, 200, 4), (37, 131, 30), (1, 1, 1), (13, 700, 70)]


@on_backends
@property_test(10, data=st.data(), rows=st.sampled_from((1, 3, 2**20)))
def test_equals_fp64(backend, data, rows):
    """Value and gradients equal fp64 for any shapes, ranks, dtypes, strides and blocks."""
    case = data.draw(cases(backend))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "rows_of_block", lambda *_: rows)
        assert_equals_oracle(case, *gradients(case))


@on_backends
@pytest.mark.parametrize("threads", [1, 3])
def test_deterministic(backend, threads):
    """Several blocks on several threads give the truth, and the same bits in every run."""
    set_threads(backend, threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "rows_of_block", lambda *_: 11)
        case = make(Values(1, backend), BIG, backend, ewc_lambda=3.0)
        value, grads = gradients(case)
        assert_equals_oracle(case, value, grads)
        again, grads_again = gradients(case)
    assert torch.equal(value, again) and all(map(torch.equal, grads, grads_again))


@on_backends
def test_zeros(backend):
    """Elements that are 0 have the slope 0; B = 0 gives zeros, also in an A that is not 0."""
    a, b = torch.eye(3, requires_grad=True), torch.tensor([[2.0, 0.0, -1.0]], requires_grad=True)
    da, db = torch.autograd.grad(FE.l1_penalty([a], [b], backend=backend), [a, b])
    assert db.tolist() == [[1.0, 0.0, -1.0]] and da[1].tolist() == [0.0, 0.0, 0.0]
    case = make(Values(2, backend), BIG[:3], backend)
    case.lora_bs = [torch.zeros_like(b).requires_grad_() for b in case.lora_bs]
    value, grads = gradients(case)
    assert value.item() == 0.0 and not any(bool(grad.any()) for grad in grads)
    assert FE.l1_penalty([], [], backend=backend).item() == 0.0
    empty = FE.l1_penalty([torch.ones(2, 0), torch.ones(1, 4)], [torch.ones(3, 2), torch.ones(0, 1)])
    assert empty.item() == 0.0


@on_backends
def test_not_a_number(backend):
    """One NaN makes the penalty so."""
    a, b = torch.ones(2, 5), torch.ones(4, 2)
    b[3, 1] = torch.nan
    assert FE.l1_penalty([a], [b], backend=backend).isnan()


@on_backends
def test_factor_beside_scale(backend):
    """An op that is given both multiplies them, in the value and in every gradient."""
    values = Values(6, backend)
    a, b, scale = values.normal(3, 33), values.normal(19, 3), values.normal(3)
    found = schemas.penalties["l1_penalty"]([], [a], [b], [scale], [0.5], 2.0, [True] * 3, backend)
    expected = schemas.penalties["l1_penalty"]([], [a], [b], [0.5 * scale], [1.0], 2.0, [True] * 3, backend)
    expected[1][a.numel() + b.numel() :] *= 0.5
    torch.testing.assert_close(found, expected)


@on_backends
@pytest.mark.parametrize("frozen", ["A", "B", "s", "everything"])
def test_frozen_inputs(backend, frozen):
    """Frozen inputs get no gradient and change no other."""
    case = make(Values(6, backend), BIG[:3], backend)
    whole = {id(leaf): grad for leaf, grad in zip(case.leaves(), gradients(case)[1], strict=True)}
    scales = [s for s in case.scales if isinstance(s, Tensor)]
    for tensor in {"A": case.lora_as, "B": case.lora_bs, "s": scales}.get(frozen, case.leaves()):
        tensor.requires_grad_(False)
    if not case.leaves():
        assert not run(case).requires_grad
        return
    for leaf, found in zip(case.leaves(), gradients(case)[1], strict=True):
        assert torch.equal(found, whole[id(leaf)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(dtype):
    """Nothing of the size of B A: blocks of half a MiB, of which two are held, and the gradients."""
    if "cpu" not in BACKENDS:
        pytest.skip("the CPU extension was not built")
    torch.set_num_threads(1)
    a = [torch.randn(10, 1024).to(dtype).requires_grad_() for _ in range(3)]
    b = [torch.randn(2048, 10).to(dtype).requires_grad_() for _ in range(3)]
    peak, largest = peak_and_largest(lambda: FE.l1_penalty(a, b, l1_lambda=0.4, backend="cpu"))
    # Factors, products and gradients in fp32, each a few times; a whole B A has 8 MiB.
    factors = sum(4 * t.numel() for t in (*a, *b))
    assert largest <= max(MIB, factors), f"one allocation of {largest / MIB:.2f} MiB"
    assert peak <= MIB + 4 * factors, f"{peak / MIB:.2f} MiB"
    assert MIB + 4 * factors < 2048 * 1024 * 4


class Small:
    """Two adapters whose products are far from 0, one with a scale tensor."""

    def __init__(self, backend: str, dtype: torch.dtype) -> None:
        values, self.backend = Values(3, backend), backend
        shapes = ((2, 4), (3, 5), (3, 2), (4, 3), (3,))
        self.leaves = [values.normal(*shape, dtype=dtype).requires_grad_() for shape in shapes]
        a0, a1, b0, b1, s = (oracles.exact(t) for t in self.leaves)
        assert min((0.5 * b0 @ a0).abs().min(), (b1 * s @ a1).abs().min()) > 1e-3

    def run(self, a0: Tensor, a1: Tensor, b0: Tensor, b1: Tensor, s: Tensor) -> Tensor:
        return FE.l1_penalty([a0, a1], [b0, b1], [0.5, s], 3.0, backend=self.backend)

    def dense(self, a0: Tensor, a1: Tensor, b0: Tensor, b1: Tensor, s: Tensor) -> Tensor:
        return 3.0 * ((0.5 * b0 @ a0).abs().sum() + (b1 * s @ a1).abs().sum())


def test_gradgradcheck():
    """Forward and reverse, batched, against finite differences in fp64."""
    case = Small("reference", torch.float64)
    how = {"fast_mode": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(case.run, case.leaves, check_forward_ad=True, **how)
    assert torch.autograd.gradgradcheck(case.run, case.leaves, check_fwd_over_rev=True, **how)


def close(found: Tensor, expected: Tensor) -> None:
    """Sums of a few dozen products in fp32."""
    assert_within(found, expected, 64 * EPS[torch.float32] * float(expected.abs().max()), "derivative")


@on_backends
def test_transforms(backend):
    """Hessians, gradients of batches and gradients of gradients are those of the formula."""
    case = Small(backend, torch.float32)
    leaves = [leaf.detach() for leaf in case.leaves]
    doubles = [oracles.exact(leaf) for leaf in leaves]
    squared: Callable[..., Callable[..., Tensor]] = lambda f: lambda *given: f(*given).square()  # noqa: E731
    for place in (2, 4):
        close(hessian(squared(case.run), place)(*leaves), hessian(squared(case.dense), place)(*doubles))
    stacked = [torch.stack([t, 2 * t]) for t in leaves]
    found = vmap(grad(case.run, 1))(*stacked)
    expected = torch.stack([grad(case.dense, 1)(*doubles), grad(case.dense, 1)(*[2 * t for t in doubles])])
    close(found, expected)
    (first,) = torch.autograd.grad(case.run(*case.leaves), case.leaves[0], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), case.leaves[2])
    wide = [t.requires_grad_() for t in doubles]
    (first,) = torch.autograd.grad(case.dense(*wide), wide[0], create_graph=True)
    close(second, torch.autograd.grad(first.square().sum(), wide[2])[0])


def test_compiles():
    """A graph without breaks gives the gradients of eager calls."""
    case = Small("reference", torch.float32)
    results = []
    for run_one in (case.run, torch.compile(case.run, fullgraph=True, backend="aot_eager")):
        value = run_one(*case.leaves)
        results.append([value.detach(), *torch.autograd.grad(2.0 * value, case.leaves)])
    assert all(map(torch.equal, *results))


def test_refusals():
    """What does not fit is named before anything runs."""
    a, b = torch.ones(2, 5), torch.ones(4, 2)
    for arguments, error, words in (
        (([a], []), ArgumentError, "lora_bs: expected 1 entries"),
        (([a], [b], [1.0, 2.0]), ArgumentError, "scales: expected 1 entries"),
        (([a], [b.T]), ArgumentError, r"lora_b\[0\]: expected 2 columns"),
        (([a, a.double()], [b, b.double()]), DtypeError, r"lora_as\[1\]: expected torch.float32"),
        (([a], [b], [torch.ones(3)]), ArgumentError, r"scale\[0\]: expected a 0-d tensor or shape \[2\]"),
        (([a], [b], None, float("nan")), ArgumentError, "l1_lambda: expected a finite number"),
    ):
        with pytest.raises(error, match=words):
            FE.l1_penalty(*arguments)
    for arguments, words in (
        (([a], [a], [b], [None], [1.0]), "fishers: expected none"),
        (([], [], [], [], []), "lora_as: expected at least one adapter"),
    ):
        with pytest.raises(ArgumentError, match=words):
            blocks.penalty_and_grads_in_blocks(*arguments, 1.0, [True] * 3)
