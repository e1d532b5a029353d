# SPDX-License-Identifier: Apache-2.0
"""Eager LoRA linears that go from their arguments to autograd's tape in C++: which calls do, and that those
give what Python's way gives. What they compute, and refuse, is tested with all other calls of the op."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fused_ewclora as fe
from fused_ewclora import functional as FE
from fused_ewclora.backends import native
from fused_ewclora.ops import dispatch
from fused_ewclora.ops import lora_linear as ops

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"cpu: {native.unavailable()}")
D_IN, D_OUT, RANK = 6, 8, 3


def arguments(dtype: torch.dtype = torch.float32, **changed: Any) -> dict[str, Any]:
    """A plain call of `lora_linear_adapters`, but for what is changed."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    adapter = FE.Adapter(normal(RANK, D_IN), normal(D_OUT, RANK), 0.5, ((0, D_OUT),))
    plain = {
        "x": normal(2, 5, D_IN),
        "weight": normal(D_OUT, D_IN),
        "bias": normal(D_OUT),
        "adapters": [adapter],
    }
    return {
        **plain,
        "dropout_p": 0.0,
        "training": True,
        "seed": None,
        "asked": "cpu",
        "captured": None,
        **changed,
    }


def eager(**given: Any) -> Tensor | None:
    function = ops.eager()
    assert function is not None
    return function(*given.values())


def sliced(*rows: tuple[int, int], scale: Any = 1.0) -> list[FE.Adapter]:
    return [
        FE.Adapter(torch.ones(RANK, D_IN), torch.ones(stop - start, RANK), scale, ((start, stop),))
        for start, stop in rows
    ]


PLAIN = {
    "fp32": {},
    "no bias": {"bias": None},
    "a vector": {"x": torch.ones(D_IN)},
    "no rows": {"x": torch.ones(0, D_IN)},
    "two slices": {"adapters": sliced((4, 8), (0, 2))},
    "a tuple": {"adapters": tuple(sliced((0, 8)))},
    "scales": {"adapters": sliced((0, 8), scale=torch.ones(RANK))},
    "one scale": {"adapters": sliced((0, 8), scale=torch.tensor(2.0))},
    "an integer": {"adapters": sliced((0, 8), scale=2)},
    "dropout": {"dropout_p": 0.25},
    "a seed": {"dropout_p": 0.25, "seed": 7},
    "a seed tensor": {"dropout_p": 0.25, "seed": torch.tensor([7])},
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_served(name: str, dtype: torch.dtype):
    """Calls in the common forms are served in C++."""
    changed = dict(PLAIN[name])
    if isinstance(changed.get("x"), Tensor):
        changed["x"] = changed["x"].to(dtype)
    assert eager(**arguments(dtype, **changed)) is not None


class Subclass(Tensor):
    pass


SUBJECT = arguments()
REFUSED = {
    "another dtype": {"weight": SUBJECT["weight"].double()},
    "fp64": arguments(torch.float64),
    "not a tensor": {"x": [1.0]},
    "integers": {"x": torch.ones(2, D_IN, dtype=torch.int64)},
    "a subclass": {"x": SUBJECT["x"].as_subclass(Subclass)},
    "a subclass of a factor": {
        "adapters": [
            FE.Adapter(torch.ones(RANK, D_IN).as_subclass(Subclass), torch.ones(8, RANK), 1.0, ((0, 8),))
        ]
    },
    "meta": {name: SUBJECT[name].to("meta") for name in ("x", "weight", "bias")},
    "sparse": {"x": torch.eye(D_IN).to_sparse()},
    "features": {"x": torch.ones(2, D_IN + 1)},
    "a bias of another length": {"bias": torch.ones(D_OUT + 1)},
    "no adapters": {"adapters": []},
    "overlapping rows": {"adapters": sliced((0, 5), (4, 8))},
    "rows beyond": {"adapters": sliced((4, 9))},
    "rows before": {"adapters": sliced((-1, 3))},
    "a scale that is no number": {"adapters": sliced((0, 8), scale=float("nan"))},
    "an infinite scale": {"adapters": sliced((0, 8), scale=float("inf"))},
    "scales of another length": {"adapters": sliced((0, 8), scale=torch.ones(RANK + 1))},
    "a probability beyond": {"dropout_p": 1.5},
    "no probability": {"dropout_p": float("nan")},
    "a seed of floats": {"dropout_p": 0.5, "seed": torch.tensor(1.0)},
    "a seed too long": {"dropout_p": 0.5, "seed": 2**63},
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_refused(name: str):
    """Everything else is left to Python, which has the words for it."""
    assert eager(**{**arguments(), **REFUSED[name]}) is None


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


OBSERVERS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "function mode": Functions,
    "dispatch mode": Dispatches,
    "profiler": torch.profiler.profile,
    "forward mode": forward_ad.dual_level,
    "ranges": fe.profiling.enable,
}


@pytest.mark.parametrize("name", OBSERVERS)
def test_observers_see(name: str):
    """Calls that somebody looks at take the way on which they are seen; afterwards they do not."""
    with OBSERVERS[name]():
        assert eager(**arguments()) is None
    assert eager(**arguments()) is not None


def test_transforms_seen():
    """Inside of torch.func and torch.jit.trace calls are left to Python."""
    seen = []

    def call(x: Tensor) -> Tensor:
        seen.append(eager(**{**SUBJECT, "x": x}))
        return x

    torch.func.grad(lambda x: call(x).sum())(torch.ones(2, D_IN))
    torch.vmap(call)(torch.ones(3, 2, D_IN))
    torch.jit.trace(call, torch.ones(2, D_IN), check_trace=False)
    assert len(seen) >= 3
    assert not any(y is not None for y in seen)


def in_python() -> contextlib.AbstractContextManager[None]:
    @contextlib.contextmanager
    def without() -> Any:
        before = dispatch.annotate(lambda op, candidate: candidate._replace(linear=None))
        try:
            yield
        finally:
            dispatch.annotate(before)

    return without()


def gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]
    layer.zero_grad()
    return found  # type: ignore[return-value]


