# SPDX-License-Identifier: Apache-2.0
"""Collects the Fisher of one layer from inside the backward of its op.

Module hooks fire twice under activation checkpointing; the op's backward runs once per call of the layer in
the forward pass, whatever is recomputed. A layer called several times in one forward (weight sharing) has one
gradient per sample, the sum over its calls, so its calls are joined along the token axis before anything is
squared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ArgumentError, FisherError
from .sample_order import Ends, Order, Watch
from .sums import Sums, Term, sums_of
from .windows import Geometry, Windows

Rows = tuple[tuple[int, int], ...]
RowsToSamples = Callable[[Tensor], Tensor]
MODES = ("sample", "batch")
GATHERED = (*MODES, "gradient")
REDUCTIONS = ("mean", "sum")


def _inside_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class CallCapture(Protocol):
    """What collects the Fisher of one call: a `FisherCapture`, or a `RoutedCall`, `RowsCapture` or
    `ImagesCall` of one."""

    def note_forward(self, x: Tensor) -> CallIndex:
        """x of the forward; what it returns is given to `record`."""

    def record(self, x: Tensor, dy: Tensor, index: CallIndex = None) -> None:
        """x and dy of a backward."""


@dataclass(frozen=True)
class RoutedRows:
    """Which rows `[M]` of a source of this shape, `[S, d]`, the rows of x are."""

    shape: torch.Size
    rows: Tensor


CallIndex = Tensor | RoutedRows | None  # the sample of each row, or what tells it later


class Source:
    """The input `[S, d]` of one forward of a module that hands its rows on to layers of its own, as a router
    hands tokens to experts."""

    def __init__(self, x: Tensor) -> None:
        self.x = x.detach()
        self.samples: Tensor | None = None  # of each row, where a function tells them


class RoutedCall:
    """The capture of one call of a layer with the rows `rows` of `source`."""

    __slots__ = ("_capture", "_rows", "_source")

    def __init__(self, capture: FisherCapture, source: Source, rows: Tensor) -> None:
        self._capture, self._source, self._rows = capture, source, rows

    def note_forward(self, x: Tensor) -> CallIndex:
        """As `FisherCapture.note_forward`."""
        return self._capture.note_routed(self._source, self._rows)

    def record(self, x: Tensor, dy: Tensor, index: CallIndex = None) -> None:
        """As `FisherCapture.record`."""
        self._capture.record(x, dy, index)


class ImagesCall:
    """The capture of one call of a convolution whose windows overlap, with images `[N, C, *S]` as x."""

    __slots__ = ("_capture", "_geometry")

    def __init__(self, capture: FisherCapture, geometry: Geometry) -> None:
        self._capture, self._geometry = capture, geometry

    def note_forward(self, x: Tensor) -> CallIndex:
        """As `FisherCapture.note_forward`."""
        self._capture.note_images(x)
        return None

    def record(self, x: Tensor, dy: Tensor, index: CallIndex = None) -> None:
        """As `FisherCapture.record`, dy `[N, d_out, *T]`."""
        self._capture.record_images(x, dy, self._geometry)


@dataclass(slots=True)
class _Call:
    """x and dy of one call: `[N, T, d]`, or `[rows, d]` where `index` `[rows]` holds the sample of each row,
    or with other modes than "sample" `[1, rows, d]`. dy has the columns of the layer's output from `start`
    on. The x of a convolution whose windows overlap are its windows."""

    x: Tensor | Windows
    dy: Tensor
    samples: int
    index: Tensor | None = None
    start: int = 0

    @property
    def stop(self) -> int:
        """The first column of the layer's output that dy does not have any more."""
        return self.start + self.dy.shape[-1]


