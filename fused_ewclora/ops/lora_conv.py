# SPDX-License-Identifier: Apache-2.0
"""Autograd of the LoRA convolution for windows that overlap: the base product and the down-projection are
PyTorch's convolutions, the up-projection is added to the base product before it is rounded.

Where a call or its backward has to be followed (second derivatives, `torch.func`, forward-mode
differentiation, `torch.jit.trace`) `reference.lora_conv` takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FisherError
from ..reference import lora_conv as reference
from ..reference.lora_linear import accumulate_dtype
from ..reference.philox import inverse_keep
from . import schemas
from ._distinct import distinct
from .adapters import Adapter
from .capture import FisherCapture, ImagesCall
from .lora_linear import Captured
from .windows import Geometry


@dataclass(frozen=True)
class LoRAConvMeta:
    """The constants of one call."""

    geometry: Geometry
    dropout_p: float


def channels_last(x: Tensor) -> bool:
    """Whether the channels of images are next to each other in memory and their columns are not."""
    return x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous()


def prefers_rows(x: Tensor, geometry: Geometry) -> bool:
    """Whether disjoint windows are better computed as rows: where the rows of 1 x 1 windows need no copy; in
    low precision, where convolutions would run in fp32; and larger windows."""
    return not geometry.pointwise or x.dtype.itemsize == 2 or channels_last(x)


def with_channels_last(weight: Tensor, adapters: Sequence[Adapter]) -> tuple[Tensor, list[Adapter]]:
    """weight `[d_out, *kernel, C]`, a view if that is its memory format, and A with the same columns."""

    def moved(adapter: Adapter) -> Adapter:
        kernel = adapter.lora_a.unflatten(1, weight.shape[1:])
        return adapter._replace(lora_a=kernel.movedim(1, -1).flatten(1))

    return weight.movedim(1, -1), [moved(adapter) for adapter in adapters]


def together(adapters: Sequence[Adapter], d_out: int) -> tuple[Tensor, Tensor]:
    """One A `[R, columns]` and B `[d_out, R]`, scales included, that equal all adapters of a call."""
    lora_bs = [_all_rows(adapter, d_out) for adapter in adapters]
    if len(adapters) == 1:
        return adapters[0].lora_a, lora_bs[0]
    return torch.cat([adapter.lora_a for adapter in adapters]), torch.cat(lora_bs, dim=1)


def _all_rows(adapter: Adapter, d_out: int) -> Tensor:
    """B diag(s) with zeros in the rows of other adapters."""
    lora_b, scale = adapter.lora_b, adapter.scale
    if isinstance(scale, Tensor) or scale != 1.0:
        lora_b = lora_b * scale
    if adapter.rows == ((0, d_out),):
        return lora_b
    pieces = lora_b.split([stop - start for start, stop in adapter.rows])
    parts, done = [], 0
    for (start, stop), piece in sorted(zip(adapter.rows, pieces, strict=True), key=lambda part: part[0]):
        parts += [lora_b.new_zeros(start - done, lora_b.shape[1]), piece]
        done = stop
    return torch.cat([*parts, lora_b.new_zeros(d_out - done, lora_b.shape[1])])


class LoRAConvFunction(torch.autograd.Function):
    """y = conv(x, W) + bias + conv1x1(conv(x, A), B) with one adapter on all rows."""

    @staticmethod
    def forward(
        ctx: Any,
        meta: LoRAConvMeta,
        capture: FisherCapture | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        keep: Tensor | None,
    ) -> Tensor:
        y, z = _forward(meta, x, weight, bias, lora_a, lora_b, keep)
        need_weight, _, need_a, need_b = ctx.needs_input_grad[3:-1]
        # A layer that needs only dx (everything of its own frozen) keeps neither x nor z.
        keep_x = need_weight or need_a or need_b or capture is not None
        ctx.save_for_backward(
            x if keep_x else None, weight, bias, lora_a, lora_b, keep, z if need_b else None
        )
        ctx.meta, ctx.shape, ctx.captured = meta, x.shape, None
        if capture is not None:
            ctx.captured = Captured(ImagesCall(capture, meta.geometry))
            ctx.captured.forward(x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, lora_a, lora_b, keep, z = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:-1]
        followed = not torch.compiler.is_compiling() and (
            torch.is_grad_enabled() or schemas.is_transformed(dy)
        )
        if ctx.captured is not None:
            ctx.captured.backward(x, dy, followed)
        if x is None:  # only its shape matters
            x = dy.new_empty(1).expand(ctx.shape)
        with torch.autocast(dy.device.type, enabled=False):
            if followed:
                grads = _followed(ctx.meta, dy, (x, weight, bias, lora_a, lora_b), keep, needs)
            else:
                grads = _backward(ctx.meta, dy, x, weight, bias, lora_a, lora_b, keep, z, needs)
        return (None, None, *grads, None)


def _forward(
    meta: LoRAConvMeta,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y in the dtype of x, and z `[N, r, *T]`."""
    if x.dtype.itemsize == 2 and keep is None:
        return _short_forward(meta.geometry, x, weight, bias, lora_a, lora_b)
    geometry, acc = meta.geometry, accumulate_dtype(x.dtype)
    wide = x.to(acc)
    y = _conv(geometry, wide, weight.to(acc), None if bias is None else bias.to(acc))
    z = _conv(geometry, _kept(wide, keep, meta.dropout_p), _kernel(lora_a, weight, acc))
    _add_up(y, z, lora_b.to(acc))
    return y.to(x.dtype), z


