# SPDX-License-Identifier: Apache-2.0
"""Whoever traces, records or replaces operations sees ours, although eager calls go past the dispatcher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from strategies import BACKENDS
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ewclora import functional as FE
from fused_ewclora.ops import schemas

OPS = ["fused_ewclora.lora_linear", "fused_ewclora.lora_linear_backward", "fused_ewclora.ewc_penalty"]


class Seen(TorchDispatchMode):
    """Notes our operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fused_ewclora":
            self.names.append(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def inputs(**options: Any) -> list[Tensor]:
    sizes = ((3, 8), (6, 8), (2, 8), (6, 2))
    return [torch.randn(size, **options).requires_grad_(i != 1) for i, size in enumerate(sizes)]


def step(x: Tensor, w: Tensor, a: Tensor, b: Tensor, backend: str | None = None) -> list[Tensor]:
    y = FE.lora_linear(x, w, None, a, b, backend=backend)
    penalty = FE.ewc_penalty([w.detach().square()], [a], [b], backend=backend)
    return [y, penalty, *torch.autograd.grad(y.sum() + penalty, [x, a, b])]


@pytest.fixture
def no_direct_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where an implementation would be called past the dispatcher."""
    observed = schemas._observed

    def strict(tensors: Any) -> bool:
        assert observed(tensors), "nobody was noticed"
        return True

    monkeypatch.setattr(schemas, "_observed", strict)


def test_plain_calls_direct():
    """Plain calls go past the dispatcher."""
    assert not schemas._observed([*inputs(), None, torch.nn.Parameter(torch.ones(1))])


def test_dispatch_modes():
    """Dispatch modes see the ops in order."""
    with Seen() as seen:
        step(*inputs())
    assert sorted(seen.names) == sorted(OPS) and seen.names[0] == OPS[0]


def test_profilers_see_them():
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step(*inputs())
    names = {event.name for event in found.events()}
    assert {name.replace(".", "::") for name in OPS} <= names


@pytest.mark.usefixtures("no_direct_calls")
def test_meta_tensors():
    """Meta tensors have shapes alone."""
    tensors = inputs(device="meta")
    found = step(*tensors)
    assert [t.shape for t in found] == [(3, 6), (), (3, 8), (2, 8), (6, 2)]
    assert all(t.is_meta for t in found)


@pytest.mark.usefixtures("no_direct_calls")
def test_fake_tensors():
    """Fake tensors have shapes alone."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    mode = FakeTensorMode()
    tensors = [mode.from_tensor(t) for t in inputs()]
    y = FE.lora_linear(*tensors[:2], None, *tensors[2:])  # outside of the mode
    assert isinstance(y, FakeTensor) and y.shape == (3, 6)


@pytest.mark.usefixtures("no_direct_calls")
def test_tensor_subclasses():
    """Subclasses of tensors see the ops."""
    names: list[str] = []

    class Noted(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            plain = torch.utils._pytree.tree_map_only(cls, lambda t: t.plain, (args, kwargs or {}))
            return func(*plain[0], **plain[1])

        @staticmethod
        def of(tensor: Tensor) -> Tensor:
            made = Tensor._make_subclass(Noted, tensor)
            made.plain = tensor  # type: ignore[attr-defined]
            return made

    x, w, a, b = (t.detach() for t in inputs())
    for tensors in ((Noted.of(x), w, a, b), (x, w, a, Noted.of(b))):
        names.clear()
        with torch.no_grad():
            FE.lora_linear(*tensors[:2], None, *tensors[2:])
        assert "fused_ewclora.lora_linear.default" in names


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8)])
def test_same_bits(shape, monkeypatch):
    """Direct and dispatched calls give the same bits."""
    _, w, a, b = inputs()
    x = torch.randn(shape, requires_grad=True)
    direct = step(x, w, a, b)
    monkeypatch.setattr(schemas, "_observed", lambda tensors: True)
    assert all(map(torch.equal, direct, step(x, w, a, b)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tuples_as_lists(backend):
    """Tuples are taken where the schema has lists."""
    _, w, a, b = inputs()
    fisher = w.detach().square()
    arguments = ((fisher,), (a,), (b,), (None,), (1.0,), 2.0, (True, True, False), backend)
    with torch.no_grad():
        expected = schemas.ewc_penalty(*(list(x) if isinstance(x, tuple) else x for x in arguments))
        assert all(map(torch.equal, schemas.ewc_penalty(*arguments), expected))
