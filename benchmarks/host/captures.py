# SPDX-License-Identifier: Apache-2.0
"""What a backward pass costs more when it collects the Fisher, mode "sample"."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fused_ewclora as fe

from ..case import Run, Target
from .case import NOT_COMPARED, Caller, HostCase
from .place import Entry, HostPlace

LAYERS, SAMPLES, TOKENS, WIDTH, RANK = 12, 2, 2, 32, 16
LIMIT = 4e-5  # seconds per layer
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1}  # of squares of gradients that went through 12 layers
WITHOUT = "fused_ewclora, without capture"


class Inputs(NamedTuple):
    """A model of linears with adapters, x `[N, T, d]` and dy."""

    model: Any
    x: Tensor
    dy: Tensor


def draw(dtype: torch.dtype, device: str) -> Inputs:
    """Random inputs; the model is a stack of linears, so that adapters are all that it does."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).to(device, dtype)
    fe.inject(model, fe.LoRAConfig(r=RANK, target_modules="all-linear"))
    with torch.no_grad():
        for layer in fe.adapters(model).values():
            layer.weight.normal_(std=WIDTH**-0.5)
            layer.adapter_parameters()[0][2].normal_(std=0.02)
    x, dy = (torch.randn(SAMPLES, TOKENS, WIDTH, device=device).to(dtype) for _ in range(2))
    return Inputs(model, x.requires_grad_(), dy)


def _step(inputs: Inputs) -> Run:
    leaves = [inputs.x, *(p for p in inputs.model.parameters() if p.requires_grad)]

    def run() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        y = inputs.model(inputs.x)
        y.backward(inputs.dy)
        return [y]

    return run


def _collected(inputs: Inputs, run: Run) -> list[Tensor]:
    """The sums after one call inside a pass, by layer."""
    run()
    captures = [layer.fisher_capture for layer in fe.adapters(inputs.model).values()]
    for capture in captures:
        capture.finish()
    return [sums.fisher for capture in captures for sums in capture.fishers]


@contextlib.contextmanager
def _capturing(ewc: fe.EWC, entry: Entry) -> Iterator[None]:
    # The check of samples is no part of a backward pass, and refuses results that were not computed.
    with entry.using(), ewc.accumulate_fisher(reduction="sum", check_samples=False):
        yield


def exact(inputs: Inputs) -> list[Tensor]:
    """Sums of squared gradients of one sample after the other, in fp64."""
    model, x, dy = copy.deepcopy(inputs.model).double(), inputs.x.detach().double(), inputs.dy.double()
    weights = [layer.weight.requires_grad_() for layer in fe.adapters(model).values()]
    sums = [torch.zeros_like(weight) for weight in weights]
    for n in range(SAMPLES):
        gradients = torch.autograd.grad(model(x[n : n + 1]), weights, dy[n : n + 1])
        for total, gradient in zip(sums, gradients, strict=True):
            total.addcmul_(gradient, gradient)
    return sums


def _callers(inputs: Inputs, place: HostPlace) -> Iterator[Caller]:
    """Ours with a capture on every layer, and without."""
    run, entries = _step(inputs), place.entries()
    for entry in entries:
        ewc = fe.EWC(inputs.model, fisher_mode="sample", check_finite=False)
        yield Caller(
            entry.name, lambda: run, entry.role, entry.backend, "a capture on every layer",
            using=functools.partial(_capturing, ewc, entry), check=lambda: _collected(inputs, run),
            results=entry.results,
        )  # fmt: skip
    first = entries[0]
    yield Caller(
        WITHOUT, lambda: run, "variant", first.backend, "no capture", using=first.using, results=NOT_COMPARED
    )


def build(dtype: torch.dtype, place: HostPlace) -> HostCase:
    """One case, forward and backward of the model."""
    inputs, name = draw(dtype, place.device), str(dtype).removeprefix("torch.")
    shape: dict[str, int | str] = {"layers": LAYERS, "samples": SAMPLES, "tokens": TOKENS, "d_in": WIDTH}
    shape |= {"d_out": WIDTH, "rank": RANK, "mode": "sample"}
    what = f"{LAYERS} layers, fwd+bwd, x one without capture + {1e6 * LIMIT:g} us per layer"
    target = Target(WITHOUT, 1.0, what, allowance=LAYERS * LIMIT)
    return HostCase(
        "fisher_accumulate", shape, name, list(_callers(inputs, place)), lambda: exact(inputs),
        TOLERANCES[name], [target],
    )  # fmt: skip


def cases(place: HostPlace) -> Iterator[Callable[[], HostCase]]:
    """All cases, not built yet."""
    for dtype in (torch.float32, torch.bfloat16):
        yield functools.partial(build, dtype, place)
