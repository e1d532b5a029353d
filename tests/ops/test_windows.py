# SPDX-License-Identifier: Apache-2.0
"""The Fisher of overlapping windows: exact, whatever the pieces are in which the windows are made."""

from __future__ import annotations

import pytest
import torch
from conv_cases import THREE, conv, geometries
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fused_ewclora.errors import FisherError
from fused_ewclora.functional import Adapter, Geometry, lora_conv_adapters
from fused_ewclora.ops import windows
from fused_ewclora.ops.capture import FisherCapture
from fused_ewclora.ops.sample_order import Order
from fused_ewclora.ops.windows import Windows

WIDE = torch.float64


def gradient(x: Tensor, dy: Tensor, geometry: Geometry, kernel: tuple[int, ...]) -> Tensor:
    """Of sum(conv(x, W) dy) with respect to W `[d_out, C, *K]`, by autograd."""
    weight = torch.zeros(dy.shape[1], x.shape[1], *kernel, dtype=x.dtype, requires_grad=True)
    return torch.autograd.grad(conv(x, weight, None, geometry), weight, dy)[0].flatten(1)


def squares(x: Tensor, dy: Tensor, geometry: Geometry, mode: str) -> Tensor:
    """x `[N, images, C, *S]`, dy `[N, images, d_out, *T]`: the sum of squares over samples."""
    kernel = geometry.kernel
    parts = [(x.flatten(0, 1), dy.flatten(0, 1))] if mode == "batch" else list(zip(x, dy, strict=True))
    return sum(gradient(a, b, geometry, kernel).square() for a, b in parts)


@given(
    geometries(), st.integers(1, 3), st.sampled_from((1, 2)), st.sampled_from((2, 17)), st.booleans(),
    st.sampled_from((1, 300, 4000, 64 << 20)), st.sampled_from(("sample", "batch")),
)  # fmt: skip
def test_squares(drawn_geometry, samples, images, channels, last, piece_bytes, mode):
    """Squares of the gradients of samples of several images equal those of autograd."""
    geometry, sizes = drawn_geometry
    x = torch.randn(samples, images, channels, *sizes, dtype=WIDE)
    if last:
        x = x.movedim(2, -1).contiguous().movedim(-1, 2)
    dy = torch.randn(samples, images, 3, *geometry.counts(sizes), dtype=WIDE)
    fisher = torch.full((3, channels * torch.Size(geometry.kernel).numel()), 0.5, dtype=WIDE)
    rows = dy.movedim(2, -1).flatten(1, -2)
    given_x, given_rows = (x, rows) if mode == "sample" else (x.flatten(0, 1)[None], rows.flatten(0, 1)[None])
    before = windows.PIECE_BYTES
    try:
        windows.PIECE_BYTES = piece_bytes
        Windows(geometry, [given_x]).accumulate_into_(fisher, given_rows, mode, 0.25)
    finally:
        windows.PIECE_BYTES = before
    expected = 0.5 + 0.25 * squares(x, dy, geometry, mode)
    torch.testing.assert_close(fisher, expected, rtol=1e-12, atol=1e-12)


@given(geometries(), st.integers(1, 3))
def test_rows(drawn_geometry, images):
    """All windows as rows, in the order of weight.flatten(1)."""
    geometry, sizes = drawn_geometry
    x, weight = torch.randn(images, 2, *sizes), torch.randn(3, 2, *geometry.kernel)
    rows = Windows(geometry, [x.unsqueeze(1)]).rows()
    y = (rows.double() @ weight.double().flatten(1).T).movedim(1, -1)
    expected = conv(x.double(), weight.double(), None, geometry).flatten(2)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    if geometry.disjoint:
        assert torch.equal(geometry.rows(x).flatten(1, -2), rows)


def capture_of(**options) -> FisherCapture:
    return FisherCapture([torch.zeros(4, 27, dtype=WIDE)], [((0, 4),)], reduction="sum", **options)


def layer(capture: FisherCapture):
    """A 3 x 3 convolution of 3 to 4 channels that collects its Fisher, and its weight."""
    weight = torch.randn(4, 3, 3, 3, dtype=WIDE)
    a, b = torch.randn(2, 27, dtype=WIDE).requires_grad_(), torch.zeros(4, 2, dtype=WIDE)

    def call(x: Tensor) -> Tensor:
        return lora_conv_adapters(x, weight, None, [Adapter(a, b, 1.0, ((0, 4),))], THREE, capture=capture)

    return call, weight


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_shared_layer(mode):
    """A layer that is called on images of two sizes has one gradient per sample, the sum over its calls."""
    capture = capture_of(mode=mode)
    call, weight = layer(capture)
    images = [torch.randn(3, 3, size, size, dtype=WIDE) for size in (6, 4)]
    sum(call(x).tanh().sum() for x in images).backward()
    weight.requires_grad_()
    losses = [sum(conv(x[n : n + 1], weight, None, THREE).tanh().sum() for x in images) for n in range(3)]
    grads = [torch.autograd.grad(loss, weight)[0].flatten(1) for loss in losses]
    expected = sum(g.square() for g in grads) if mode == "sample" else sum(grads).square() / 3
    torch.testing.assert_close(capture.fishers[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("minor", [False, True])
def test_folded_frames(minor):
    """Frames of a video in the leading dimension, of one sample after the other or of one time after the
    other, belong to their samples."""
    capture = capture_of(batch_size=3)
    capture.add_orders({4: [Order(0, 2, minor)]})
    call, weight = layer(capture)
    x = torch.randn(6, 3, 5, 5, dtype=WIDE)
    call(x).tanh().sum().backward()
    weight.requires_grad_()
    samples = [x[n::3] if minor else x[2 * n : 2 * n + 2] for n in range(3)]
    losses = [conv(sample, weight, None, THREE).tanh().sum() for sample in samples]
    expected = sum(torch.autograd.grad(loss, weight)[0].flatten(1).square() for loss in losses)
    torch.testing.assert_close(capture.fishers[0], expected, rtol=1e-12, atol=1e-12)


def test_samples_elsewhere():
    """Samples in a dimension in which windows overlap are refused."""
    capture = capture_of(batch_size=5)
    capture.add_orders({4: [Order(1, 1)]})
    call, _ = layer(capture)
    with pytest.raises(FisherError, match="samples are in dimension 2"):
        call(torch.randn(2, 3, 5, 5, dtype=WIDE)).sum().backward()
    assert not capture.fishers[0].any()


def test_rows_to_samples_refused():
    """A function of rows cannot be asked about windows that are never made as rows."""
    call, _ = layer(capture_of(rows_to_samples=lambda rows: rows[:, 0].long(), batch_size=2))
    with pytest.raises(FisherError, match="windows overlap"):
        call(torch.randn(2, 3, 5, 5, dtype=WIDE))


def test_second_derivatives_refused():
    """A loss that contains gradients of the model has no Fisher of its own."""
    call, _ = layer(capture_of())
    x = torch.randn(2, 3, 5, 5, dtype=WIDE, requires_grad=True)
    (grad,) = torch.autograd.grad(call(x).tanh().sum(), x, create_graph=True)
    with pytest.raises(FisherError, match="create_graph"):
        grad.square().sum().backward()
