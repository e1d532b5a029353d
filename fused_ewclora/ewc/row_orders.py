# SPDX-License-Identifier: Apache-2.0
"""Finds which rows of a layer's input belong to which sample, by running the model on single samples.

The gradient of one sample is the sum over its own rows, so mode "sample" needs to know them. They need not
come first in the batch: a sequence-first model has them last, windows and flattened tokens are spread over
the leading dimension, and a text tower that embeds class names has none. The rows that the first and the last
sample of a batch have alone are looked for in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..distributed.wrappers import innermost
from ..errors import FisherError
from ..ops.capture import FisherCapture
from ..ops.sample_order import Ends, Order, Watch, marks
from .batches import described, reverse_samples, take_ends, take_sample, tensors
from .placement import Placement
from .restoring import Undo, evaluation_mode
from .row_evidence import OFF, Seen, check_reversed, found_orders

Cut = Callable[[Any], Any]
Look = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Asked:
    """A forward of `samples` samples: `part` is its batch after a cut, `forward` gives the output of one."""

    forward: Callable[[Any], Any]
    part: Callable[[Cut], Any]
    samples: int


class _Hook:
    """A hook of this pass, which copies of the model do not have."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_nothing,)


def _nothing(*_: Any) -> None:
    """What the hook of a copy does."""


