# SPDX-License-Identifier: Apache-2.0
"""The penalty of many adapters with its gradients: the op, the functions, and the controller of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora import functional as FE

from .. import ewc_penalty
from ..case import Run, Target
from ..ewc_penalty import EWC_LAMBDA, Inputs, eager, exact, flat, of_op_layer
from ..models import protected
from .case import Caller, HostCase
from .place import Entry, HostPlace

ADAPTERS = (24, 48, 96)
TARGET_ADAPTERS = 48  # qkv, proj, fc1 and fc2 of ViT-B
WIDTH, RANK = 32, 16
TOLERANCE = ewc_penalty.TOLERANCES["highest"]
OP, FUNCTION, IN_PLACE, MODEL = "the op", "ewc_penalty + backward", "ewc_penalty_grad_", "add_penalty_grad_"
LIMITS = {FUNCTION: 3e-4, MODEL: 1e-4}  # seconds
EAGER = "eager autograd"


def draw(adapters: int, device: str) -> Inputs:
    """Random inputs in fp32."""
    return Inputs(
        [torch.rand(WIDTH, WIDTH, device=device) for _ in range(adapters)],
        [torch.randn(RANK, WIDTH, device=device).mul_(0.1).requires_grad_() for _ in range(adapters)],
        [torch.randn(WIDTH, RANK, device=device).mul_(0.1).requires_grad_() for _ in range(adapters)],
    )


def _dropping(leaves: list[Tensor], penalty: Callable[[], Tensor]) -> Run:
    """Penalty and backward; gradients are made anew, as in a step after `zero_grad`."""

    def run() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        loss = penalty()
        loss.backward()
        return [loss]

    return run


def _adding(add: Callable[[], Tensor]) -> Run:
    """Adds to the gradients that are there, as after the backward pass of a loss."""
    return lambda: [add()]


def _checked(run: Run, leaves: list[Tensor]) -> list[Tensor]:
    """Value and gradients of one call."""
    for leaf in leaves:
        leaf.grad = None
    value = run()[0]
    return [value, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def controller(inputs: Inputs) -> tuple[fe.EWC, list[Tensor]]:
    """A controller of a model with these adapters and Fishers, and its A and B, all A first."""
    device = inputs.fishers[0].device
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, device=device) for _ in inputs.fishers))
    fe.inject(model, fe.LoRAConfig(r=RANK, target_modules="all-linear"))
    pairs = [layer.adapter_parameters()[0][1:] for layer in fe.adapters(model).values()]
    leaves: list[Tensor] = [a for a, _ in pairs]
    leaves += [b for _, b in pairs]
    with torch.no_grad():
        for leaf, value in zip(leaves, [*inputs.lora_as, *inputs.lora_bs], strict=True):
            leaf.copy_(value)
    return protected(model, inputs.fishers), leaves


def _ours(call: str, inputs: Inputs, entry: Entry) -> Caller:
    leaves = [*inputs.lora_as, *inputs.lora_bs]
    run: Run
    if call == OP:
        run = of_op_layer(inputs, entry.backend)
        return _caller(entry, run, run)
    if call == FUNCTION:
        run = _dropping(leaves, lambda: FE.ewc_penalty(*inputs, None, EWC_LAMBDA))
    elif call == IN_PLACE:
        run = _adding(lambda: FE.ewc_penalty_grad_(*inputs, None, EWC_LAMBDA))
    else:
        ewc, leaves = controller(inputs)
        run = _adding(ewc.add_penalty_grad_)
    return _caller(entry, run, lambda: _checked(run, leaves))


def _caller(entry: Entry, run: Run, check: Run) -> Caller:
    return Caller(
        entry.name, lambda: run, entry.role, entry.backend, using=entry.using, check=check,
        results=entry.results,
    )  # fmt: skip


def _peer(inputs: Inputs) -> Caller:
    leaves = [*inputs.lora_as, *inputs.lora_bs]
    run = _dropping(leaves, lambda: eager(*inputs))
    return Caller(EAGER, lambda: run, check=lambda: _checked(run, leaves))


def build(adapters: int, call: str, place: HostPlace) -> HostCase:
    """One case: how many adapters, and which call."""
    inputs = draw(adapters, place.device)

    def truth() -> list[Tensor]:
        return flat(exact(inputs)) if call == OP else exact(inputs)

    def peer() -> Caller:
        if call != OP:
            return _peer(inputs)
        made: Any = _peer(inputs)
        check = made.check
        return Caller(EAGER, made.make, check=lambda: flat(check()))

    targets = []
    if adapters == TARGET_ADAPTERS and call in LIMITS:
        limit = LIMITS[call]
        targets.append(
            Target(None, 0.0, f"{call}, {adapters} adapters, / {1e3 * limit:g} ms", allowance=limit)
        )
    return HostCase(
        "ewc_penalty", {"call": call, "adapters": adapters, "d_in": WIDTH, "d_out": WIDTH, "rank": RANK},
        "float32", [*(_ours(call, inputs, entry) for entry in place.entries()), peer()], truth, TOLERANCE,
        targets,
    )  # fmt: skip


def cases(place: HostPlace) -> Iterator[Callable[[], HostCase]]:
    """All cases, not built yet."""
    for call in (OP, FUNCTION, IN_PLACE, MODEL):
        for adapters in ADAPTERS:
            yield functools.partial(build, adapters, call, place)
