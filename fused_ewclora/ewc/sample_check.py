"""Finds which rows of a layer's input belong to which sample, by running the model on single samples.

The gradient of one sample is the sum over its own rows, so mode "sample" needs to know them. They need not
come first in the batch: a sequence-first model has them last, windows and flattened tokens are spread over
the leading dimension, and a text tower that embeds class names has none. The rows that the first and the last
sample of a batch have alone are looked for in the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FisherError
from ..ops.capture import FisherCapture, ways_out
from ..ops.sample_order import Ends, Order, Watch
from .batches import described, take_ends, take_sample, tensors
from .estimation import evaluation_mode, unwrapped
from .placement import Placement

Run = Callable[[Any], Any]
OFF = "check_samples=False skips this check where the samples are known to come first, in order"
# Of two orders that both agree, the worse one must be this many times worse than the better one.
CLEARLY = 4.0


def unit(dtype: torch.dtype, device: torch.device) -> float:
    """The relative error of one operation of a forward pass in this dtype."""
    if dtype == torch.float32 and (device.type != "cpu" or torch.get_float32_matmul_precision() != "highest"):
        return 2.0**-11  # TF32, which convolutions use by default
    return torch.finfo(dtype).eps


def tolerance(eps: float) -> float:
    """Batches of another size are summed in another order. Rounding that grows through a deep model costs
    less than half of the digits, and rows that differ do so by a good part of their norm."""
    return 2.0 * eps**0.5


@dataclass(frozen=True)
class _Alone:
    """What a forward of one or two samples gave: the inputs of every call by layer, and the output."""

    calls: dict[str, list[Tensor]]
    output: Any
    random: bool  # it drew random numbers, so that contents cannot be compared


class SampleCheck:
    """The orders of the rows in all layers of a Fisher pass.

    `captures` are those of the pass, by layer. Processes that share a model must make the same calls.
    """

    def __init__(self, placement: Placement, captures: Mapping[str, FisherCapture]) -> None:
        self._placement, self._captures = placement, captures
        self._model = unwrapped(placement.model)
        self._running = False

    def run(self, forward: Run, batch: Any, samples: int, output_of: Run) -> Any:
        """forward(batch), after which the order of the rows is known in every layer that it called; raises
        `FisherError` for layers where it cannot be known. `output_of` its result is what the loss is made
        of."""
        self._begin(samples)
        try:
            result = forward(batch)
        finally:
            watches = self._end()
        cut = (lambda index: take_sample(batch, index, samples), lambda: take_ends(batch, samples))
        self._find(watches, samples, output_of(result), batch, lambda part: output_of(forward(part)), cut)
        return result

    @contextmanager
    def by_hand(self, batch_size: Callable[[], int | None]) -> Iterator[None]:
        """Inside, the same happens at every forward of the model itself; `batch_size` tells the number of
        samples, None that the first tensor among the arguments has them first."""

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._running or not torch.is_grad_enabled():
                return
            leading = (tensor.shape[0] for _, tensor in tensors((args, kwargs)) if tensor.dim())
            if samples := batch_size() or next(leading, 0):
                self._begin(samples)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._running or not torch.is_grad_enabled():
                return
            watches = self._end()
            samples = next((watch.samples for watch in watches.values()), 0)
            if samples:
                cut = (
                    lambda index: tuple(take_sample(part, index, samples) for part in (args, kwargs)),
                    lambda: tuple(take_ends(part, samples) for part in (args, kwargs)),
                )
                self._find(
                    watches, samples, output, (args, kwargs), lambda part: module(*part[0], **part[1]), cut
                )

        with ExitStack() as hooks:
            handles = (
                self._model.register_forward_pre_hook(before, with_kwargs=True),
                self._model.register_forward_hook(after, with_kwargs=True),
            )
            for handle in handles:
                hooks.callback(handle.remove)
            yield

    def _begin(self, samples: int) -> None:
        for capture in self._captures.values():
            capture.watch = Watch(samples, [])

    def _end(self) -> dict[str, Watch]:
        watches = {}
        for name, capture in self._captures.items():
            if capture.watch is not None:
                watches[name] = capture.watch
            capture.watch = None
        return watches

    def _find(
        self, watches: Mapping[str, Watch], samples: int, output: Any, batch: Any, forward: Run, cut: Any
    ) -> None:
        unknown = {name: w.calls for name, w in watches.items() if any(call is not None for call in w.calls)}
        if not self._placement.any(bool(unknown)):
            return
        training = any(module.training for module in self._model.modules())
        parts = self._placement.agree(lambda: self._parts(batch, samples, training, cut))
        with self._looking(), evaluation_mode(self._model):
            first, last, *ends = (self._alone(forward, part) for part in parts)
        if ends:
            # The forward pass of a model in train mode draws other masks for other batches.
            pair = ends[0]
            samples, output = min(samples, 2), pair.output
            unknown = {
                name: [Ends.of(x, 2) if x.numel() else None for x in pair.calls[name]] for name in unknown
            }
        self._placement.agree(lambda: self._decide(unknown, first, last, output, samples))

    def _parts(self, batch: Any, samples: int, training: bool, cut: Any) -> list[Any]:
        """The first sample, the last one, and in train mode both together."""
        sample, ends = cut
        parts = [sample(0), sample(samples - 1)]
        if training:
            parts.append(ends() if samples > 1 else parts[0])
        if samples == 1:
            return parts
        if training:
            self._check_batch_norm()
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

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Forwards inside are not counted and leave the random numbers as they were."""
        self._running = True
        layers = self._placement.layers.values()
        counts = [layer.forward_calls for layer in layers]
        try:
            with torch.random.fork_rng(devices=self._devices()):
                yield
        finally:
            self._running = False
            for layer, count in zip(layers, counts, strict=True):
                layer.forward_calls = count
            for capture in self._captures.values():
                capture.probed = None

    def _devices(self) -> list[int]:
        devices = {capture.fishers[0].device for capture in self._captures.values()}
        return sorted({device.index or 0 for device in devices if device.type == "cuda"})

    def _random_states(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices())]

    def _alone(self, forward: Run, part: Any) -> _Alone:
        for capture in self._captures.values():
            capture.probed = []
        before = self._random_states()
        try:
            # With gradients, as in the pass itself: without them PyTorch takes other paths.
            output = forward(part)
        except Exception as error:
            raise FisherError(
                "the model cannot run on one sample of a batch alone, which the Fisher pass does to find the "
                f"rows of that sample in each layer ({type(error).__name__}: {error}). Let it, or: {OFF}"
            ) from error
        random = any(not torch.equal(a, b) for a, b in zip(before, self._random_states(), strict=True))
        calls = {name: capture.probed or [] for name, capture in self._captures.items()}
        return _Alone(calls, output, random)

    def _decide(
        self,
        unknown: Mapping[str, list[Ends | None]],
        first: _Alone,
        last: _Alone,
        output: Any,
        samples: int,
    ) -> None:
        if samples == 1:
            return
        random = first.random or last.random
        questions = [
            _Question(name, ends, first.calls[name], last.calls[name], place)
            for name, calls in unknown.items()
            for place, ends in enumerate(calls)
            if ends is not None
        ]
        for name in unknown:
            self._captures[name].checked = True
        for question in questions:
            question.check_calls(len(unknown[question.name]), samples)
        asked = [question.compared(samples) for question in questions]
        outputs = {} if random else _outputs(output, first.output, last.output, samples)
        answers = _values([*asked, *outputs.values()])
        floating = [t for _, t in tensors(output) if t.is_floating_point()]
        eps = max(unit(x.dtype, x.device) for x in itertools.chain(floating, *(q.first for q in questions)))
        for path, differences in zip(outputs, answers[len(questions) :], strict=True):
            if min(differences) > tolerance(eps):
                raise FisherError(_interaction(path, min(differences), eps))
        for question, differences in zip(questions, answers, strict=False):
            order = question.answer(differences, eps, samples, random)
            self._captures[question.name].add_order(len(question.ends.shape), order)


