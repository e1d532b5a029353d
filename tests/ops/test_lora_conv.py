# SPDX-License-Identifier: Apache-2.0
"""The LoRA convolution equals the convolution with W + B diag(s) A, in values and in all derivatives,
whatever its windows, memory format and dtype are."""

from __future__ import annotations

import functools
import warnings

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from conv_cases import LINE, ODD, PATCH, POINT, THREE, conv, geometries
from hypothesis import given
from hypothesis import strategies as st
from tolerance import EPS, assert_within
from torch import Tensor

from fused_ewclora import functional as FE
from fused_ewclora.errors import ArgumentError, DtypeError
from fused_ewclora.functional import Adapter, Geometry

WIDE = torch.float64
LAST = torch.channels_last


def drawn(
    geometry: Geometry,
    sizes: tuple[int, ...],
    images: int = 2,
    dtype=WIDE,
    channels: tuple[int, int] = (3, 5),
) -> list[Tensor]:
    """x, W, bias, A, B, s that require gradients."""
    (c, out), r = channels, 2
    shapes = [(images, c, *sizes), (out, c, *geometry.kernel), (out,)]
    columns = c * torch.Size(geometry.kernel).numel()
    shapes += [(r, columns), (out, r), (r,)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def adapted(
    geometry: Geometry, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: Tensor
) -> Tensor:
    return FE.lora_conv_adapters(x, w, bias, [Adapter(a, b, s, ((0, w.shape[0]),))], geometry)


def dense(
    geometry: Geometry, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: Tensor
) -> Tensor:
    return conv(x, w + ((b * s) @ a).view_as(w), bias, geometry)


def in_format(x: Tensor, last: bool) -> Tensor:
    """The same values with the channels last in memory."""
    moved = x.detach().movedim(1, -1).contiguous().movedim(-1, 1) if last else x.detach().contiguous()
    return moved.requires_grad_()


@given(geometries(), st.booleans(), st.booleans(), st.integers(0, 3))
def test_equals_dense(drawn_geometry, last, weight_last, images):
    """Output and every gradient are those of the dense convolution, the output in its memory format."""
    geometry, sizes = drawn_geometry
    x, w, *rest = drawn(geometry, sizes, images)
    x, w = in_format(x, last), in_format(w, weight_last)
    y, expected = adapted(geometry, x, w, *rest), dense(geometry, x, w, *rest)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    if not weight_last:
        plain = conv(x, w, None, geometry)
        assert y.is_contiguous() or not plain.is_contiguous()
        assert (
            y.dim() == 3 or y.is_contiguous(memory_format=LAST) or not plain.is_contiguous(memory_format=LAST)
        )
    dy = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(y, (x, w, *rest), dy),
        torch.autograd.grad(expected, (x, w, *rest), dy),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("geometry", [THREE, ODD, POINT, PATCH])
@pytest.mark.parametrize("needed", range(6))
def test_single_gradients(geometry, needed):
    """A gradient that is asked for alone, as with everything else frozen."""
    values = [value.detach() for value in drawn(geometry, (6, 6))]
    values[needed].requires_grad_()
    grads = [
        torch.autograd.grad(run(geometry, *values).square().sum(), values[needed])[0]
        for run in (adapted, dense)
    ]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("geometry", [THREE, POINT, PATCH])
def test_row_slices(geometry):
    """Adapters of their own ranks on ranges of the output channels, one of them with two ranges."""
    x, w, bias, a, b, s = drawn(geometry, (6, 6))
    other = torch.randn(3, a.shape[1], dtype=WIDE, requires_grad=True)
    up = torch.randn(1, 3, dtype=WIDE, requires_grad=True)
    adapters = [Adapter(a, b[:3], s, ((3, 5), (0, 1))), Adapter(other, up, 0.5, ((2, 3),))]
    y = FE.lora_conv_adapters(x, w, bias, adapters, geometry)
    delta = torch.zeros(5, a.shape[1], dtype=WIDE)
    first = (b[:3] * s) @ a
    delta = torch.cat([first[2:], delta[:1], 0.5 * up @ other, first[:2]])
    expected = conv(x, w + delta.view_as(w), bias, geometry)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    wanted = (x, a, b, s, other, up)
    for pair in zip(*(torch.autograd.grad(out.square().sum(), wanted) for out in (y, expected)), strict=True):
        torch.testing.assert_close(*pair, rtol=1e-11, atol=1e-11)


@given(geometries(), st.booleans(), st.booleans(), st.sampled_from((torch.bfloat16, torch.float16)))
def test_low_precision(drawn_geometry, last, dropout, dtype):
    """Outputs and gradients in 16 bits have the error of a few roundings of their operands and of one of
    their own; adapters and their gradients are fp32."""
    geometry, sizes = drawn_geometry
    x, w, bias, a, b, _ = (value.detach() for value in drawn(geometry, sizes, images=2))
    x, w, bias = (value.to(dtype) for value in (x, w, bias))
    x, a, b = in_format(x, last), a.float(), b.float()
    values = [value.requires_grad_() for value in (x, w, bias, a, b)]
    keep = torch.ones_like(x, dtype=torch.bool)
    options = {"dropout_p": 0.5 if dropout else 0.0, "training": True}
    adapters = [Adapter(a, b, 1.0, ((0, w.shape[0]),))]
    torch.manual_seed(0)
    y = FE.lora_conv_adapters(x, w, bias, adapters, geometry, **options)
    if dropout:
        hypothesis.assume(not geometry.disjoint)  # whose mask comes from the fused op
        torch.manual_seed(0)
        keep = torch.rand_like(x, dtype=torch.float32) >= 0.5
    dy = torch.randn_like(y)
    ours = [y, *torch.autograd.grad(y, values, dy)]

    def results(wide: list[Tensor], grad: Tensor) -> list[Tensor]:
        wide = [value.detach().requires_grad_() for value in wide]
        image, weight, shift, down, up = wide
        branch = image * keep * (2.0 if dropout else 1.0)
        out = conv(image, weight, shift, geometry) + conv(branch, (up @ down).view_as(weight), None, geometry)
        return [out, *torch.autograd.grad(out, wide, grad)]

    exact = results([value.double() for value in values], dy.double())
    size = results([value.double().abs() for value in values], dy.double().abs())
    for value, right, magnitude, like in zip(ours, exact, size, (y, *values), strict=True):
        assert value.dtype == like.dtype
        assert_within(value, right.detach(), 4 * EPS[dtype] * magnitude.detach() + 1e-6, "value")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("geometry", [THREE, POINT, PATCH])
@pytest.mark.parametrize("last", [False, True])
def test_small_adapter_survives(geometry, dtype, last):
    """What an adapter 1e-3 as large as the weight adds to y and to dx is not lost when the base product is
    rounded: it is added before."""
    c, out = 32, 32
    side = 12 * geometry.stride[0]
    x = in_format(torch.randn(16, c, side, side).to(dtype), last)
    w = torch.randn(out, c, *geometry.kernel).to(dtype)
    a = torch.randn(2, w[0].numel()) / w[0].numel() ** 0.5
    b = 1e-3 * w[0].numel() ** 0.5 * torch.randn(out, 2)
    y = FE.lora_conv_adapters(x, w, None, [Adapter(a, b, 1.0, ((0, out),))], geometry)
    dy = torch.randn_like(y)
    ours = (y.detach(), *torch.autograd.grad(y, x, dy))
    assert {value.dtype for value in ours} == {dtype}

    def both(weight: Tensor) -> list[Tensor]:
        image = x.detach().to(weight.dtype).requires_grad_()
        result = conv(image, weight, None, geometry)
        return [result.detach(), *torch.autograd.grad(result, image, dy.to(weight.dtype))]

    plain, total = both(w.double()), both(w.double() + (b.double() @ a.double()).view_as(w))
    late = [base + (right - left).to(dtype) for base, left, right in zip(both(w), plain, total, strict=True)]
    for value, rounded, left, right in zip(ours, late, plain, total, strict=True):
        exact = right - left
        # One rounding, up to half of eps and of random sign, and factors that a matrix unit may round.
        noise = 4 * EPS[dtype] / 2 * float((right * exact).norm() / exact.square().sum()) + 4 * EPS[dtype]
        share, lost = (
            float(((v.double() - left) * exact).sum() / exact.square().sum()) for v in (value, rounded)
        )
        assert abs(share - 1.0) < noise, (share, noise)
        if dtype == torch.bfloat16:
            assert lost < 1.0 - noise, (lost, "the test would not see it")


def test_autocast():
    """Under autocast the result is that of operands rounded to its dtype."""
    x, w, bias, a, b, s = drawn(THREE, (6, 6), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adapted(THREE, x, w, bias, a, b, s)
    short = [value.detach().bfloat16() for value in (x, w, bias)]
    expected = adapted(THREE, *short, a.detach(), b.detach(), s.detach())
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    y.float().sum().backward()
    assert all(value.grad.dtype == torch.float32 for value in (x, a, b, s))


@pytest.mark.parametrize("geometry", [Geometry((2, 1), (1, 2), (1, 0), (1, 1)), LINE])
def test_derivatives(geometry):
    """First and second derivatives, batched ones too, by finite differences."""
    values = drawn(geometry, (2,) * len(geometry.kernel), images=1, channels=(1, 2))
    run = functools.partial(adapted, geometry)
    assert torch.autograd.gradcheck(run, values, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, values)


@pytest.mark.parametrize("geometry", [THREE, POINT, PATCH])
def test_transforms(geometry):
    """vmap over samples, a Jacobian-vector product and a per-sample gradient equal those of the dense
    convolution."""
    values = [value.detach() for value in drawn(geometry, (4, 4), images=3)]
    x, *rest = values

    def loss(run, a: Tensor, image: Tensor) -> Tensor:
        w, bias, _, b, s = rest
        return run(geometry, image[None], w, bias, a, b, s).square().sum()

    results = []
    for run in (adapted, dense):
        per_sample = torch.func.vmap(torch.func.grad(functools.partial(loss, run)), (None, 0))(rest[2], x)
        forward = torch.func.jvp(lambda a, run=run: loss(run, a, x[0]), (rest[2],), (rest[2],))[1]
        results.append((per_sample, forward))
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("geometry", [THREE, POINT, PATCH])
def test_dropout(geometry):
    """Elements of x are dropped in the low-rank branch alone, in the forward as in the backward."""
    x, w, _, a, _, _ = (value.detach() for value in drawn(geometry, (6, 6)))
    weight, up = torch.zeros_like(w), torch.eye(5, 5, dtype=WIDE)
    a = torch.randn(5, a.shape[1], dtype=WIDE)
    x.requires_grad_()
    options = {"dropout_p": 0.5, "training": True}

    def run(p: float, training: bool = True) -> Tensor:
        adapters = [Adapter(a, up, 1.0, ((0, 5),))]
        return FE.lora_conv_adapters(x, weight, None, adapters, geometry, dropout_p=p, training=training)

    y = run(p=options["dropout_p"])
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    full = run(0.0)
    (whole,) = torch.autograd.grad(full, x, torch.ones_like(full))
    kept = (dx / whole).round(decimals=6)
    assert set(kept.unique().tolist()) == {0.0, 2.0}, "inverted scaling by 1 / (1 - p)"
    torch.testing.assert_close(y, conv(x * kept, a.view_as(w), None, geometry), rtol=1e-9, atol=1e-9)
    assert torch.equal(run(0.5, training=False), full)
    assert not run(1.0).any()


@pytest.mark.parametrize("geometry", [THREE, POINT, PATCH, LINE])
def test_without_batch(geometry):
    """An input without the dimension of images gives an output without it."""
    x, *rest = drawn(geometry, (6,) * len(geometry.kernel), images=1)
    torch.testing.assert_close(
        adapted(geometry, x[0], *rest), adapted(geometry, x, *rest)[0], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("geometry", [THREE, POINT, PATCH])
def test_inplace_after(geometry):
    """The output can be changed in place, as an activation does."""
    x, *rest = drawn(geometry, (6, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = F.relu(adapted(geometry, x, *rest), inplace=True)
    ours = torch.autograd.grad(y.sum(), rest)
    theirs = torch.autograd.grad(F.relu(dense(geometry, x, *rest)).sum(), rest)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("geometry", [THREE, ODD, POINT, PATCH])
@pytest.mark.parametrize("last", [False, True])
def test_compiled(geometry, last):
    """One graph, the same output and gradients."""
    torch._dynamo.reset()
    x, *rest = drawn(geometry, (6, 6))
    x = in_format(x, last)
    compiled = torch.compile(functools.partial(adapted, geometry), fullgraph=True, backend="aot_eager")
    y, expected = compiled(x, *rest), adapted(geometry, x, *rest)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for pair in zip(
        *(torch.autograd.grad(out.square().sum(), (x, *rest)) for out in (y, expected)), strict=True
    ):
        torch.testing.assert_close(*pair, rtol=1e-11, atol=1e-11)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda v: v.update(x=v["x"][:, :2]), ArgumentError, r"x: expected \[N, 3, H, W\]"),
        (lambda v: v.update(x=v["x"][0, 0]), ArgumentError, r"x: expected \[N, 3, H, W\]"),
        (lambda v: v.update(x=v["x"][..., :1, :1]), ArgumentError, "at least one window"),
        (lambda v: v.update(x=v["x"].float()), DtypeError, "weight: expected torch.float32"),
        (lambda v: v.update(x=v["x"].long()), DtypeError, "x: expected a floating-point"),
        (lambda v: v.update(a=v["a"][:, :5]), ArgumentError, "lora_a: expected"),
        (lambda v: v.update(b=v["b"][:2]), ArgumentError, "lora_b: expected 5 rows"),
        (lambda v: v.update(bias=v["bias"][:2]), ArgumentError, r"bias: expected shape \[5\]"),
    ],
)
@pytest.mark.parametrize("geometry", [ODD, PATCH])
def test_refusals(geometry, change, error, text):
    """Arguments that do not fit are named."""
    values = dict(zip(("x", "w", "bias", "a", "b", "s"), drawn(geometry, (6, 6)), strict=True))
    change(values)
    with pytest.raises(error, match=text):
        adapted(geometry, *values.values())