def _short_forward(
    geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor
) -> tuple[Tensor, Tensor]:
    """In 16 bits: y is one convolution of x and z side by side with W and B, so that it is rounded once.

    A convolution gives no sums in fp32, and what is added to a rounded y is lost where it is less than half a
    unit of its last place. z lies in the corners of the windows, where the kernel of its channels has B.
    """
    z = _conv(geometry, x, _kernel(lora_a, weight, x.dtype))
    (d_out, rank), channels, more = lora_b.shape, x.shape[1], _channels(lora_b.shape[1])
    sides = list(zip(x.shape[2:], geometry.padding, strict=True))
    steps = zip(z.shape[2:], geometry.stride, strict=True)
    of_z: tuple[Any, ...] = (slice(None), slice(channels, channels + rank))
    inside = (slice(None), slice(channels), *(slice(padding, padding + size) for size, padding in sides))
    corners = tuple(slice(0, (count - 1) * stride + 1, stride) for count, stride in steps)
    image = _zeros(x, x.shape[0], channels + more, *(size + 2 * padding for size, padding in sides))
    image[inside], image[of_z + corners] = x, z
    kernel = _zeros(x, d_out, channels + more, *geometry.kernel)
    kernel[:, :channels], kernel[of_z + (0,) * len(sides)] = weight, lora_b
    bare = replace(geometry, padding=(0,) * len(sides))
    return _conv(bare, image, kernel, bias), z


def _channels(rank: int) -> int:
    """Channels for `rank` of them: 16-bit convolutions are fast for multiples of 8."""
    return -(-rank // 8) * 8


def _zeros(like: Tensor, *shape: int) -> Tensor:
    last = like.dim() == 4 and channels_last(like)
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format).zero_()


