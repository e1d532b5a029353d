"""Adapters on the same rows of one LoRA linear, one of them frozen: as one with all of their ranks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused_ewclora as fe
from fused_ewclora import functional as FE

ROWS = ((1, 3), (4, 6))  # of 6
D_IN = 5


def operands(seed: int, past: int, current: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, W, A and B of both, their scales, dy."""
    generator = torch.Generator().manual_seed(seed)
    past_shapes, shapes = [(past, D_IN), (4, past), (past,)], [(current, D_IN), (4, current), (current,)]
    shapes = [(3, D_IN), (6, D_IN), *past_shapes, *shapes, (3, 6)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def apart(x: Tensor, weight: Tensor, *factors: Tensor, dropout_p: float = 0.0) -> Tensor:
    adapters = [FE.Adapter(*factors[:3], ROWS), FE.Adapter(*factors[3:], ROWS)]
    return FE.lora_linear_adapters(x, weight, None, adapters, dropout_p=dropout_p, training=True, seed=7)


def stacked(x: Tensor, weight: Tensor, *factors: Tensor, dropout_p: float = 0.0) -> Tensor:
    (a, b, s), (a2, b2, s2) = factors[:3], factors[3:]
    one = FE.Adapter(torch.cat([a, a2]), torch.cat([b, b2], dim=1), torch.cat([s, s2]), ROWS)
    return FE.lora_linear_adapters(x, weight, None, [one], dropout_p=dropout_p, training=True, seed=7)


@given(seeds, st.integers(1, 20), st.integers(1, 4), st.sampled_from([0.0, 0.5]))
@settings(max_examples=15)
def test_same_as_stacked(seed, past, current, dropout_p):
    """Output and gradients are those of one adapter with all ranks."""
    *given_, dy = operands(seed, past, current)
    x, weight, a, b, s, *trained = given_
    wanted = [t.requires_grad_() for t in (x, s, *trained)]
    found = [function(x, weight, a, b, s, *trained, dropout_p=dropout_p) for function in (apart, stacked)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(y, wanted, dy) for y in found]
    for own, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-11, atol=1e-11)


class Needs(TorchDispatchMode):
    """What backward calls of the LoRA linear are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[bool]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "lora_linear_backward" in str(function):
            self.found.append(list(args[12]))
        return function(*args, **(kwargs or {}))


def test_frozen_not_asked():
    """No gradients are asked for of factors that are frozen."""
    x, weight, a, b, s, *trained, dy = operands(0, 6, 2, torch.float32)
    for tensor in (x, s, *trained):
        tensor.requires_grad_()
    with Needs() as needs:
        apart(x, weight, a, b, s, *trained).backward(dy)
    assert needs.found == [[True, False, False, False, True, False, True, True, True]]
    assert a.grad is None and b.grad is None and trained[0].grad is not None


def test_derivatives():
    """Second derivatives and transforms of torch.func are right."""
    x, weight, *factors, _ = (t.requires_grad_() for t in operands(1, 2, 2))
    torch.autograd.gradcheck(apart, (x, weight, *factors), fast_mode=True)
    torch.autograd.gradgradcheck(apart, (x, weight, *factors), fast_mode=True)

    def loss(function):
        return lambda *tensors: function(*tensors).square().sum()

    places = tuple(range(2 + len(factors)))
    found, expected = (torch.func.grad(loss(f), places)(x, weight, *factors) for f in (apart, stacked))
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-11)


def adapters_on(ranges: Sequence[tuple[tuple[int, int], ...]]) -> list[FE.Adapter]:
    return [
        FE.Adapter(torch.ones(1, D_IN), torch.ones(sum(b - a for a, b in rows), 1), 1.0, rows)
        for rows in ranges
    ]


@pytest.mark.parametrize(
    "ranges", [(((0, 4),), ((2, 6),)), (((0, 4),), ((0, 4), (4, 6))), (((0, 2), (1, 3)),)]
)
def test_other_overlaps_refused(ranges):
    """Rows that overlap without being the same are refused."""
    with pytest.raises(fe.ArgumentError, match="disjoint ranges"):
        FE.lora_linear_adapters(torch.ones(2, D_IN), torch.ones(6, D_IN), None, adapters_on(ranges))


def test_same_slices_refused():
    """Slices, and adapters on a given product, have rows of their own."""
    slices = [(1, 3, torch.ones(1, D_IN), torch.ones(2, 1), 1.0)] * 2
    with pytest.raises(fe.ArgumentError, match=r"slices: expected disjoint ranges, but \(1, 3\) is in two"):
        FE.lora_linear_slices(torch.ones(2, D_IN), torch.ones(6, D_IN), None, slices)
    with pytest.raises(fe.ArgumentError, match="rows: expected disjoint ranges, but row 1 is in two"):
        FE.add_low_rank(torch.ones(2, 6), torch.ones(2, D_IN), adapters_on([((1, 3),)] * 2))
