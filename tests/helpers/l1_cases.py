# SPDX-License-Identifier: Apache-2.0
"""Adapters of a model, and the fp64 truth of the l1 norm of their products, whose gradients jump at 0."""

from __future__ import annotations

from typing import Any

import oracles
import torch
from hypothesis import strategies as st
from penalty_cases import Case, make
from strategies import RANKS, Values, dtypes_of, layouts, seeds, widths
from tolerance import accumulation, assert_within, repeats, rounding_bound, sum_bound
from torch import Tensor

from fused_ewclora import functional as FE


def run(case: Case) -> Tensor:
    return FE.l1_penalty(case.lora_as, case.lora_bs, case.scales, case.ewc_lambda, backend=case.backend)


def gradients(case: Case) -> tuple[Tensor, list[Tensor]]:
    value = run(case)
    return value, list(torch.autograd.grad(value, case.leaves()))


@st.composite
def cases(draw: Any, backend: str) -> Case:
    dtype = draw(st.sampled_from(dtypes_of(backend, "l1_penalty")))
    shapes = draw(st.lists(st.tuples(widths, widths, st.sampled_from(RANKS)), min_size=1, max_size=4))
    lam = draw(st.sampled_from((1.0, 0.37, 100.0))) if dtype != torch.float16 else 1.0
    return make(
        Values(draw(seeds), backend), shapes, backend, dtype=dtype, layout=draw(layouts), ewc_lambda=lam
    )


def assert_equals_oracle(case: Case, value: Tensor, grads: list[Tensor], part: float = 0.0) -> None:
    """Sums within their rounding, and elements of B diag(s) A within theirs of 0 may have either sign.

    part: what B s and A lose of themselves, at most, where they are factors of products: D has both, and a
    gradient the sign of D, which loses nothing, and one of them.
    """
    lam, dtype = case.ewc_lambda, case.lora_as[0].dtype
    truth, triples = oracles.l1_penalty(case.lora_as, case.lora_bs, case.scales, lam)
    repeated = repeats(*case.lora_as, *case.lora_bs)
    of_product = (1 + part) ** 2 - 1
    most, checks = torch.zeros((), dtype=torch.float64), []
    for a, b, scale, triple in zip(case.lora_as, case.lora_bs, case.scales, triples, strict=True):
        r, (d_out, d_in) = a.shape[0], (b.shape[0], a.shape[1])
        s, wide_a, wide_b = oracles.per_rank(scale, r), oracles.magnitude(a), oracles.magnitude(b)
        product, sizes = oracles.exact(b) * s @ oracles.exact(a), wide_b * s.abs() @ wide_a
        near = sum_bound(sizes, r, dtype, case.backend, repeated) + of_product * sizes
        either = (product.abs() <= near).double()
        most += lam * sizes.sum()
        ones = torch.ones_like(sizes)

        def of(h: Tensor, s=s, wide_a=wide_a, wide_b=wide_b) -> list[Tensor]:
            h_a = lam * h @ wide_a.T
            return [lam * (wide_b * s.abs()).T @ h, h_a * s.abs(), (wide_b * h_a).sum(0)]

        for i, (found, size, more) in enumerate(zip(triple, of(ones), of(2 * either), strict=True)):
            if i == 2 and not isinstance(scale, Tensor):
                continue
            if i == 2 and scale.dim() == 0:
                found, size, more = found.sum(), size.sum(), more.sum()
            bound = sum_bound(size, d_out + d_in + 2 * r, dtype, case.backend, repeated)
            bound += part * size + (1 + part) * more
            checks.append((found, bound + rounding_bound(found, dtype)))
    assert value.shape == () and value.dtype == accumulation(dtype)
    longest = max(2 * a.shape[0] + a.shape[1] for a in case.lora_as)
    bound = sum_bound(most, longest, dtype, case.backend, repeated) + of_product * most
    assert_within(value, truth, bound, "penalty")
    for leaf, found, (expected, bound) in zip(case.leaves(), grads, checks, strict=True):
        assert found.dtype == leaf.dtype and found.shape == leaf.shape
        assert_within(found, expected, bound, f"gradient of {list(leaf.shape)}")