class _Question:
    """Which order the rows have in one call of a layer."""

    def __init__(self, name: str, ends: Ends, first: list[Tensor], last: list[Tensor], place: int) -> None:
        self.name, self.ends, self.first, self.last, self.place = name, ends, first, last, place
        self.orders: list[Order] = []

    def check_calls(self, count: int, samples: int) -> None:
        alone = len(self.first)
        if (alone, alone) != (count, len(self.last)):
            self._refuse(
                f"it is called {count} times for {samples} samples, and {alone} and {len(self.last)} times "
                "for the first and the last of them alone"
            )

    def compared(self, samples: int) -> list[Tensor]:
        """The difference of each order that the shapes allow."""
        first, last = self.first[self.place], self.last[self.place]
        compared = self.ends.compared(first, last)
        if not compared:
            here, shapes = list(self.ends.shape), [list(first.shape), list(last.shape)]
            self._refuse(
                f"its input is {here} for {samples} samples, and {shapes[0]} and {shapes[1]} for the first "
                "and the last of them alone, which is no share of it"
            )
        self.orders = list(compared)
        return list(compared.values())

    def answer(self, differences: list[float], eps: float, samples: int, random: bool) -> Order:
        here = f"in its input {list(self.ends.shape)} for {samples} samples"
        if random and len(self.orders) == 1:
            return self.orders[0]
        if random:
            self._refuse(f"{here} the rows can have several orders, and the model draws random numbers")
        ranked = sorted(zip(differences, self.orders, strict=True), key=lambda pair: pair[0])
        best, order = ranked[0]
        if best > tolerance(eps):
            self._refuse(
                f"{here} the rows that the first and the last sample have alone are in no known order "
                f"(relative difference {best:.2g}, of which rounding explains {tolerance(eps):.2g}); the "
                "rows are arranged in another way, or samples act on each other before this layer"
            )
        if len(ranked) > 1 and ranked[1][0] <= max(CLEARLY * best, CLEARLY * eps):
            self._refuse(f"{here} the rows of a sample are alike, and so fit two orders")
        return order

    def _refuse(self, why: str) -> None:
        raise FisherError(
            f"{self.name}: the pass cannot tell which rows belong to which sample: {why}. "
            f"{ways_out(self.name)}. {OFF}"
        )


