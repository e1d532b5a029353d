# SPDX-License-Identifier: Apache-2.0
"""What operations write has a new version, so that autograd does not use it in place of what it saved."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from strategies import BACKENDS, device_of
from torch import Tensor

from fused_ewclora import functional as FE
from fused_ewclora.errors import ArgumentError
from fused_ewclora.ops import schemas
from fused_ewclora.ops.capture import FisherCapture

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
CHANGED = "modified by an inplace operation"


def ones(backend: str, *shape: int) -> Tensor:
    return torch.ones(shape, device=device_of(backend))


def merge(target: Tensor, backend: str) -> None:
    FE.merge_(target, ones(backend, 2, 8), ones(backend, 4, 2), backend=backend)


def merge_many(target: Tensor, backend: str) -> None:
    FE.merge_([target[:2], target[2:]], [ones(backend, 2, 8)] * 2, [ones(backend, 2, 2)] * 2, backend=backend)


def accumulate(target: Tensor, backend: str) -> None:
    FE.fisher_accumulate_(target, ones(backend, 2, 3, 8), ones(backend, 2, 3, 4), backend=backend)


def threshold(target: Tensor, backend: str) -> None:
    FE.soft_threshold_(target, 0.25, backend=backend)


WRITES = [merge, merge_many, accumulate, threshold]
each_write = pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)


@each_write
def test_saved_tensor_noticed(backend: str, write: Callable[[Tensor, str], None]):
    """A backward that needs the values of before raises."""
    target, other = ones(backend, 4, 8), ones(backend, 4, 8).requires_grad_()
    loss = (target * other.square()).sum()
    before = target._version
    write(target, backend)
    assert target._version > before and not torch.equal(target, ones(backend, 4, 8))
    with pytest.raises(RuntimeError, match=CHANGED):
        loss.backward()


@each_write
def test_base_of_view(backend: str, write: Callable[[Tensor, str], None]):
    """Of a view, the whole tensor has a new version."""
    base = ones(backend, 6, 8)
    write(base[1:5], backend)
    assert base._version > 0


@each_write
def test_dispatched(backend: str, write: Callable[[Tensor, str], None]):
    """So it is where somebody watches the dispatcher."""
    target = ones(backend, 4, 8)
    with torch.profiler.profile():
        write(target, backend)
    assert target._version > 0


@each_write
def test_inference_mode(backend: str, write: Callable[[Tensor, str], None]):
    """Tensors without versions are changed inside of the inference mode and refused outside of it."""
    with torch.inference_mode():
        target = ones(backend, 4, 8)
        write(target, backend)
        assert not torch.equal(target, ones(backend, 4, 8))
    before = target.clone()
    with pytest.raises(ArgumentError, match="inference_mode"):
        write(target[:4], backend)
    assert torch.equal(target, before)


def test_layer_weight(backend: str):
    """A LoRA linear whose weight was merged meanwhile raises in its backward."""
    x, weight = ones(backend, 3, 8).requires_grad_(), ones(backend, 4, 8)
    y = FE.lora_linear(x, weight, None, ones(backend, 2, 8), ones(backend, 4, 2), backend=backend)
    merge(weight, backend)
    with pytest.raises(RuntimeError, match=CHANGED):
        y.sum().backward()


def test_parameter(backend: str):
    """A parameter is changed as by an optimizer: no graph, but a new version."""
    weight = torch.nn.Parameter(ones(backend, 4, 8))
    merge(weight, backend)
    assert weight.is_leaf and weight.grad_fn is None and weight._version > 0


def test_added_gradients(backend: str):
    """Gradients to which those of the penalty are added have a new version."""
    a, b = ones(backend, 2, 8).requires_grad_(), ones(backend, 4, 2).requires_grad_()
    a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
    other = ones(backend, 2, 8).requires_grad_()
    loss = (a.grad * other.square()).sum()
    FE.ewc_penalty_grad_([ones(backend, 4, 8)], [a], [b], backend=backend)
    assert b.grad._version > 0
    with pytest.raises(RuntimeError, match=CHANGED):
        loss.backward()


def test_shared_parameter(backend: str):
    """A parameter in two adapters gets both of their gradients, on top of what it has or not."""
    a, b = ones(backend, 2, 8).requires_grad_(), ones(backend, 4, 2).requires_grad_()
    fishers = [ones(backend, 4, 8), 2 * ones(backend, 4, 8)]
    FE.ewc_penalty_grad_(fishers, [a, a], [b, b], backend=backend)
    once = a.grad.clone(), b.grad.clone()
    expected = torch.autograd.grad(FE.ewc_penalty(fishers, [a, a], [b, b], backend=backend), [a, b])
    assert all(map(torch.allclose, once, expected))
    FE.ewc_penalty_grad_(fishers, [a, a], [b, b], backend=backend)
    assert all(torch.allclose(t.grad, 2 * g) for t, g in ((a, once[0]), (b, once[1])))


def test_captured_fisher(backend: str):
    """A Fisher that fills during a backward has a new version."""
    fisher = ones(backend, 4, 8)
    capture = FisherCapture([fisher], [((0, 4),)])
    adapter = FE.Adapter(ones(backend, 2, 8).requires_grad_(), ones(backend, 4, 2), 1.0, ((0, 4),))
    y = FE.lora_linear_adapters(
        ones(backend, 3, 8), ones(backend, 4, 8), None, [adapter], capture=capture, backend=backend
    )
    y.sum().backward()
    assert fisher._version > 0


def test_compiled(backend: str):
    """So it is in a compiled graph."""
    if backend not in ("cpu", "reference"):
        pytest.skip("the same operation, as opaque to the compiler")
    target = ones(backend, 4, 8)
    torch.compile(merge, fullgraph=True)(target, backend)
    assert target._version > 0 and bool((target == 3.0).all())


def test_direct_op(backend: str):
    """So it is where the operation is called past `functional`."""
    target = ones(backend, 4, 8)
    schemas.merge_([target], [ones(backend, 2, 8)], [ones(backend, 4, 2)], [None], [1.0], backend)
    assert target._version > 0
