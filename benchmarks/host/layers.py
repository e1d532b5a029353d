# SPDX-License-Identifier: Apache-2.0
"""One LoRA linear, called as users call it: the module, in training, in inference, and under autocast."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fused_ewclora as fe

from .. import extras
from ..case import Run, Target
from ..lora_linear import METHODS
from ..registry import ADDMM, COMPOSITION, FROZEN, PEFT
from .case import NOT_COMPARED, Caller, HostCase
from .place import Entry, HostPlace

ROWS, WIDTH, RANK = 2, 32, 16  # a product takes one microsecond more than the smallest one, in every dtype
FORWARD, BOTH, INFERENCE = "forward", "forward+backward", "inference"
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}  # bf16 results and intermediates: a few times 2^-9
LAYER_LIMIT, SLICES_LIMIT = 0.6, 0.7  # x PEFT's layer, forward and backward
LINEAR, SLICES = "lora_linear", "lora_linear_slices"
IN_PLACE = "added to slices in place"
Forward = Callable[[Tensor], Tensor]


class Inputs(NamedTuple):
    """A frozen linear, the values of its adapters (A, B in turn), x and dy."""

    linear: nn.Linear
    adapters: list[Tensor]
    x: Tensor
    dy: Tensor


def draw(op: str, dtype: torch.dtype, device: str) -> Inputs:
    """Random inputs; the packed projection of `lora_linear_slices` has adapters on k and v."""
    packed = op == SLICES
    width, count = (3 * WIDTH, 2) if packed else (WIDTH, 1)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(size, device=device).mul_(std).to(dtype)

    linear = nn.Linear(WIDTH, width, device=device, dtype=dtype).requires_grad_(False)
    adapters = [
        factor
        for _ in range(count)
        for factor in (normal(RANK, WIDTH, std=WIDTH**-0.5), normal(WIDTH, RANK, std=0.1))
    ]
    return Inputs(linear, adapters, normal(ROWS, WIDTH).requires_grad_(), normal(ROWS, width))


class Layer(NamedTuple):
    """What is called, and the parameters that train."""

    forward: Forward
    trained: list[Tensor]


def frozen(inputs: Inputs) -> Layer:
    """The layer without adapters."""
    return Layer(inputs.linear, [])


def by_peft(inputs: Inputs) -> Layer:
    """PEFT's layer; of a packed projection with one adapter on all of it, since PEFT has no slices."""
    weight, bias = inputs.linear.weight, inputs.linear.bias
    a, b = inputs.adapters[:2]
    if len(weight) != len(b):
        b = b.repeat(len(weight) // len(b), 1)
    return Layer(*extras.peft_linear(weight, bias, a, b))


def by_function(method: Callable[..., Tensor], inputs: Inputs) -> Layer:
    """A composition in PyTorch."""
    adapters = [factor.clone().requires_grad_() for factor in inputs.adapters]
    weight, bias = inputs.linear.weight, inputs.linear.bias
    return Layer(lambda x: method(x, weight, bias, *adapters), adapters)


def ours(inputs: Inputs) -> Layer:
    """`LoRALinear`, with slices where the inputs have two adapters."""
    options: dict[str, Any] = {}
    if len(inputs.adapters) > 2:
        options = {"slices": ("k", "v"), "layout": fe.QKVLayout(("q", "k", "v"), (WIDTH,) * 3)}
    layer = fe.LoRALinear.from_linear(inputs.linear, RANK, **options)
    factors = [factor for _, a, b in layer.adapter_parameters() for factor in (a, b)]
    with torch.no_grad():
        for factor, value in zip(factors, inputs.adapters, strict=True):
            factor.copy_(value)
    return Layer(layer, factors)


class Passes(NamedTuple):
    """Which passes are run; of which dtype under autocast, or None."""

    which: str
    autocast: torch.dtype | None = None

    def runs(self, layer: Layer, inputs: Inputs) -> tuple[Run, Run]:
        """The call, and the same with all of its results. A backward pass makes gradients anew, as in a step
        after `zero_grad`."""
        forward = _under_autocast(layer.forward, inputs.x.device.type, self.autocast)
        x, leaves = inputs.x, [inputs.x, *layer.trained]
        dy = inputs.dy if self.autocast is None else inputs.dy.to(self.autocast)

        def once() -> list[Tensor]:
            return [forward(x)]

        def both() -> list[Tensor]:
            for leaf in leaves:
                leaf.grad = None
            y = forward(x)
            y.backward(dy)
            return [y]

        def results() -> list[Tensor]:
            return [*both(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

        return (both, results) if self.which == BOTH else (once, once)

    @contextlib.contextmanager
    def using(self, entry: Entry | None = None) -> Iterator[None]:
        """Around calls: the backend, and no graph in inference."""
        backend = entry.using() if entry else contextlib.nullcontext()
        with backend, torch.set_grad_enabled(self.which != INFERENCE):
            yield


def _under_autocast(forward: Forward, device: str, dtype: torch.dtype | None) -> Forward:
    """autocast is entered for every call, since what it has cast is dropped when it ends."""
    if dtype is None:
        return forward

    def run(x: Tensor) -> Tensor:
        with torch.autocast(device, dtype):
            return forward(x)

    return run


def _truth(op: str, passes: Passes, inputs: Inputs) -> list[Tensor]:
    """The results in fp64."""
    linear = nn.Linear(WIDTH, inputs.linear.out_features, dtype=torch.float64, device=inputs.x.device)
    with torch.no_grad():
        linear.weight.copy_(inputs.linear.weight)
        linear.bias.copy_(inputs.linear.bias)
    x = inputs.x.detach().double().requires_grad_()
    wide = Inputs(linear, [factor.double() for factor in inputs.adapters], x, inputs.dy.double())
    layer = by_function(METHODS[op][COMPOSITION], wide)
    return list(Passes(passes.which).runs(layer, wide)[1]())


def _callers(op: str, passes: Passes, inputs: Inputs, place: HostPlace) -> Iterator[Caller]:
    """Ours on every backend and algorithm, the compositions, PEFT's layer, and the layer without adapters.
    Under autocast only PEFT's layer and the frozen one are compared with."""

    def caller(name: str, make: Callable[[Inputs], Layer], entry: Entry | None = None, **more: Any) -> Caller:
        built: list[tuple[Run, Run]] = []

        def runs() -> tuple[Run, Run]:
            if not built:
                built.append(passes.runs(make(inputs), inputs))
            return built[0]

        using = functools.partial(passes.using, entry)
        return Caller(name, lambda: runs()[0], using=using, check=lambda: runs()[1](), **more)

    for entry in place.entries(algorithms=True):
        backend = entry.backend.partition(":")[0]
        yield caller(entry.name, ours, entry, role=entry.role, backend=backend, results=entry.results)
    for name in (COMPOSITION, ADDMM if op == LINEAR else IN_PLACE) if passes.autocast is None else ():
        yield caller(name, functools.partial(by_function, METHODS[op][name]))
    other = {"results": NOT_COMPARED} if op == SLICES else {}
    yield caller(PEFT, by_peft, **other)
    yield caller(FROZEN, frozen, role="floor", results=NOT_COMPARED)


def _targets(op: str, passes: Passes) -> list[Target]:
    if passes.which != BOTH or passes.autocast is not None:
        return []
    limit, what = (LAYER_LIMIT, "one layer") if op == LINEAR else (SLICES_LIMIT, "k and v of qkv")
    return [Target(PEFT, limit, f"{what}, fwd+bwd, at most {limit} x PEFT's layer")]


def build(op: str, dtype: torch.dtype, passes: Passes, place: HostPlace) -> HostCase:
    """One case: a layer, which passes, and the dtype of its weights."""
    inputs = draw(op, dtype, place.device)
    shape: dict[str, int | str] = {"pass": passes.which, "rows": ROWS, "d_in": WIDTH}
    shape |= {"d_out": inputs.linear.out_features, "rank": RANK}
    name = str(dtype).removeprefix("torch.")
    computed = name
    if passes.autocast is not None:
        computed = str(passes.autocast).removeprefix("torch.")
        shape["autocast"] = f"autocast {computed}"
    return HostCase(
        op, shape, name,
        callers=list(_callers(op, passes, inputs, place)),
        truth=lambda: _truth(op, passes, inputs),
        tolerance=TOLERANCES[computed],
        targets=_targets(op, passes),
    )  # fmt: skip


def cases(place: HostPlace) -> Iterator[Callable[[], HostCase]]:
    """All cases, not built yet."""
    ways = [(d, Passes(w)) for d in (torch.float32, torch.bfloat16) for w in (FORWARD, BOTH, INFERENCE)]
    ways.append((torch.float32, Passes(BOTH, torch.bfloat16)))
    for op in (LINEAR, SLICES):
        for dtype, passes in ways:
            yield functools.partial(build, op, dtype, passes, place)