class SampleCheck:
    """The orders of the rows in all layers of a Fisher pass.

    `captures` are those of the pass, by layer. Processes that share a model must make the same calls.
    """

    def __init__(self, placement: Placement, captures: Mapping[str, FisherCapture]) -> None:
        self._placement, self._captures = placement, captures
        self._model = innermost(placement.model)
        self._looking = False
        self._checked_all: set[str] = set()

    def run(self, forward: Callable[[Any], tuple[Any, Any]], batch: Any, samples: int) -> tuple[Any, Any]:
        """forward(batch), (output, targets), after which the order of the rows is known in every layer that
        it called; raises `FisherError` for layers where it cannot be known."""
        self._begin(samples)
        try:
            output, targets = forward(batch)
        finally:
            watches = self._end()
        self._find(watches, _Asked(lambda part: forward(part)[0], lambda cut: cut(batch), samples), output)
        return output, targets

    @contextmanager
    def by_hand(self, batch_size: Callable[[], int | None]) -> Iterator[None]:
        """Inside, the same happens at every forward of the model itself; `batch_size` tells the number of
        samples, None that the first tensor among the arguments has them first."""

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._looking or not torch.is_grad_enabled():
                return
            leading = [tensor.shape[0] for _, tensor in tensors((args, kwargs)) if tensor.dim()]
            if samples := batch_size() or (leading[0] if leading else 0):
                self._begin(samples)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._looking:
                return
            watches = self._end()
            if watches:
                samples = next(iter(watches.values())).samples
                part = lambda cut: (cut(args), cut(kwargs))  # noqa: E731
                self._find(watches, _Asked(lambda p: module(*p[0], **p[1]), part, samples), output)

        undo, handles = Undo(), list[RemovableHandle]()

        def remove() -> None:
            for handle in handles:
                handle.remove()

        with undo, undo:
            undo.add(remove)
            handles.append(self._model.register_forward_pre_hook(_Hook(before), with_kwargs=True))
            handles.append(self._model.register_forward_hook(_Hook(after), with_kwargs=True))
            yield

    def _begin(self, samples: int) -> None:
        for capture in self._captures.values():
            capture.watch = Watch(samples, [])

    def _end(self) -> dict[str, Watch]:
        watches = {name: c.watch for name, c in self._captures.items() if c.watch is not None}
        for capture in self._captures.values():
            capture.watch = None
        return watches

    def _find(self, watches: Mapping[str, Watch], asked: _Asked, output: Any) -> None:
        unknown = {name: w.calls for name, w in watches.items() if any(call is not None for call in w.calls)}
        if not self._placement.any(bool(unknown)):
            return
        training = any(module.training for module in self._model.modules())
        parts = self._placement.agree(lambda: self._parts(asked, training))
        # With gradients, as in the pass itself: without them PyTorch takes other paths.
        first, last, *both = self._seen(asked, parts, lambda x: x)
        batch, samples = Seen(unknown, output), asked.samples
        if both:
            # In train mode the pass itself draws other masks for other batches.
            samples = min(samples, 2)
            calls = {n: [Ends.of(x, 2) if x.numel() else None for x in both[0].calls[n]] for n in unknown}
            batch = Seen(calls, both[0].output)
        found = self._placement.agree(lambda: found_orders(batch, first, last, samples))
        for name, orders in found.items():
            self._captures[name].add_orders(orders)
        self._check_all(asked, found)

    def _parts(self, asked: _Asked, training: bool) -> list[Any]:
        """The first sample, the last one, and in train mode both together."""
        samples = asked.samples
        parts = [asked.part(lambda whole: take_sample(whole, 0, samples))]
        if samples == 1:  # other processes may have more, and all run as many forwards
            return parts * (3 if training else 2)
        parts.append(asked.part(lambda whole: take_sample(whole, samples - 1, samples)))
        if training:
            self._check_batch_norm()
            parts.append(asked.part(lambda whole: take_ends(whole, samples)))
        batch = asked.part(lambda whole: whole)
        if described(parts[0]) == described(batch):
            shapes = [list(tensor.shape) for _, tensor in tensors(batch)]
            raise FisherError(
                f"batch_size: the pass takes one of {samples} samples alone to find its rows in each layer, "
                f"but none of the tensors {shapes} of the batch has {samples} leading rows. Correct the "
                f"number of samples, let tensors have the samples first, or: {OFF}"
            )
        return parts

    def _check_batch_norm(self) -> None:
        for name, module in self._model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                raise FisherError(
                    f"{name}: batch normalisation in train mode makes every sample depend on the others, so "
                    'that no sample has a gradient of its own; call .eval() on it, or use fisher_mode="batch"'
                )

    def _check_all(self, asked: _Asked, found: Mapping[str, dict[int, list[Order]]]) -> None:
        """Looks at the samples between the first and the last too, of layers whose input is a list of rows:
        where samples have different numbers of rows (routed experts), those at both ends may agree. A batch
        in reverse must have these rows in reverse."""
        doubtful = {
            name: orders[2]
            for name, orders in found.items()
            if asked.samples > 3 and name not in self._checked_all
            if any(order.rows > 1 for order in orders.get(2, ()))
        }
        if not self._placement.any(bool(doubtful)):
            return
        parts = [
            asked.part(lambda whole: whole),
            asked.part(lambda whole: reverse_samples(whole, asked.samples)),
        ]
        with torch.no_grad():
            here, there = self._seen(asked, parts, marks, doubtful)
        self._placement.agree(lambda: check_reversed(doubtful, here, there, asked.samples))
        self._checked_all.update(doubtful)

    def _seen(
        self, asked: _Asked, parts: Iterable[Any], look: Look, names: Iterable[str] | None = None
    ) -> list[Seen[Tensor]]:
        """What layers see in forwards of parts of a batch, in eval mode; these are not counted, and leave the
        random numbers as they were."""
        layers = self._placement.layers.values()
        counts = [layer.forward_calls for layer in layers]
        self._looking = True
        try:
            with torch.random.fork_rng(devices=self._devices()), evaluation_mode(self._model):
                return [self._forward(asked, part, look, names) for part in parts]
        finally:
            self._looking = False
            for layer, count in zip(layers, counts, strict=True):
                layer.forward_calls = count
            for capture in self._captures.values():
                capture.look = None

    def _forward(self, asked: _Asked, part: Any, look: Look, names: Iterable[str] | None) -> Seen[Tensor]:
        calls: dict[str, list[Tensor]] = {name: [] for name in self._captures}
        for name, capture in self._captures.items():
            wanted = names is None or name in names
            capture.look = _noting(calls[name], look) if wanted else _ignore
        before = self._random_states()
        try:
            output = asked.forward(part)
        except Exception as error:
            raise FisherError(
                "the model cannot run on one sample of a batch alone, which the Fisher pass does to find the "
                f"rows of that sample in each layer ({type(error).__name__}: {error}). Let it, or: {OFF}"
            ) from error
        after = self._random_states()
        random = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return Seen(calls, output, random)

    def _devices(self) -> list[int]:
        devices = {layer.weight.device for layer in self._placement.layers.values()}
        return sorted({device.index or 0 for device in devices if device.type == "cuda"})

    def _random_states(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices())]


def _noting(calls: list[Tensor], look: Look) -> Callable[[Tensor], None]:
    return lambda x: calls.append(look(x))


def _ignore(x: Tensor) -> None:
    """Of a layer that is not in question."""