@given(
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 40),
    st.booleans(),
)
def test_equals_python(dtype: torch.dtype, autocast: bool, bias: bool, rows: int, dropout: bool):
    """Bit for bit what the Function in Python gives, under autocast as well."""
    torch.manual_seed(rows)
    layer = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=bias)).to(torch.float32 if autocast else dtype)
    fe.inject(layer, fe.LoRAConfig(r=RANK, target_modules=["0"], lora_dropout=0.5 if dropout else 0.0))
    nn.init.normal_(layer[0].lora_B)
    x = torch.randn(rows, D_IN).to(torch.float32 if autocast else dtype)
    results = []
    for context in (contextlib.nullcontext(), in_python()):
        torch.manual_seed(1)
        with context, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(gradients(layer, x))
    for ours, python in zip(*results, strict=True):
        torch.testing.assert_close(ours, python, rtol=0, atol=0)


def test_choice_forgotten():
    """Another backend is asked for, and another serves."""
    given = arguments()
    fused, reference = (
        FE.lora_linear_adapters(*(given[n] for n in ("x", "weight", "bias", "adapters")), backend=name)
        for name in ("cpu", "reference")
    )
    assert eager(**{**given, "asked": "reference"}) is None
    torch.testing.assert_close(fused, reference)


def test_weights_that_train():
    """A weight and a bias that require gradients have those of the composition."""
    given = arguments()
    a, b, scale, _ = given["adapters"][0]
    leaves = [t.clone().requires_grad_() for t in (given["x"], given["weight"], given["bias"], a, b)]
    x, weight, bias, a, b = leaves
    y = eager(
        **{**given, "x": x, "weight": weight, "bias": bias, "adapters": [FE.Adapter(a, b, scale, ((0, 8),))]}
    )
    assert y is not None
    expected = F.linear(x, weight, bias) + F.linear(F.linear(x, a), b) * scale
    for ours, truth in zip(
        torch.autograd.grad(y.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)
