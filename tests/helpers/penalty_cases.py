# SPDX-License-Identifier: Apache-2.0
"""Adapters of a model with their Fishers, and the fp64 truth of their penalty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import oracles
import torch
from hypothesis import strategies as st
from strategies import RANKS, Values, dtypes_of, layouts, seeds, widths
from tolerance import assert_within, repeats, rounding_bound, sum_bound
from torch import Tensor

from fused_ewclora import functional as FE

# (d_out, d_in, r): ragged, and large enough that threads share matrices and split in the middle of them
BIG = [(300, 200, 4), (37, 131, 30), (250, 190, 10), (1, 1, 1), (64, 512, 7), (13, 700, 70)]


@dataclass(repr=False)
class Case:
    """Adapters of one model with their Fishers."""

    backend: str
    fishers: list[Tensor]
    lora_as: list[Tensor]
    lora_bs: list[Tensor]
    scales: list[float | Tensor]
    ewc_lambda: float = 1.0

    def __repr__(self) -> str:
        parts = [f if isinstance(f, tuple) else (f,) for f in self.fishers]  # structures are named tuples
        tensors = [[t for t in some if isinstance(t, Tensor)] for some in parts]
        fishers = [[(list(t.shape), t.dtype, t.stride()) for t in some] for some in tensors]
        told = [(a.shape[0], a.dtype, a.stride()) for a in self.lora_as]
        return f"<{self.backend}: lambda {self.ewc_lambda}, Fishers {fishers}, adapters {told}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis prints dataclasses by their fields otherwise

    def run(self, **changed: Any) -> Tensor:
        names = ("fishers", "lora_as", "lora_bs", "scales", "ewc_lambda")
        arguments = {name: changed.get(name, getattr(self, name)) for name in names}
        return FE.ewc_penalty(**arguments, backend=self.backend)

    def leaves(self) -> list[Tensor]:
        flat = [t for triple in zip(self.lora_as, self.lora_bs, self.scales, strict=True) for t in triple]
        return [t for t in flat if isinstance(t, Tensor) and t.requires_grad]

    def gradients(self) -> tuple[Tensor, list[Tensor]]:
        value = self.run()
        return value, list(torch.autograd.grad(value, self.leaves()))


def make(values: Values, shapes: list[tuple[int, int, int]], backend: str, **options: Any) -> Case:
    """Adapters of (d_out, d_in, r); scale kinds alternate between float, 0-d and [r]."""
    dtype, kind = options.get("dtype", torch.float32), options.get("fisher_dtype", torch.float32)
    case = Case(backend, [], [], [], [], options.get("ewc_lambda", 1.0))
    for i, (d_out, d_in, r) in enumerate(shapes):
        layout = options.get("layout", "contiguous")
        case.fishers.append(
            values.fisher(d_out, d_in, layout=options.get("fisher_layout", layout), dtype=kind)
        )
        a = values.normal(r, d_in, dtype=dtype, std=0.3, layout=layout)
        b = values.normal(d_out, r, dtype=dtype, std=0.3, layout=layout)
        case.lora_as.append(a.detach().requires_grad_())
        case.lora_bs.append(b.detach().requires_grad_())
        scale = values.normal(r, dtype=dtype) if i % 3 == 2 else values.normal(1, dtype=dtype)[0]
        case.scales.append(0.5 if i % 3 == 0 else scale.detach().requires_grad_())
    return case


@st.composite
def cases(draw: Any, backend: str) -> Case:
    dtype = draw(st.sampled_from(dtypes_of(backend, "ewc_penalty")))
    kinds = (torch.float32, torch.bfloat16) if dtype != torch.float64 else (torch.float64, torch.float32)
    shapes = draw(st.lists(st.tuples(widths, widths, st.sampled_from(RANKS)), min_size=1, max_size=6))
    options = {"layout": draw(layouts), "fisher_dtype": draw(st.sampled_from(kinds)), "dtype": dtype}
    strengths = (1.0, 0.37, 1e4, 1e7) if dtype != torch.float16 else (2.0**-4,)  # gradients below 65504
    lam = draw(st.sampled_from(strengths))
    return make(Values(draw(seeds), backend), shapes, backend, ewc_lambda=lam, **options)


def assert_equals_oracle(case: Case, value: Tensor, grads: list[Tensor]) -> None:
    arguments = (case.fishers, case.lora_as, case.lora_bs, case.scales)
    exact, exact_grads = oracles.ewc_penalty(*arguments, case.ewc_lambda)
    wide, wide_grads = oracles.ewc_penalty(
        *[list(map(oracles.magnitude, a)) for a in arguments], case.ewc_lambda
    )
    dtype = case.lora_as[0].dtype
    repeated = repeats(*case.fishers, *case.lora_as, *case.lora_bs)
    longest = max(2 * a.shape[0] + a.shape[1] for a in case.lora_as)
    assert value.shape == () and value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_within(value, exact, sum_bound(wide, longest, dtype, case.backend, repeated), "penalty")
    checks = []
    for i, (scale, triple) in enumerate(zip(case.scales, exact_grads, strict=True)):
        length = sum(case.fishers[i].shape) + 2 * case.lora_as[i].shape[0]
        pairs = list(zip(triple, wide_grads[i], strict=True))[: 3 if isinstance(scale, Tensor) else 2]
        if isinstance(scale, Tensor) and scale.dim() == 0:
            pairs[2] = (pairs[2][0].sum(), pairs[2][1].sum())
        for truth, magnitude in pairs:
            checks.append((truth, sum_bound(magnitude, length, dtype, case.backend, repeated)))
    for leaf, grad, (truth, bound) in zip(case.leaves(), grads, checks, strict=True):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
        assert_within(grad, truth, bound + rounding_bound(truth, dtype), f"gradient of {list(leaf.shape)}")
