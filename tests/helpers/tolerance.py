# SPDX-License-Identifier: Apache-2.0
"""Error bounds that are derived, and printed when they do not hold.

A sum of n products with unit roundoff u = eps / 2 misses its exact value by at most n u times the sum of
absolute values; roundings of random sign add up to lambda sqrt(n) u with overwhelming probability (Higham &
Mary, 2019). `sum_bound` takes lambda = 4, plus one rounding for each of the few operations after the sum.

Backends that use matrix units add two terms. Sums of fp32 products come from tf32 parts of their factors
(`TF32X3`), and low-rank factors are rounded to the dtype of 16-bit activations first (`operand_bound`).
"""

from __future__ import annotations

import math

import torch
from strategies import ON_GPU, device_of, family
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}
TINY = {dtype: torch.finfo(dtype).smallest_normal for dtype in EPS}
SPACING = {dtype: TINY[dtype] * EPS[dtype] for dtype in EPS}  # of subnormal numbers


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in beside tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# fp32 on matrix units at torch's precision "highest": a factor becomes two tf32 numbers of 11 significant
# bits. Cutting them off loses up to 2^-10 of the factor, then 2^-10 of that; the product of the two second
# parts is left out. So 2^-20 for each factor and for what is left out, and as much for sums that are cut off
# rather than rounded in the unit.
TF32X3 = 4 * 2.0**-20
CHAIN = 2  # products in the longest chain of any operation: (x A^T) B^T, or ((B A) F) A^T


def on_matrix_units(backend: str) -> bool:
    """Triton's interpreter computes in fp32; the emulator of CUDA rounds as the hardware does."""
    return family(backend) == "cuda" or (family(backend) == "triton" and device_of(backend) == "cuda")


def repeats(*tensors: Tensor) -> bool:
    """Whether rows are the same memory over and over: sums over them then repeat one rounding as well."""
    return any(0 in t.stride() for t in tensors)


def sum_bound(
    magnitude: Tensor, length: int, dtype: torch.dtype, backend: str = "reference", repeated: bool = False
) -> Tensor:
    """Error of sums of `length` products, kept in the accumulation dtype of `dtype`.

    magnitude: the sums of the products' absolute values. `repeated`: terms are equal, so that roundings may
    all have one sign and add up to length eps / 2.
    """
    acc = accumulation(dtype)
    steps = 2.0 * math.sqrt(max(length, 1)) + 4.0
    roundoff = EPS[acc] * (max(steps, 0.5 * length + 4.0) if repeated else steps)
    if on_matrix_units(backend):
        roundoff += CHAIN * TF32X3
    return roundoff * magnitude + TINY[acc]


def assert_same_factors(actual: Tensor, expected: Tensor, backend: str) -> None:
    """Dropout factors that went through products with the identity: the same zeros, and the same bits where
    those products are fp32."""
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    assert torch.equal(actual != 0, expected != 0), "other elements are dropped"
    roundoff = CHAIN * TF32X3 if on_matrix_units(backend) else 0.0
    assert_within(actual, expected.double(), roundoff * expected.double(), "factors")


def rounding_bound(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Error of one rounding to `dtype`: half a unit in the last place, or half a subnormal's spacing."""
    return 0.5 * EPS[dtype] * value.abs() + 0.5 * SPACING[dtype]


def rounds_operands(backend: str, dtype: torch.dtype) -> bool:
    """Whether the low-rank factors and z and u enter products in the dtype of 16-bit activations."""
    return family(backend) in ON_GPU and dtype in (torch.bfloat16, torch.float16)


def operand_bound(magnitude: Tensor, roundings: int, dtype: torch.dtype) -> Tensor:
    """Error of a chain of products of which `roundings` operands are rounded to `dtype`: each by up to
    eps / 2 of itself. Operands in `magnitude` are at least `TINY`, below which roundings stay as large."""
    return ((1.0 + 0.5 * EPS[dtype]) ** roundings - 1.0) * magnitude


def assert_within(actual: Tensor, exact: Tensor, bound: Tensor | float, what: str) -> None:
    """|actual - exact| <= bound elementwise; NaN and Inf never pass."""
    assert actual.shape == exact.shape, f"{what}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    if actual.numel() == 0:
        return
    value = actual.detach().cpu().to(torch.float64)
    bound = torch.as_tensor(bound, dtype=torch.float64).expand(exact.shape)
    error = (value - exact).abs()
    excess = torch.where(torch.isfinite(value), error - bound, torch.inf)
    if bool((excess > 0).any()):
        worst = int(excess.flatten().argmax())
        where = [int(i) for i in torch.unravel_index(torch.tensor(worst), exact.shape)]
        raise AssertionError(
            f"{what}: {int((excess > 0).sum())} of {exact.numel()} elements out of bounds; worst at {where}: "
            f"got {value.flatten()[worst]:.9g}, exact {exact.flatten()[worst]:.9g}, error "
            f"{error.flatten()[worst]:.3g} > bound {bound.flatten()[worst]:.3g}"
        )


def assert_as_good(actual: Tensor, plain: Tensor, exact: Tensor, bound: Tensor, what: str) -> None:
    """The largest error is at most twice that of PyTorch's own `plain`, plus the largest derived `bound`."""
    own = (plain.detach().cpu().to(torch.float64) - exact).abs()
    assert bool(torch.isfinite(own).all()), f"{what}: PyTorch's own result is not finite"
    limit = 2.0 * (own.max() if own.numel() else 0.0) + (bound.max() if bound.numel() else 0.0)
    assert_within(actual, exact, float(limit), f"{what} (twice PyTorch's own error plus {float(limit):.3g})")


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the error over that of `exact`."""
    return float((actual.detach().cpu().to(torch.float64) - exact).norm() / exact.norm())