@dataclass(slots=True)
class _Part:
    """x and dy of all calls in one forward pass for the columns of the layer's output from `start` on;
    `offsets` where rows are sorted by sample."""

    x: Tensor | Windows
    dy: Tensor
    start: int = 0
    offsets: Tensor | None = None

    def terms(self, ranges: Rows) -> list[Term]:
        """What these columns give to the Fisher of an adapter on the row ranges."""
        first, stop = self.start, self.start + self.dy.shape[-1]
        if all(first <= a and b <= stop for a, b in ranges):
            inside = ranges if first == 0 else tuple((a - first, b - first) for a, b in ranges)
            return [Term(self.x, _columns(self.dy, inside), self.offsets)]
        terms, row = [], 0
        for a, b in ranges:
            low, high = max(a, first), min(b, stop)
            if low < high:
                dy = self.dy[..., low - first : high - first]
                terms.append(Term(self.x, dy, self.offsets, row + low - a))
            row += b - a
        return terms


class FisherCapture:
    """Accumulates the unnormalised Fisher of a layer's adapters, in place, during backward.

    Args:
        fishers: one buffer `[rows of the adapter, d_in]` per adapter, fp32 (fp64 for fp64 layers), in the
            order of the adapters, or the `Sums` of another structure.
        rows: output row ranges of each adapter, in the same order.
        mode: `"sample"` adds sum_n g_n^2 with g_n the gradient of the loss of sample n; `"batch"` adds
            n_b * (mean of g_n)^2; `"gradient"` adds sum_n g_n, to sums that are no squares. The caller
            divides by the number of samples at the end.
        reduction: how the loss that is backpropagated reduces over samples, `"mean"` or `"sum"`.
        loss_scale: factor on the loss (gradient scaling); squares are divided by its square, in fp32, and
            gradients by itself.
        batch_size: samples per batch; None takes the leading dimension of the layer's input. May be set
            before each batch.
        name: of the layer, for messages.
        rows_to_samples: of x flattened to `[rows, d_in]` the sample of each row, for mode "sample".

    Without `rows_to_samples`, mode "sample" takes the rows of x in one of the orders that `add_orders` has
    named, and as long as there is none samples first.

    The layers that take rows of one `Source` share a `leader`, the capture of one of them: what is known of
    the rows is about the source, and is looked for by the leader alone.
    """

    def __init__(
        self,
        fishers: Sequence[Tensor | Sums],
        rows: list[Rows],
        mode: str = "sample",
        reduction: str = "mean",
        loss_scale: float = 1.0,
        batch_size: int | None = None,
        name: str = "",
        rows_to_samples: RowsToSamples | None = None,
    ) -> None:
        if mode not in GATHERED:
            raise ArgumentError(f"mode: expected one of {GATHERED}, got {mode!r}")
        if reduction not in REDUCTIONS:
            raise ArgumentError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
        if len(fishers) != len(rows):
            raise ArgumentError(f"rows: expected {len(fishers)} entries, one per Fisher, got {len(rows)}")
        self.fishers, self.rows, self.name = fishers, rows, name or "a layer"
        self._sums = [sums_of(fisher) for fisher in fishers]
        self.mode, self.reduction, self.loss_scale, self.batch_size = mode, reduction, loss_scale, batch_size
        self.rows_to_samples = rows_to_samples
        self.leader: FisherCapture | None = None
        self.samples = 0
        self.batches = 0
        # During a forward that is watched, or that only looks.
        self.watch: Watch | None = None
        self.look: Callable[[Tensor], None] | None = None
        self._checked = False
        # The samples of the latest forward that was watched, where batch_size does not tell.
        self._watched_samples: int | None = None
        self._orders: dict[int, list[Order]] = {}  # by number of dimensions
        self._calls = 0  # calls of the layer in the latest forward pass
        # That forward pass had a backward; a retained graph may have more, each with as many calls.
        self._closed = False
        self._held: list[_Call] = []

    def add_orders(self, orders: Mapping[int, Sequence[Order]]) -> None:
        """From now on inputs may have these orders, by their number of dimensions, and no others."""
        self._checked = True
        for dims, found in orders.items():
            known = self._orders.setdefault(dims, [])
            known += [order for order in dict.fromkeys(found) if order not in known]

    def note_forward(self, x: Tensor) -> CallIndex:
        """Count a call of the layer, but not its recomputation under checkpointing, inside a backward, nor
        one of a forward that only looks; returns what `record` takes as `index`."""
        if self.look is not None:
            self.look(x.detach())
            return None
        if not _inside_backward():
            self._count(x)
        if self.rows_to_samples is None or self.mode != "sample":
            return None
        # Now, because the function may read what the same forward pass wrote.
        return self._index(self.rows_to_samples, _rows(x.detach()))

    def note_routed(self, source: Source, rows: Tensor) -> CallIndex:
        """`note_forward` of a call with these rows of `source`; every layer of the source is called once in
        each of its forwards, with no rows if need be."""
        leader = self.leader or self
        if leader.look is not None:
            if leader is self:
                leader.look(source.x)
            return None
        if not _inside_backward():
            self._count(source.x)
        if leader.rows_to_samples is None or self.mode != "sample":
            return RoutedRows(source.x.shape, rows)
        if source.samples is None:
            source.samples = self._index(leader.rows_to_samples, source.x)
        return source.samples[rows]

    def _count(self, x: Tensor) -> None:
        self._watched_samples = None
        if self.watch is not None:
            self._watched_samples = self.watch.samples
            self.watch.calls.append(self._unknown(x, self.watch.samples))
        if self._held:
            self.finish()
        if self._closed:
            self._calls, self._closed = 0, False
        self._calls += 1

    def _unknown(self, x: Tensor, samples: int) -> Ends | None:
        """What is needed to find the order of x; None when it is known, or nothing depends on it."""
        if samples == 1 or x.numel() == 0 or self.rows_to_samples is not None or self.mode != "sample":
            return None
        return None if self._order(x.shape, samples) else Ends.of(x, samples)

    def _order(self, shape: torch.Size, samples: int) -> Order | None:
        """The one known order that fits the shape of x."""
        fitting = [order for order in self._orders.get(len(shape), ()) if order.fits(shape, samples)]
        return fitting[0] if len(fitting) == 1 else None

    def record(self, x: Tensor, dy: Tensor, index: CallIndex = None, start: int | None = None) -> None:
        """Take x `[..., d_in]` and dy `[..., d_out]` of one call, and what `note_forward` gave for it; called
        from the op's backward. A call that computes only some columns of the output, from `start` on, has
        only these in dy."""
        if (self.leader or self).look is not None:  # a model that differentiates inside its forward
            return
        call = self._call(x, dy, index)
        if start is not None:
            call.start = start
        self._take(call, index is None and start is None)

    def note_images(self, images: Tensor) -> None:
        """`note_forward` of a convolution of `[N, C, *S]` whose windows overlap."""
        if self.rows_to_samples is not None and self.mode == "sample":
            raise FisherError(
                f"rows_to_samples[{self.name!r}]: expected a layer whose input has rows, got a convolution "
                "whose windows overlap"
            )
        self.note_forward(images.movedim(1, -1))

    def record_images(self, images: Tensor, dy: Tensor, geometry: Geometry) -> None:
        """`record` of images `[N, C, *S]` and dy `[N, d_out, *T]`."""
        if self.look is None:
            self._take(self._images_call(images, dy, geometry), True)

    def _take(self, call: _Call, in_order: bool) -> None:
        if self._calls <= 1 and not self._held and in_order:  # the usual layer, called once
            self._closed = True
            self._accumulate([_Part(call.x, call.dy)], call.samples)
            return
        self._held.append(call)
        if len(self._held) >= self._calls:
            self.finish()

    def finish(self) -> None:
        """Accumulate what is held back for calls whose output took no part in the loss; call it after the
        last backward."""
        held, self._held, self._closed = self._held, [], True
        if not held:
            return
        sizes = sorted({call.samples for call in held})
        if len(sizes) > 1:
            raise FisherError(
                f"batch_size: {self.name} was called with {sizes} samples in one forward pass; give their "
                "number"
            )
        # Columns of the output that different calls have are not joined.
        cuts = sorted({cut for call in held for cut in (call.start, call.stop)})
        groups = [
            (cut, [c for c in held if c.start <= cut and end <= c.stop], end) for cut, end in pairwise(cuts)
        ]
        self._accumulate([_joined(calls, start, stop) for start, calls, stop in groups if calls], sizes[0])

    def _call(self, x: Tensor, dy: Tensor, index: CallIndex) -> _Call:
        leader, shape = self.leader or self, index.shape if isinstance(index, RoutedRows) else x.shape
        samples = self.batch_size or leader._watched_samples
        if samples is None:
            if isinstance(index, RoutedRows):  # tokens, of which a sample may have any number
                raise FisherError(
                    f"batch_size: {self.name} hands on the {shape[0]} rows of its input; give the number of "
                    "samples"
                )
            samples = self._samples_of(shape)
        if isinstance(index, Tensor):
            return _Call(_rows(x), _rows(dy), samples, index)
        if self.mode != "sample":
            return _Call(_rows(x)[None], _rows(dy)[None], samples)
        order = None
        if samples > 1 and shape.numel() and dy.shape[-1]:
            order = leader._order_of(shape, samples)
            if isinstance(index, RoutedRows):
                return _Call(_rows(x), _rows(dy), samples, order.sample_of(index.rows, samples))
        return _Call(_by_sample(x, samples, order), _by_sample(dy, samples, order), samples)

    def _images_call(self, images: Tensor, dy: Tensor, geometry: Geometry) -> _Call:
        shape = images.movedim(1, -1).shape  # as `note_images` saw them
        samples = self.batch_size or self._watched_samples or self._samples_of(shape)
        parts, order = 1, Order(0, images.shape[0])
        if self.mode == "sample" and samples > 1 and images.numel() and dy.numel():
            parts, order = samples, self._order_of(shape, samples)
            if order.dim != 0:
                raise FisherError(
                    f"{self.name}: its samples are in dimension {order.dim + 1} of its input "
                    f"{list(images.shape)}, where windows overlap. {ways_out(self.name)}"
                )
        x, dy = (order.samples_first(tensor, parts) for tensor in (images, dy))
        return _Call(Windows(geometry, [x]), dy.movedim(2, -1).flatten(1, -2), samples)

    def _samples_of(self, shape: torch.Size) -> int:
        """The samples in x by its order, or its leading dimension."""
        known = self._orders.get(len(shape), ())
        for order in known:
            if shape[order.dim] % order.rows == 0:
                return shape[order.dim] // order.rows
        return shape[0] if len(shape) > 1 else 1

    def _order_of(self, shape: torch.Size, samples: int) -> Order:
        """The order of x: the one that is known, or samples first, which is the rule as long as nothing else
        is known."""
        if known := self._order(shape, samples):
            return known
        leading = shape[0] if len(shape) > 1 else 1
        if self._checked:
            raise FisherError(
                f"{self.name}: {samples} samples have no single order, of those that the check of the "
                f"samples found, in its input {list(shape)}. {ways_out(self.name)}"
            )
        if leading % samples:
            raise FisherError(
                f"batch_size: {samples} samples do not divide the {leading} leading rows of the input "
                f"{list(shape)} of {self.name}. {ways_out(self.name)}"
            )
        return Order(0, leading // samples)

    def _index(self, function: RowsToSamples, rows: Tensor) -> Tensor:
        """The sample of each row, checked."""
        samples = self.batch_size or (self.leader or self)._watched_samples
        if samples is None:
            raise FisherError(f"batch_size: rows_to_samples of {self.name} needs the number of samples")
        index, where = function(rows), f"rows_to_samples[{self.name!r}]"
        if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
            got = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise FisherError(f"{where}: expected an int64 tensor, got {got}")
        if index.shape != rows.shape[:1]:
            raise FisherError(
                f"{where}: expected the sample of each of the {rows.shape[0]} rows of x, got shape "
                f"{list(index.shape)}"
            )
        index = index.to(device=rows.device, dtype=torch.int64)
        low, high = (int(index.min()), int(index.max())) if index.numel() else (0, 0)
        if low < 0 or high >= samples:
            raise FisherError(f"{where}: expected samples from 0 to {samples - 1}, got {low} to {high}")
        return index

    def _factor(self, samples: int) -> float:
        if self.mode == "gradient":
            return (float(samples) if self.reduction == "mean" else 1.0) / self.loss_scale
        if self.mode == "sample":
            factor = float(samples) ** 2 if self.reduction == "mean" else 1.0
        else:
            factor = float(samples) if self.reduction == "mean" else 1.0 / samples
        return factor / self.loss_scale**2

    def _accumulate(self, parts: list[_Part], samples: int) -> None:
        if samples == 0:
            return
        factor = self._factor(samples)
        for index, ranges in enumerate(self.rows):
            self._add(index, [term for part in parts for term in part.terms(ranges)], factor)
        self.samples += samples
        self.batches += 1

    def _add(self, index: int, terms: list[Term], weight: float) -> None:
        for term in terms:
            self._sums[index].add(term, self.mode, weight)


class RowsCapture:
    """A `FisherCapture` as calls see it that compute only the rows of the layer from `start` on."""

    __slots__ = ("_capture", "_start")

    def __init__(self, capture: FisherCapture, start: int) -> None:
        self._capture, self._start = capture, start

    def note_forward(self, x: Tensor) -> CallIndex:
        """As in `FisherCapture`."""
        return self._capture.note_forward(x)

    def record(self, x: Tensor, dy: Tensor, index: CallIndex = None) -> None:
        """As in `FisherCapture`, of dy that has only the columns of these rows."""
        self._capture.record(x, dy, index, self._start)


def ways_out(name: str) -> str:
    """What helps where the rows of a sample cannot be told, in words."""
    return (
        f"Leave the layer out (exclude_modules), say which rows belong to which sample "
        f'(rows_to_samples={{"{name}": function}}), or use fisher_mode="batch", which needs no order'
    )


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _inputs(parts: list[Tensor | Windows], dim: int) -> Tensor | Windows:
    """Those of all calls, joined; a layer has rows or windows in each of them."""
    first, *others = parts
    if isinstance(first, Windows):
        return first.with_calls([part for part in others if isinstance(part, Windows)])
    if not others:
        return first
    return torch.cat([first, *(part for part in others if isinstance(part, Tensor))], dim)


def _by_sample(tensor: Tensor, samples: int, order: Order | None) -> Tensor:
    """`[N, T, d]`, a view where that is possible; other dimensions are tokens."""
    features = tensor.shape[-1]
    if samples == 0 or tensor.numel() == 0:  # adds nothing
        return tensor.new_empty(samples, 0, features)
    if samples == 1 or order is None:
        return tensor.reshape(1, -1, features)
    if order.dim == 0 and not order.minor:  # as it is, without views of views
        if order.rows == 1 and tensor.dim() == 3:
            return tensor
        return tensor.reshape(samples, tensor.numel() // (samples * features), features)
    rows = order.samples_first(tensor, samples)
    return rows.reshape(samples, rows.shape[1:-1].numel(), features)


def _columns(dy: Tensor, ranges: Rows) -> Tensor:
    if ranges == ((0, dy.shape[-1]),):
        return dy
    parts = [dy.narrow(-1, start, stop - start) for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _joined(calls: list[_Call], start: int, stop: int) -> _Part:
    """The columns `start` to `stop` of the output in calls that have them, joined along the tokens."""
    dys = [_columns(c.dy, ((start - c.start, stop - c.start),)) for c in calls]
    dim = 0 if calls[0].index is not None else 1
    x = _inputs([call.x for call in calls], dim)
    dy = dys[0] if len(dys) == 1 else torch.cat(dys, dim)
    index = [call.index for call in calls if call.index is not None]
    if not index or isinstance(x, Windows):
        return _Part(x, dy, start)
    x, dy, offsets = _sorted_by_sample(x, dy, torch.cat(index), calls[0].samples)
    return _Part(x, dy, start, offsets)


def _sorted_by_sample(x: Tensor, dy: Tensor, index: Tensor, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x, dy, offsets): rows in the order of their samples, and where each sample begins."""
    index, order = index.sort(stable=True)
    counts = torch.bincount(index, minlength=samples)
    return x[order], dy[order], torch.cat([counts.new_zeros(1), counts.cumsum(0)])
