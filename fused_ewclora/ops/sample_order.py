# SPDX-License-Identifier: Apache-2.0
"""Where the rows of a sample are in the input of a layer, found from what one sample alone gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Order:
    """The place of N samples in a tensor: dimension `dim`, of `rows` entries per sample, holds them.

    Entry n * rows + i belongs to sample n, or with `minor` entry i * N + n, as when time or windows come
    first.
    """

    dim: int
    rows: int
    minor: bool = False

    def fits(self, shape: torch.Size, samples: int) -> bool:
        """Whether the dimension has the size that belongs to this number of samples."""
        return shape[self.dim] == samples * self.rows

    def sample_of(self, entries: Tensor, samples: int) -> Tensor:
        """The sample of each of these entries of the dimension."""
        if self.minor:
            return entries % samples
        return entries.div(max(self.rows, 1), rounding_mode="floor")

    def samples_first(self, tensor: Tensor, samples: int) -> Tensor:
        """A view `[samples, ...]` whose other dimensions are those of one sample."""
        if self.minor:
            return tensor.unflatten(self.dim, (self.rows, samples)).movedim(self.dim + 1, 0)
        return tensor.unflatten(self.dim, (samples, self.rows)).movedim(self.dim, 0)


def orders(shape: torch.Size, samples: int) -> Iterator[Order]:
    """Every order that a tensor of this shape, whose last dimension holds features, may have."""
    for dim, size in enumerate(shape[:-1]):
        if size and size % samples == 0:
            yield Order(dim, size // samples)
            if size > samples > 1:
                yield Order(dim, size // samples, minor=True)


@dataclass(frozen=True)
class Ends:
    """The first and the last sample of a tensor `[..., d]` of `samples` samples, as each of its orders has
    them; `typical` is the norm of its median row, 0-d."""

    shape: torch.Size
    typical: Tensor
    parts: dict[Order, tuple[Tensor, Tensor]]

    @classmethod
    @torch.no_grad()
    def of(cls, tensor: Tensor, samples: int) -> Ends:
        """Copies, which do not keep the tensor alive."""
        tensor = tensor.detach()
        parts = {}
        for order in orders(tensor.shape, samples):
            rows = order.samples_first(tensor, samples)
            parts[order] = (rows[0].clone(), rows[-1].clone())
        return cls(tensor.shape, torch.linalg.vector_norm(_finite_rows(tensor), dim=-1).median(), parts)

    def compared(self, first: Tensor, last: Tensor) -> dict[Order, Tensor]:
        """By order that the shape of one sample alone allows: the larger of the two differences between the
        samples here and alone, 0-d."""
        return {
            order: torch.maximum(self._difference(here[0], first), self._difference(here[1], last))
            for order, here in self.parts.items()
            if _alike(here[0].shape, first.shape) and first.shape == last.shape
        }

    @torch.no_grad()
    def _difference(self, here: Tensor, alone: Tensor) -> Tensor:
        """The mean over rows of the difference of a row from its row alone, relative to the norm of that row
        or of the median row, and at most 1; 0-d. Values that are not finite count as 0.

        Row by row, because a few rows of large norm (attention sinks) would hide all others in a common norm;
        the mean, because rounding may send a few tokens to another expert.
        """
        a, b = _finite_rows(here), _finite_rows(alone)
        norms = torch.linalg.vector_norm(b, dim=-1).maximum(self.typical)
        scale = norms.clamp(min=torch.finfo(norms.dtype).tiny)
        return (torch.linalg.vector_norm(a - b, dim=-1) / scale).clamp(max=1.0).mean()


@torch.no_grad()
def marks(tensor: Tensor) -> Tensor:
    """One number per row of `[rows, d]`, which tells different rows apart, in units of the norm of the median
    row; nothing of tensors of other dimensions."""
    if tensor.dim() != 2:
        return tensor.new_empty(0)
    rows = _finite_rows(tensor)
    drawn = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0))
    typical = torch.linalg.vector_norm(rows, dim=-1).median().clamp(min=torch.finfo(rows.dtype).tiny)
    return rows @ drawn.to(rows) / typical


def reversal(here: Tensor, there: Tensor, order: Order, samples: int) -> Tensor:
    """How much the marks of a batch differ, in the sample where they differ most, from those of the batch
    with its samples reversed, 0-d."""
    there = order.samples_first(there[:, None], samples).flip(0)
    difference = (order.samples_first(here[:, None], samples) - there).abs().clamp(max=1.0)
    return difference.flatten(1).mean(1).amax()


def _finite_rows(tensor: Tensor) -> Tensor:
    acc = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.reshape(-1, tensor.shape[-1]).to(acc).nan_to_num(0.0, 0.0, 0.0)


def _alike(part: torch.Size, alone: torch.Size) -> bool:
    """Whether one sample of a batch may have the other shape alone, where it may have lost a dimension of
    size 1."""
    if len(part) == len(alone):
        return part == alone
    return part.numel() == alone.numel() and part[-1:] == alone[-1:]


@dataclass
class Watch:
    """What a layer saw of each call in one forward of `samples` samples; None where the order is known."""

    samples: int
    calls: list[Ends | None]
