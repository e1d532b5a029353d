# SPDX-License-Identifier: Apache-2.0
"""Random calls of the LoRA linear, their fp64 truth, and how far from it a correct implementation may be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import oracles
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from strategies import (
    LOW_PRECISION,
    RANKS,
    Values,
    dtypes_of,
    layouts,
    leading_shapes,
    refused_linear,
    row_ranges,
    seeds,
    widths,
)
from tolerance import (
    TINY,
    assert_as_good,
    assert_within,
    operand_bound,
    repeats,
    rounding_bound,
    rounds_operands,
    sum_bound,
)
from torch import Tensor

from fused_ewclora import functional as FE

SCALES = ("float", "0-d", "[r]")


@dataclass(repr=False)
class Case:
    """One call of the LoRA linear and the gradient of its output."""

    backend: str
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    adapters: list[FE.Adapter]
    dy: Tensor
    dropout_p: float = 0.0
    seed: int = 0

    def __repr__(self) -> str:
        def told(t: Any) -> str:
            return f"{list(t.shape)} {t.dtype} {t.stride()}" if isinstance(t, Tensor) else str(t)

        adapters = "; ".join(", ".join(map(told, adapter)) for adapter in self.adapters)
        tensors = {"x": self.x, "weight": self.weight, "bias": self.bias, "dy": self.dy}
        named = ", ".join(f"{name} {told(t)}" for name, t in tensors.items())
        return f"<{self.backend}: {named}, adapters {adapters}, p {self.dropout_p}, seed {self.seed}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis prints dataclasses by their fields otherwise

    def run(self, backend: str | None = None) -> Tensor:
        return FE.lora_linear_adapters(
            self.x, self.weight, self.bias, self.adapters, dropout_p=self.dropout_p, training=True,
            seed=self.seed, backend=backend or self.backend,
        )  # fmt: skip

    def leaves(self) -> dict[str, Tensor]:
        """Differentiable inputs by name."""
        named: dict[str, Any] = {"x": self.x, "weight": self.weight, "bias": self.bias}
        for i, adapter in enumerate(self.adapters):
            named |= {f"A{i}": adapter.lora_a, f"B{i}": adapter.lora_b, f"s{i}": adapter.scale}
        return {name: t for name, t in named.items() if isinstance(t, Tensor) and t.requires_grad}

    def gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.run()
        leaves = self.leaves()
        return y, dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), self.dy), strict=True))

    def mask(self) -> Tensor | None:
        rows = self.x.numel() // self.x.shape[-1]
        return oracles.dropout_mask(self.seed, rows, self.x.shape[-1], self.dropout_p)

    def magnitudes(self) -> Case:
        """The same call on absolute values in fp64."""
        adapters = [
            FE.Adapter(*(oracles.magnitude(t) for t in (a.lora_a, a.lora_b, a.scale)), a.rows)
            for a in self.adapters
        ]
        bias = None if self.bias is None else oracles.magnitude(self.bias)
        x, weight, dy = (oracles.magnitude(t) for t in (self.x, self.weight, self.dy))
        return replace(self, x=x, weight=weight, bias=bias, adapters=adapters, dy=dy)


def parameter(tensor: Tensor) -> Tensor:
    """A leaf with the strides of `tensor`."""
    return tensor.detach().requires_grad_(True)


def make_scale(values: Values, kind: str, rank: int, dtype: torch.dtype) -> float | Tensor:
    if kind == "float":
        return 0.75
    return parameter(values.normal(*(() if kind == "0-d" else (rank,)), dtype=dtype))


@st.composite
def cases(draw: Any, backend: str, dropout: bool = False) -> Case:
    """Any shape, rank, dtype, stride, kind of bias and of scale, and one or more adapters on any rows."""
    dtype = draw(st.sampled_from(dtypes_of(backend, "lora_linear")))
    master = draw(st.sampled_from((dtype, torch.float32))) if dtype in LOW_PRECISION else dtype
    values = Values(draw(seeds), backend)
    d_in, d_out, leading = draw(widths), draw(widths), draw(leading_shapes)
    ranges = draw(row_ranges(d_out)) if draw(st.booleans()) else [((0, d_out),)]
    adapters, total = [], 0
    for rows in ranges:
        served = [r for r in RANKS if refused_linear(backend, total + r, dropout) is None]
        if not served:  # the rows of the other adapters belong to nobody
            break
        rank, owned = draw(st.sampled_from(served)), sum(stop - start for start, stop in rows)
        total += rank
        a = parameter(values.normal(rank, d_in, dtype=master, std=d_in**-0.5, layout=draw(layouts)))
        b = parameter(values.normal(owned, rank, dtype=master, std=rank**-0.5, layout=draw(layouts)))
        scale = make_scale(values, draw(st.sampled_from(SCALES)), rank, master)
        adapters.append(FE.Adapter(a, b, scale, rows))
    bias = values.normal(d_out, dtype=dtype) if draw(st.booleans()) else None
    if bias is not None and draw(st.booleans()):
        bias = parameter(bias)
    weight = values.normal(d_out, d_in, dtype=dtype, std=d_in**-0.5, layout=draw(layouts))
    x = parameter(values.normal(*leading, d_in, dtype=dtype, layout=draw(layouts)))
    dy = values.normal(*leading, d_out, dtype=dtype, layout=draw(layouts))
    p = draw(st.sampled_from((0.1, 0.5, 0.7, 1.0))) if dropout else 0.0
    weight = parameter(weight) if draw(st.booleans()) else weight
    return Case(backend, x, weight, bias, adapters, dy, p, draw(st.integers(-(2**63), 2**63 - 1)))


def plain(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """PyTorch's own composition in the dtype of x, and its gradients; no dropout."""
    dtype = case.x.dtype
    y = F.linear(case.x, case.weight, case.bias).clone()
    for a, b, scale, rows in case.adapters:
        s = scale.to(dtype) if isinstance(scale, Tensor) else scale
        low_rank = ((case.x @ a.to(dtype).T) * s) @ b.to(dtype).T
        done = 0
        for start, stop in rows:
            y[..., start:stop] += low_rank[..., done : done + stop - start]
            done += stop - start
    leaves = case.leaves()
    return y, dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), case.dy), strict=True))