def _outputs(output: Any, first: Any, last: Any, samples: int) -> dict[tuple[Any, ...], list[Tensor]]:
    """By place in the output: how much samples there differ from the same samples alone."""
    firsts, lasts = dict(tensors(first)), dict(tensors(last))
    compared: dict[tuple[Any, ...], list[Tensor]] = {}
    constant = None
    for path, here in tensors(output):
        alone, other = firsts.get(path), lasts.get(path)
        if not here.is_floating_point() or alone is None or other is None or alone.shape != other.shape:
            continue
        if alone.dim() != here.dim() or here.numel() == 0 or alone.numel() == 0:
            continue
        changed = [d for d in range(here.dim()) if here.shape[d] != alone.shape[d]]
        if not changed and here.dim() and here.shape[0] == samples:
            constant = path
        if not changed or any(here.shape[d] != samples * alone.shape[d] for d in changed):
            continue
        if len(changed) > 1:  # similarities between samples
            compared[path] = [here.new_tensor(torch.inf)]
            continue
        here, alone, other = (t.detach().movedim(changed[0], 0) for t in (here, alone, other))
        if here.dim() == 1:
            here, alone, other = here[:, None], alone[:, None], other[:, None]
        orders = Ends.of(here, samples).compared(alone, other)
        compared[path] = list(orders.values())
    if constant is not None and not compared:
        raise FisherError(
            f"output{_place(constant)}: has {samples} leading rows for {samples} samples and for one sample "
            f"alone, so that the samples are in another dimension of the batch. Let each tensor of the batch "
            f"have the samples first, or: {OFF}"
        )
    return compared


def _values(differences: list[list[Tensor]]) -> list[list[float]]:
    """The same numbers on the host, read at once."""
    flat = list(itertools.chain.from_iterable(differences))
    if not flat:
        return [[] for _ in differences]
    values = iter(torch.stack([d.to(flat[0].device, torch.float32) for d in flat]).tolist())
    return [[next(values) for _ in part] for part in differences]


def _place(path: tuple[Any, ...]) -> str:
    return "".join(f"[{part!r}]" for part in path)


def _interaction(path: tuple[Any, ...], difference: float, eps: float) -> str:
    return (
        f"output{_place(path)}: differs for a sample alone from the same sample in its batch (relative "
        f"difference {difference:.2g}, of which rounding explains {tolerance(eps):.2g}): samples act on each "
        "other, as with contrastive logits or statistics of the batch, so that no sample has a gradient of "
        f'its own. Use fisher_mode="batch", or a loader with batch size 1; {OFF}'
    )
