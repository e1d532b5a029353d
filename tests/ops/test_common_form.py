# SPDX-License-Identifier: Apache-2.0
"""Calls whose arguments are checked in C++: which those are, and that nothing else about them differs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import BACKENDS, device_of
from torch import Tensor, nn

from fused_ewclora import functional as FE
from fused_ewclora.backends import native
from fused_ewclora.errors import ArgumentError, EWCLoRAError
from fused_ewclora.ops import checks, dispatch
from fused_ewclora.ops import ewc_penalty as op

compiled = pytest.mark.skipif(native.unavailable() is not None, reason=f"cpu: {native.unavailable()}")
Arguments = tuple[list[Any], list[Any], list[Any], list[Any]]


class Subclass(Tensor):
    pass


def operands(dtype: torch.dtype = torch.float32) -> Arguments:
    """Three adapters, with a number, a 0-d tensor and a vector for scales."""
    shapes = [(5, 7, 2), (4, 3, 1), (6, 7, 3)]
    wide = dtype if dtype == torch.float64 else torch.float32
    return (
        [torch.rand(d_out, d_in).to(wide) for d_out, d_in, _ in shapes],
        [nn.Parameter(torch.randn(r, d_in).to(dtype)) for _, d_in, r in shapes],
        [nn.Parameter(torch.randn(d_out, r).to(dtype)) for d_out, _, r in shapes],
        [0.5, torch.tensor(0.75).to(dtype), torch.randn(3).to(dtype)],
    )  # fmt: skip


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_taken(dtype):
    """The common form is taken, with its rank, scales and needs."""
    fishers, lora_as, lora_bs, scales = operands(dtype)
    found = op.terms("ewc_penalty", fishers, lora_as, lora_bs, scales)
    assert found is not None and (found.rank, found.numbers) == (3, False)
    assert found.needs == [True, True, False]
    for of in (list, tuple):
        assert op.terms("ewc_penalty", of(fishers), of(lora_as), of(lora_bs), None).numbers
    of_norm = op.terms("l1_penalty", [], lora_as, lora_bs, scales)
    assert of_norm is not None and (of_norm.rank, of_norm.needs) == (3, [True, True, False])
    half = torch.bfloat16 if dtype != torch.float64 else torch.float32
    assert op.terms("ewc_penalty", [f.to(half) for f in fishers], lora_as, lora_bs, scales) is not None
    assert dtype == torch.float64 or op.terms(
        "ewc_penalty", fishers, lora_as, [b.float() for b in lora_bs], scales
    )


OTHERS: dict[str, tuple[int, int, Callable[[Any], Any]]] = {
    "subclass": (1, 0, lambda t: t.detach().as_subclass(Subclass)),
    "no tensor": (2, 1, lambda t: t.tolist()),
    "meta": (1, 2, lambda t: t.to("meta")),
    "sign to apply": (0, 1, torch._neg_view),
    "sparse": (0, 0, lambda t: t.to_sparse()),
    "other dtype": (1, 1, lambda t: t.double()),
    "integers": (0, 2, lambda t: t.long()),
    "columns": (1, 0, lambda t: t[:, 1:]),
    "ranks": (2, 0, lambda t: t[:, 1:]),
    "rows": (0, 0, lambda t: t[1:]),
    "no rank": (1, 1, lambda t: t[:0]),
    "vector": (2, 1, lambda t: t[:, 0]),
    "integer scale": (3, 0, lambda s: 1),
    "NaN": (3, 0, lambda s: math.nan),
    "too large": (3, 0, lambda s: 1e39),
    "scale of another rank": (3, 2, lambda s: s[1:]),
    "matrix of scales": (3, 2, lambda s: s[None]),
    "scale in fp64": (3, 1, lambda s: s.double()),
}


@compiled
@pytest.mark.parametrize("name", OTHERS)
def test_left_to_python(name):
    """Everything else is left to the checks in Python, whose words errors have."""
    argument, entry, change = OTHERS[name]
    given, messages = operands(), []
    given[argument][entry] = change(given[argument][entry])
    assert op.terms("ewc_penalty", *given) is None

    def run() -> str:
        try:
            return str(FE.ewc_penalty(*given, ewc_lambda=2.0, backend="reference").shape)
        except (EWCLoRAError, TypeError, RuntimeError, NotImplementedError) as error:
            return str(error)

    messages.append(run())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "penalty_terms", lambda: None)
        messages.append(run())
    assert messages[0] == messages[1]


@compiled
def test_lengths():
    """Lists of different lengths, none at all and other sequences are left to Python."""
    fishers, lora_as, lora_bs, scales = operands()
    assert op.terms("ewc_penalty", fishers[1:], lora_as, lora_bs, scales) is None
    assert op.terms("ewc_penalty", fishers, lora_as, lora_bs, scales[1:]) is None
    assert op.terms("ewc_penalty", [], [], [], []) is None
    assert op.terms("l1_penalty", [], [], [], []) is None
    assert op.terms("l1_penalty", fishers, lora_as, lora_bs, scales) is None
    assert op.terms("l1_penalty", [], lora_as, lora_bs[1:], scales) is None
    assert op.terms("ewc_penalty", nn.ParameterList(fishers), lora_as, lora_bs, scales) is None


@compiled
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    frozen=st.sets(st.integers(0, 5)),
    held=st.sets(st.integers(0, 5)),
    learned=st.booleans(),
    grad_scale=st.sampled_from([1.0, 0.5]),
)
def test_same_gradients(dtype, frozen, held, learned, grad_scale):
    """`.grad` has the bits that Python alone gives it, whichever gradients there are already."""
    fishers, lora_as, lora_bs, scales = operands(dtype)
    scales[2].requires_grad_(learned)
    leaves, results = [*lora_as, *lora_bs, scales[2]], []
    for index in frozen:
        leaves[index].requires_grad_(False)
    old = [torch.randn_like(leaf) if index in held else None for index, leaf in enumerate(leaves)]
    for patched in (False, True):
        for leaf, grad in zip(leaves, old, strict=True):
            leaf.grad = None if grad is None else grad.clone()
        with pytest.MonkeyPatch.context() as patch:
            if patched:
                patch.setattr(dispatch, "penalty_terms", lambda: None)
            arguments = (fishers, lora_as, lora_bs, scales, 3.0)
            value = FE.ewc_penalty_grad_(*arguments, grad_scale=grad_scale, backend="reference")
        results.append([value, *[leaf.grad for leaf in leaves]])
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == other.dtype and torch.equal(one, other))


@pytest.mark.parametrize("before", ["none", "own", "one for both", "views of one"])
def test_shared_memory(before):
    """A parameter of two adapters, and gradients in one memory, receive both terms."""
    fishers, lora_as, lora_bs, _ = operands()
    fishers[2], lora_as[2], lora_bs[2] = fishers[0], lora_as[0], lora_bs[0]
    a, b, twin = lora_as[0], lora_bs[0], nn.Parameter(lora_as[0].detach().clone())
    expected = torch.autograd.grad(FE.ewc_penalty(fishers, lora_as, lora_bs), [a, b])
    if before == "own":
        a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
    if before in ("one for both", "views of one"):
        lora_as[2], memory = twin, torch.zeros_like(a)
        a.grad, twin.grad = memory, memory if before == "one for both" else memory.view_as(memory)
    FE.ewc_penalty_grad_(fishers, lora_as, lora_bs)
    torch.testing.assert_close(a.grad, expected[0])
    torch.testing.assert_close(b.grad, expected[1])


def test_no_leaf():
    """Tensors that were computed keep their gradient to themselves, with the warning of PyTorch."""
    fishers, lora_as, lora_bs, _ = operands()
    lora_as[0] = lora_as[0] * 1.0
    with pytest.warns(UserWarning, match="not a leaf"):
        FE.ewc_penalty_grad_(fishers, lora_as, lora_bs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sign_to_apply(backend):
    """Tensors whose memory holds the negative of their values, and which are not written."""

    def turned(tensors: list[Tensor]) -> list[Tensor]:
        return [torch._neg_view(-t) for t in tensors]

    device = device_of(backend)
    groups = [[t.detach().to(device) for t in group] for group in operands()[:3]]
    (f, *_), (a, *_), (b, *_) = groups
    one, other = (FE.ewc_penalty(*map(how, groups), backend=backend) for how in (list, turned))
    torch.testing.assert_close(other, one)
    merged = FE.merge_(f.clone(), *turned([a, b]), backend=backend)
    torch.testing.assert_close(merged, f + b @ a)
    x, dy = torch.randn(2, 4, 7).to(device), torch.randn(2, 4, 5).to(device)
    expected = FE.fisher_accumulate_(torch.zeros_like(f), x, dy, backend=backend)
    torch.testing.assert_close(
        FE.fisher_accumulate_(torch.zeros_like(f), *turned([x, dy]), backend=backend), expected
    )
    y, z = (FE.lora_linear(*how([x, f]), None, *how([a, b]), backend=backend) for how in (list, turned))
    torch.testing.assert_close(z, y)
    for write in (
        lambda: FE.merge_(turned([f]), [a], [b], backend=backend),
        lambda: FE.fisher_accumulate_(*turned([f]), x, dy, backend=backend),
        lambda: FE.soft_threshold_(*turned([f]), 0.1, backend=backend),
    ):
        with pytest.raises(ArgumentError, match="resolve_neg"):
            write()


def plain_and_others() -> dict[str, Any]:
    return {
        "plain": torch.ones(2, 3),
        "parameter": nn.Parameter(torch.ones(2)),
        "strided": torch.ones(4, 4)[::2, 1:].t(),
        "none": None,
        "seed": torch.tensor(3),
        "inference": _inference(),
        "subclass": torch.ones(2).as_subclass(Subclass),
        "meta": torch.ones(2, device="meta"),
        "sign": torch._neg_view(torch.ones(2)),
        "sparse": torch.eye(2).to_sparse(),
    }


def _inference() -> Tensor:
    with torch.inference_mode():
        return torch.ones(2)


@pytest.mark.parametrize("how", ["C++", "Python"])
def test_plain_tensors(how):
    """Which tensors kernels may read past the dispatcher; C++ and Python agree."""
    plain = dispatch.are_plain() if how == "C++" else dispatch._are_plain
    found = {name for name, tensor in plain_and_others().items() if plain([tensor])}
    assert found == {"plain", "parameter", "strided", "none", "seed", "inference"}


@compiled
def test_wrapped_tensors():
    """Wrappers of transforms and of functionalization look like tensors, and are not plain."""
    seen = []
    torch.func.vmap(lambda t: seen.append(dispatch.are_plain()([t])) or t)(torch.ones(2, 3))
    assert seen == [False]
    assert not dispatch.are_plain()([torch._to_functional_tensor(torch.ones(2))])


@compiled
def test_plain_merges():
    """Merges in the common form are known by C++, and only those."""

    def common(**changed: Any) -> bool:
        weight, a, b = torch.randn(5, 7), torch.randn(2, 7), torch.randn(5, 2)
        given = {"weights": [weight], "lora_as": [a], "lora_bs": [b], "scales": [0.5]} | changed
        return checks.is_plain_merge(**given)

    memory, wide = torch.randn(64), torch.randn(5, 14)
    assert common() and common(scales=[torch.ones(2)]) and common(weights=[torch.randn(9, 7)[2:7]])
    assert common(weights=[torch.randn(5, 7).bfloat16()])
    for changed in (
        {"weights": [wide[:, ::2]]},
        {"weights": [torch.randn(7).expand(5, 7)]},
        {"weights": [torch.randn(4, 7)]},
        {"weights": [memory[:35].view(5, 7)], "lora_as": [memory[40:54].view(2, 7)]},
        {"weights": [_inference().expand(5, 2)]},
        {"scales": [1]},
        {"scales": [math.inf]},
        {"lora_as": []},
        {"weights": [torch.randn(5, 7).bfloat16()], "lora_as": [torch.randn(2, 7).half()]},
    ):
        assert not common(**changed), changed