def operand_roundings(case: Case) -> dict[str, Tensor]:
    """What rounding the operands of low-rank products to the dtype of x may add to y ("y") and to the
    gradients by name. Rounded are A, s B, z = x A^T, u = dy (s B), and x where dropout scales it."""
    wide, mask, dtype = case.magnitudes(), case.mask(), case.x.dtype
    x, dy = wide.x.reshape(-1, case.x.shape[-1]), wide.dy.reshape(-1, case.dy.shape[-1])
    dropped = 0 if mask is None else 1
    kept = torch.ones_like(x) if mask is None else mask
    branch = x if mask is None else (x * mask).clamp_min(TINY[dtype])
    y, dx, bounds = torch.zeros_like(dy), torch.zeros_like(x), {}
    for i, (a, b, scale, rows) in enumerate(wide.adapters):
        s = oracles.per_rank(scale, a.shape[0])
        a, scaled_b = a.clamp_min(TINY[dtype]), (b * s).clamp_min(TINY[dtype])
        columns = torch.cat([torch.arange(start, stop) for start, stop in rows])
        g = dy[:, columns]
        z, u = (branch @ a.T).clamp_min(TINY[dtype]), (g @ scaled_b).clamp_min(TINY[dtype])
        y[:, columns] += z @ scaled_b.T
        dx += (u @ a) * kept
        ds = (b * (g.T @ z)).sum(0)
        ds = ds.sum() if isinstance(scale, Tensor) and scale.dim() == 0 else ds
        for name, magnitude in ((f"A{i}", u.T @ branch), (f"B{i}", g.T @ z * s), (f"s{i}", ds)):
            bounds[name] = operand_bound(magnitude, 2 + dropped, dtype)
    bounds["y"] = operand_bound(y, 3 + dropped, dtype).reshape(case.dy.shape)
    bounds["x"] = operand_bound(dx, 3, dtype).reshape(case.x.shape)
    return bounds