def _conv(geometry: Geometry, x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    function = F.conv2d if x.dim() == 4 else F.conv1d
    return function(x, kernel, bias, [*geometry.stride], [*geometry.padding], [*geometry.dilation])


def _kept(x: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    return x if keep is None else (x * keep).mul_(inverse_keep(dropout_p))


def _kernel(lora_a: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return lora_a.to(dtype).reshape(lora_a.shape[0], *weight.shape[1:])


def _rows(y: Tensor) -> Tensor | None:
    """`[N, C, *T]` with its channels last in memory as rows, a view; None for other memory formats."""
    rows = y.movedim(1, -1)
    return rows.view(rows.shape[:-1].numel(), y.shape[1]) if rows.is_contiguous() else None


def _add_up(y: Tensor, z: Tensor, lora_b: Tensor) -> None:
    """y `[N, d_out, *T]` += B z for z `[N, r, *T]`, in place."""
    if (rows := _rows(y)) is not None:
        rows.addmm_(z.movedim(1, -1).flatten(0, -2), lora_b.T)
    elif y.is_contiguous():
        y.flatten(2).baddbmm_(lora_b.expand(y.shape[0], *lora_b.shape), z.flatten(2))
    else:
        y += torch.einsum("or,nr...->no...", lora_b, z)


def _down(dy: Tensor, lora_b: Tensor) -> Tensor:
    """B^T dy `[N, r, *T]`, in the memory format of dy."""
    if (rows := _rows(dy)) is not None:
        return (rows @ lora_b).view(dy.shape[0], *dy.shape[2:], lora_b.shape[1]).movedim(-1, 1)
    return torch.matmul(lora_b.T, dy.flatten(2)).unflatten(2, dy.shape[2:])


def _products(dy: Tensor, z: Tensor) -> Tensor:
    """The sum of dy z^T over images and windows, `[d_out, r]`."""
    first, second = _rows(dy), _rows(z)
    if first is not None and second is not None:
        return first.T @ second
    return torch.bmm(dy.flatten(2), z.flatten(2).mT).sum(0)


def _backward(
    meta: LoRAConvMeta,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    keep: Tensor | None,
    z: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x, weight, bias, A and B that `needs` asks for, in their dtypes, summed as y is."""
    need_x, need_weight, need_bias, need_a, need_b = needs
    geometry, acc = meta.geometry, accumulate_dtype(dy.dtype)
    short = need_x and dy.dtype.itemsize == 2 and keep is None
    wide_x = need_x and not short
    g, wide = dy.to(acc), x.to(acc) if wide_x or need_weight or need_a else x
    dx = dweight = da = db = dbias = u = None
    if wide_x or need_weight:
        dx, dweight = _conv_backward(geometry, g, wide, weight.to(acc), wide_x, need_weight)
    if short:
        dx, u = _short_dx(geometry, dy, x, weight, lora_a, lora_b)
    if wide_x or need_a:
        u = _down(g, lora_b.to(acc)) if u is None else u.to(acc)
        branch = _kept(wide, keep, meta.dropout_p)
        dbranch, da = _conv_backward(geometry, u, branch, _kernel(lora_a, weight, acc), wide_x, need_a)
        if dx is not None and dbranch is not None:
            dx += _kept(dbranch, keep, meta.dropout_p)
    if need_b:
        assert z is not None
        db = _products(g, z.to(acc)).to(lora_b.dtype)
    if need_bias and bias is not None:
        dbias = g.sum((0, *range(2, g.dim()))).to(bias.dtype)
    return [
        None if dx is None else dx.to(dy.dtype),
        None if dweight is None else dweight.to(weight.dtype),
        dbias,
        None if da is None else da.flatten(1).to(lora_a.dtype),
        db,
    ]


def _short_dx(
    geometry: Geometry, dy: Tensor, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor
) -> tuple[Tensor | None, Tensor]:
    """dx and u in 16 bits: that of one convolution with W and A below each other, rounded once as y is."""
    u = _down(dy, lora_b.to(dy.dtype))
    kernel = _kernel(lora_a, weight, dy.dtype)
    if missing := _channels(u.shape[1]) - u.shape[1]:
        u_padded = torch.cat([u, u.new_zeros(u.shape[0], missing, *u.shape[2:])], dim=1)
        kernel = torch.cat([kernel, kernel.new_zeros(missing, *kernel.shape[1:])])
    else:
        u_padded = u
    both = torch.cat([dy, u_padded], dim=1), torch.cat([weight, kernel])
    return _conv_backward(geometry, both[0], x, both[1], True, False)[0], u


def _conv_backward(
    geometry: Geometry, dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, [*geometry.stride], [*geometry.padding], [*geometry.dilation], False,
        [0] * len(geometry.stride), 1, [need_x, need_weight, False],
    )  # fmt: skip
    return dx, dweight


def _followed(
    meta: LoRAConvMeta,
    dy: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor],
    keep: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The same, connected to the graphs of all arguments."""
    with torch.enable_grad():
        y = _plain(meta, *inputs, keep)
        wanted = [tensor for tensor, need in zip(inputs, needs, strict=True) if need and tensor is not None]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(found) if need else None for need in needs]


def _plain(
    meta: LoRAConvMeta,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    keep: Tensor | None,
) -> Tensor:
    geometry = meta.geometry
    return reference.lora_conv(
        x, weight, bias, lora_a, lora_b, keep, meta.dropout_p, geometry.stride, geometry.padding,
        geometry.dilation,
    )  # fmt: skip


def lora_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    meta: LoRAConvMeta,
    capture: FisherCapture | None,
) -> Tensor:
    """y `[N, d_out, *T]` of arguments that have been checked; A and B as `together` gives them."""
    keep = None
    if meta.dropout_p > 0.0:
        keep = torch.rand_like(x, dtype=torch.float32) >= meta.dropout_p
    inputs = (x, weight, bias, lora_a, lora_b, keep)
    with torch.autocast(x.device.type, enabled=False):
        if schemas.is_transformed():
            if capture is not None:
                raise FisherError(
                    "a Fisher pass: expected plain calls of its layers, got one inside a transform of "
                    "torch.func, forward-mode differentiation or torch.jit.trace"
                )
            return _plain(meta, *inputs)
        if capture is None and not torch.is_grad_enabled():
            return _forward(meta, *inputs)[0]
        found: Tensor = LoRAConvFunction.apply(meta, capture, *distinct(inputs))
        return found
