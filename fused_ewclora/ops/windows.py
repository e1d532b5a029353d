# SPDX-License-Identifier: Apache-2.0
"""The windows of a convolution: where they are, and their Fisher without a copy of all of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import schemas
from .dispatch import current_backend

Sizes = tuple[int, ...]
PIECE_BYTES = 64 << 20  # of the windows that are made at once
# From this number of channels on, one product per place in the window is faster than one of whole windows
# (one core, 8 images: 64 channels 28 x 28, windows 3 x 3: 8.6 and 17.7 ms; 3 channels, 7 x 7: 70 and 11 ms).
MIN_CHANNELS = 16


@dataclass(frozen=True)
class Geometry:
    """The windows of a convolution, with zeros around the input; one entry per spatial dimension.

    Args:
        kernel: sizes of a window.
        stride: steps between windows.
        padding: places of zeros on each side.
        dilation: steps between the places of a window.

    Examples:
        >>> FE.Geometry(kernel=(3,), stride=(2,), padding=(1,), dilation=(1,)).counts((8,))
        (4,)
    """

    kernel: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes

    def counts(self, spatial: Sizes) -> Sizes:
        """The number of windows along each dimension of an input of these sizes."""
        return tuple(
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(
                spatial, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )

    @property
    def pointwise(self) -> bool:
        """Whether the windows are single places of the input."""
        return set(self.kernel) == {1} and set(self.padding) == {0}

    @property
    def disjoint(self) -> bool:
        """Whether each window is a block, or a place, of the input that no other window has."""
        sides = zip(self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return all(p == 0 and (k == 1 or (k == s and d == 1)) for k, s, p, d in sides)

    def rows(self, x: Tensor, channels_last: bool = False) -> Tensor:
        """Disjoint windows of x `[N, C, *S]` as rows `[N, *windows, columns]`, a view where strides allow it.
        The columns have the order (C, *kernel), or with `channels_last` (*kernel, C)."""
        if self.pointwise:
            for dim, stride in enumerate(self.stride, 2):
                x = x if stride == 1 else x[(slice(None),) * dim + (slice(None, None, stride),)]
            return x.movedim(1, -1)
        counts = self.counts(tuple(x.shape[2:]))
        for i in reversed(range(len(counts))):
            if self.kernel[i] == 1:
                x = x[(slice(None),) * (i + 2) + (slice(None, None, self.stride[i]),)].unsqueeze(i + 3)
            else:
                size = counts[i] * self.kernel[i]
                x = x.narrow(i + 2, 0, size).unflatten(i + 2, (counts[i], self.kernel[i]))
        windows, places = (tuple(range(first, x.dim(), 2)) for first in (2, 3))
        columns = (*places, 1) if channels_last else (1, *places)
        return x.permute(0, *windows, *columns).flatten(len(windows) + 1)


class Windows:
    """The windows `[N, windows, columns]` of images, which are made piece by piece.

    images: one tensor `[N, images of a sample, C, *S]` per call of a layer; the windows of a sample are those
    of its images in all of them.
    """

    def __init__(self, geometry: Geometry, images: list[Tensor]) -> None:
        self._geometry, self._images = geometry, images
        self._bare = replace(geometry, padding=(0,) * len(geometry.padding))

    def with_calls(self, others: Sequence[Windows]) -> Windows:
        """Those of this call, followed by those of others."""
        return Windows(self._geometry, [image for part in (self, *others) for image in part._images])

    def to(self, dtype: torch.dtype) -> Windows:
        """The same in another dtype."""
        return Windows(self._geometry, [image.to(dtype) for image in self._images])

    def rows(self) -> Tensor:
        """All of them, `[N, windows, columns]`, with columns in the order (C, *kernel)."""
        return self._wholes([self._padded(images) for images in self._images])

    @torch.no_grad()
    def accumulate_into_(self, fisher: Tensor, dy: Tensor, mode: str, weight: float) -> None:
        """`fisher_accumulate_` of the windows and dy `[N, windows, d_out]`, exactly; fisher `[d_out,
        columns]` is contiguous and its columns have the order (C, *kernel)."""
        backend = current_backend()
        targets = fisher.view(fisher.shape[0], -1, *self._geometry.kernel)
        for x, part, index in self._parts(dy):
            target = fisher if index is None else targets[(slice(None), *index)]
            schemas.fisher_accumulate_(target, x, part, mode, weight, None, backend)

    @torch.no_grad()
    def add_sums_into_(self, rows: Tensor, columns: Tensor, dy: Tensor, mode: str, weight: float) -> None:
        """`fisher_sums_` of the windows and dy `[N, windows, d_out]`, exactly; columns `[d_in]` is contiguous
        and has the order (C, *kernel)."""
        backend = current_backend()
        targets = columns.view(-1, *self._geometry.kernel)
        for x, part, index in self._parts(dy):
            target = columns if index is None else torch.zeros_like(targets[index])
            schemas.fisher_sums_(rows, target, x, part, mode, weight, None, backend)
            if index is not None:
                targets[index] += target

    def pieces(self, dy: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Whole windows and dy of some samples at a time, all of them together."""
        if not dy.numel():
            return
        columns = self._channel_count * torch.Size(self._geometry.kernel).numel()
        step = max(1, PIECE_BYTES // (dy.shape[1] * columns * dy.element_size()))
        for first in range(0, dy.shape[0], step):
            samples = slice(first, first + step)
            yield self._wholes([self._padded(images[samples]) for images in self._images]), dy[samples]

    def _parts(self, dy: Tensor) -> Iterator[tuple[Tensor, Tensor, tuple[Any, ...] | None]]:
        """(x, dy, columns): some samples and either all columns (None), or those of some channels at one
        place of the window, as an index of `[C, *kernel]`; each column of each sample once."""
        if not dy.numel():
            return
        for samples, whole in self._chunks(dy):
            padded = [self._padded(images[samples]) for images in self._images]
            if whole:
                yield self._wholes(padded), dy[samples], None
                continue
            for channels in self._channels(dy[samples]):
                narrow = [images[..., channels] for images in padded]
                for place in self._places():
                    yield self._at(narrow, place), dy[samples], (channels, *place)

    @property
    def _channel_count(self) -> int:
        return self._images[0].shape[2]

    def _places(self) -> Iterator[Sizes]:
        return itertools.product(*map(range, self._geometry.kernel))

    def _chunks(self, dy: Tensor) -> Iterator[tuple[slice, bool]]:
        """Samples, and whether their windows are made as wholes."""
        channels = self._channel_count
        small = channels < MIN_CHANNELS
        columns = channels * torch.Size(self._geometry.kernel).numel() if small else channels
        size = dy.shape[1] * columns * dy.element_size()
        step = max(1, PIECE_BYTES // size)
        for first in range(0, dy.shape[0], step):
            yield slice(first, first + step), small and size <= PIECE_BYTES

    def _channels(self, dy: Tensor) -> Iterator[slice]:
        """Channels of which what all windows have at one place is of limited size."""
        step = max(1, PIECE_BYTES // (dy.shape[0] * dy.shape[1] * dy.element_size()))
        channels = self._channel_count
        return (slice(first, min(first + step, channels)) for first in range(0, channels, step))

    def _padded(self, images: Tensor) -> Tensor:
        """`[n, images, *S, C]` with the zeros around, contiguous."""
        last = images.movedim(2, -1)
        sides = [side for padding in reversed(self._geometry.padding) for side in (padding, padding)]
        return F.pad(last, (0, 0, *sides)).contiguous() if any(sides) else last.contiguous()

    def _wholes(self, padded: list[Tensor]) -> Tensor:
        return torch.stack([self._at(padded, place) for place in self._places()], dim=-1).flatten(2)

    def _at(self, padded: list[Tensor], place: Sizes) -> Tensor:
        """What the windows have at one of their places, `[n, windows, C]`."""
        parts = []
        for images in padded:
            counts = self._bare.counts(tuple(images.shape[2:-1]))
            sides = zip(place, counts, self._bare.stride, self._bare.dilation, strict=True)
            along = [slice(at * d, at * d + (count - 1) * s + 1, s) for at, count, s, d in sides]
            parts.append(images[(slice(None), slice(None), *along)].flatten(1, -2))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