def assert_output(case: Case, y: Tensor) -> None:
    """y to one rounding of its dtype; low-rank term and bias may have been rounded once on the way."""
    dtype, mask = case.x.dtype, case.mask()
    exact = oracles.lora_linear(case.x, case.weight, case.bias, case.adapters, mask)
    wide = case.magnitudes()
    length = case.weight.shape[1] + sum(a.lora_a.shape[0] for a in case.adapters)
    magnitude = oracles.lora_linear(wide.x, wide.weight, wide.bias, wide.adapters, mask)
    repeated = repeats(case.x, case.weight, *(t for a in case.adapters for t in (a.lora_a, a.lora_b)))
    bound = sum_bound(magnitude, length, dtype, case.backend, repeated) + rounding_bound(exact, dtype)
    if rounds_operands(case.backend, dtype):
        bound = bound + operand_roundings(case)["y"]
    assert y.dtype == dtype
    if dtype not in LOW_PRECISION or mask is not None:
        if mask is not None:
            seed_term = exact - oracles.lora_linear(case.x, case.weight, None, [])
            bound = bound + 2.0 * rounding_bound(seed_term.abs() + exact.abs(), dtype)
        return assert_within(y, exact, bound, "y")
    seed_term = exact - oracles.lora_linear(case.x, case.weight, None, [])
    return assert_as_good(y, plain(case)[0], exact, bound + rounding_bound(seed_term, dtype), "y")


def assert_gradients(case: Case, grads: dict[str, Tensor]) -> None:
    """Gradients have their leaf's dtype; those of adapters and bias are summed in fp32 whatever it is."""
    dtype, mask, wide = case.x.dtype, case.mask(), case.magnitudes()
    exact = oracles.lora_linear_gradients(case.dy, case.x, case.weight, case.adapters, mask)
    scale = oracles.lora_linear_gradients(wide.dy, wide.x, wide.weight, wide.adapters, mask)
    rows = case.x.numel() // case.x.shape[-1]
    d_out, d_in = case.weight.shape
    total_rank = sum(a.lora_a.shape[0] for a in case.adapters)
    table = {
        "x": (exact.x, scale.x, 2 * d_out + total_rank),
        "weight": (exact.weight, scale.weight, rows),
        "bias": (exact.bias, scale.bias, rows),
    }
    for i, adapter in enumerate(case.adapters):
        (da, db, ds), (wa, wb, ws) = exact.adapters[i], scale.adapters[i]
        if isinstance(adapter.scale, Tensor) and adapter.scale.dim() == 0:
            ds, ws = ds.sum(), ws.sum()
        table |= {f"A{i}": (da, wa, rows + d_out), f"B{i}": (db, wb, rows + d_in)}
        table[f"s{i}"] = (ds, ws, rows + d_out + d_in)
    low_precision = dtype in LOW_PRECISION
    own = plain(case)[1] if low_precision and mask is None else {}
    repeated = repeats(
        case.x, case.dy, case.weight, *(t for a in case.adapters for t in (a.lora_a, a.lora_b))
    )
    rounded = operand_roundings(case) if rounds_operands(case.backend, dtype) else {}
    for name, grad in grads.items():
        truth, magnitude, length = table[name]
        leaf = case.leaves()[name]
        assert grad.dtype == leaf.dtype, f"gradient of {name} has dtype {grad.dtype}, not {leaf.dtype}"
        bound = sum_bound(magnitude, length, dtype, case.backend, repeated) + rounding_bound(
            truth, leaf.dtype
        )
        bound = bound + rounded.get(name, 0.0)
        if name == "x" and low_precision:
            seed_term = truth - oracles.lora_linear_gradients(case.dy, case.x, case.weight, [], None).x
            bound = bound + 2.0 * rounding_bound(seed_term.abs(), dtype)
        if name in ("x", "weight") and name in own:
            assert_as_good(grad, own[name], truth, bound, f"gradient of {name}")
        else:
            assert_within(grad, truth, bound, f"gradient of {name}")
