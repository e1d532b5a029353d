# SPDX-License-Identifier: Apache-2.0
"""Penalties of Fishers in 8 bits, of row and column sums and of Kronecker factors, and their fp64 truth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import oracles
import torch
from hypothesis import strategies as st
from penalty_cases import Case, assert_equals_oracle, make
from strategies import BACKENDS, RANKS, Values, dtypes_of, layouts, seeds, widths, with_layout
from tolerance import TF32X3, assert_within, on_matrix_units, repeats, rounding_bound, sum_bound
from torch import Tensor

from fused_ewclora.fishers import EightBitFisher, FactoredFisher, Fisher, KroneckerFisher
from fused_ewclora.ops.dispatch import candidates

OPS = {"8 bits": "ewc_penalty", "factored": "factored_penalty", "kronecker": "kronecker_penalty"}
KINDS = tuple(OPS)


def implements(backend: str, op: str) -> bool:
    """Whether the backend has an implementation of its own."""
    return any(candidate.backend == backend for candidate in candidates(op))


def reads(backend: str, kind: str) -> bool:
    """Whether the backend computes the penalty of this kind of Fisher; codes of 8 bits came to the backends
    together with row and column sums."""
    return implements(backend, "factored_penalty" if kind == "8 bits" else OPS[kind])


SERVED = [(backend, kind) for backend in BACKENDS for kind in KINDS if reads(backend, kind)]
# Products of a penalty that follow one another beyond those of a dense F: G B, B^T (G B), A C, (A C) A^T, M N
MORE_PRODUCTS = 3


def fisher_of(
    kind: str, values: Values, d_out: int, d_in: int, dtype: torch.dtype, layout: str = "contiguous"
) -> Fisher:
    """A Fisher of one kind with random values; what lies between strided elements spoils every sum."""
    if kind == "8 bits":
        codes = EightBitFisher.encode(values.fisher(d_out, d_in)).codes
        if layout != "contiguous":  # rows stay whole, apart by multiples of 16 bytes
            between = codes.new_full((d_out, codes.shape[1] + 48), 255)
            codes = between[:, 16:-32].copy_(codes)
        return EightBitFisher(codes, d_in)
    if kind == "factored":
        layout = "contiguous" if layout == "expanded" else layout
        return FactoredFisher(*(values.fisher(n, dtype=dtype, layout=layout) for n in (d_out, d_in)))
    factors = []
    for n in (d_out, d_in):
        rows = values.normal(5, n, dtype=torch.float64)
        factor = (rows.T @ rows).to(dtype)
        factors.append(with_layout(factor, "contiguous" if layout == "expanded" else layout))
    return KroneckerFisher(*factors)


def make_structured(
    kind: str, values: Values, shapes: list[tuple[int, int, int]], backend: str, **options: Any
) -> Case:
    """As `penalty_cases.make`, with Fishers of one kind."""
    case = make(values, shapes, backend, **options)
    dtype, layout = options.get("fisher_dtype", torch.float32), options.get("layout", "contiguous")
    case.fishers = [fisher_of(kind, values, d_out, d_in, dtype, layout) for d_out, d_in, _ in shapes]  # type: ignore[misc]
    return case


@st.composite
def structured_cases(draw: Any, backend: str, kind: str) -> Case:
    dtype = draw(st.sampled_from(dtypes_of(backend, OPS[kind])))
    kinds = (torch.float64, torch.float32) if dtype == torch.float64 else (torch.float32,)
    shapes = draw(st.lists(st.tuples(widths, widths, st.sampled_from(RANKS)), min_size=1, max_size=4))
    options = {"layout": draw(layouts), "fisher_dtype": draw(st.sampled_from(kinds)), "dtype": dtype}
    strengths = (1.0, 0.37, 1e4) if dtype != torch.float16 else (2.0**-8,)  # gradients below 65504
    lam = draw(st.sampled_from(strengths))
    return make_structured(kind, Values(draw(seeds), backend), shapes, backend, ewc_lambda=lam, **options)


def matrices(fisher: FactoredFisher | KroneckerFisher) -> tuple[Tensor, Tensor]:
    """G and C in fp64."""
    outputs, inputs = map(oracles.exact, fisher)
    if isinstance(fisher, KroneckerFisher):
        return outputs, inputs
    total = inputs.sum()
    return outputs.diag(), (inputs / total if total > 0 else torch.zeros_like(inputs)).diag()


def assert_structured(case: Case, value: Tensor, grads: list[Tensor]) -> None:
    """Value and gradients equal those of the dense formulas in fp64."""
    if isinstance(case.fishers[0], EightBitFisher):
        dense = [fisher.dense() for fisher in case.fishers]  # type: ignore[attr-defined]
        assert_equals_oracle(replace(case, fishers=dense), value, grads)
        return
    pairs = [matrices(fisher) for fisher in case.fishers]  # type: ignore[arg-type]
    arguments = (case.lora_as, case.lora_bs, case.scales)
    exact, exact_grads = oracles.kronecker_penalty(pairs, *arguments, case.ewc_lambda)
    wide = [list(map(oracles.magnitude, argument)) for argument in arguments]
    magnitudes = [(g.abs(), c.abs()) for g, c in pairs]
    most, most_grads = oracles.kronecker_penalty(magnitudes, *wide, case.ewc_lambda)
    dtype = case.lora_as[0].dtype
    repeated = repeats(*case.lora_as, *case.lora_bs)

    def bound(magnitude: Tensor, length: int) -> Tensor:
        more = MORE_PRODUCTS * TF32X3 * magnitude if on_matrix_units(case.backend) else 0.0
        return sum_bound(magnitude, length, dtype, case.backend, repeated) + more

    lengths = [2 * (b.shape[0] + a.shape[1] + a.shape[0]) for a, b in zip(*arguments[:2], strict=True)]
    assert value.shape == () and value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_within(value, exact, bound(most, max(lengths)), "penalty")
    checks = []
    for scale, truths, sizes, length in zip(case.scales, exact_grads, most_grads, lengths, strict=True):
        pair = list(zip(truths, sizes, strict=True))[: 3 if isinstance(scale, Tensor) else 2]
        if isinstance(scale, Tensor) and scale.dim() == 0:
            pair[2] = (pair[2][0].sum(), pair[2][1].sum())
        checks += [(truth, bound(size, length) + rounding_bound(truth, dtype)) for truth, size in pair]
    for leaf, grad, (truth, within) in zip(case.leaves(), grads, checks, strict=True):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
        assert_within(grad, truth, within, f"gradient of {list(leaf.shape)}")
