# SPDX-License-Identifier: Apache-2.0
"""What forwards of a batch, and of its first and last sample alone, tell about the rows of each sample."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch import Tensor

from ..errors import FisherError
from ..ops.capture import ways_out
from ..ops.sample_order import Ends, Order, reversal
from .batches import tensors

Call = TypeVar("Call", bound="Ends | Tensor | None")
Path = tuple[Any, ...]
OFF = "check_samples=False skips this check where the samples are known to come first, in order"
# Of two orders that both agree, the worse one must be this many times worse than the better one.
CLEARLY = 4.0


@dataclass(frozen=True)
class Seen(Generic[Call]):
    """What a forward gave: every call of each layer, the output, and whether it drew random numbers, so that
    contents cannot be compared."""

    calls: Mapping[str, list[Call]]
    output: Any
    random: bool = False


def unit(dtype: torch.dtype, device: torch.device) -> float:
    """The relative error of one operation of a forward pass in this dtype."""
    precise = device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    if dtype == torch.float32 and not precise:
        return 2.0**-11  # TF32, which convolutions use by default
    return torch.finfo(dtype).eps


def tolerance(eps: float) -> float:
    """Batches of another size are summed in another order. Rounding that grows through a deep model costs
    less than half of the digits, and rows that differ do so by a good part of their norm."""
    return 2.0 * eps**0.5


def found_orders(
    batch: Seen[Ends | None], first: Seen[Tensor], last: Seen[Tensor], samples: int
) -> dict[str, dict[int, list[Order]]]:
    """By layer and number of dimensions of its input: the orders of the rows; raises `FisherError` where they
    cannot be told, or where samples act on each other."""
    if samples == 1:
        return {}
    questions = [
        _Question(name, ends, first.calls[name], last.calls[name], place)
        for name, calls in batch.calls.items()
        for place, ends in enumerate(calls)
        if ends is not None
    ]
    for question in questions:
        question.check_calls(len(batch.calls[question.name]), samples)
    orders = [question.compared(samples) for question in questions]
    random = first.random or last.random
    outputs = {} if random else _outputs(batch.output, first.output, last.output, samples)
    answers = _values([*(list(by_order.values()) for by_order in orders), *outputs.values()])
    eps = _unit_of([*(t for _, t in tensors(batch.output)), *(x for q in questions for x in q.first)])
    for path, differences in zip(outputs, answers[len(questions) :], strict=True):
        _check_output(path, min(differences), eps)
    found: dict[str, dict[int, list[Order]]] = {name: {} for name in batch.calls}
    for question, by_order, differences in zip(questions, orders, answers, strict=False):
        ranked = sorted(zip(differences, by_order, strict=True), key=lambda pair: pair[0])
        order = question.answer(ranked, eps, samples, random)
        found[question.name].setdefault(len(question.ends.shape), []).append(order)
    return found


def check_reversed(
    orders: Mapping[str, list[Order]], here: Seen[Tensor], there: Seen[Tensor], samples: int
) -> None:
    """Raises `FisherError` for a layer whose rows in a batch with its samples in reverse, told by their
    marks, are not those of the batch in reverse."""
    for name, known in orders.items():
        a, b = here.calls[name], there.calls[name]
        eps = _unit_of([t for _, t in tensors(here.output)] + a)
        differences = _reversals(known, a, b, samples)
        if differences is None or max(_values([differences])[0], default=0.0) > tolerance(eps):
            _refuse(
                name,
                f"a batch of {samples} samples in reverse does not have the rows of its input in reverse, as "
                "when samples have different numbers of rows",
            )


def _reversals(
    known: list[Order], here: list[Tensor], there: list[Tensor], samples: int
) -> list[Tensor] | None:
    """The difference of each call with rows, or None where the calls have different numbers of rows or fit
    no order."""
    if [len(marks) for marks in here] != [len(marks) for marks in there]:
        return None
    differences = []
    for pair in zip(here, there, strict=True):
        fitting = [order for order in dict.fromkeys(known) if order.fits(pair[0].shape, samples)]
        if len(pair[0]) and len(fitting) != 1:
            return None
        differences += [reversal(*pair, order, samples) for order in fitting if len(pair[0])]
    return differences


def _unit_of(values: list[Tensor]) -> float:
    return max((unit(t.dtype, t.device) for t in values if t.is_floating_point()), default=0.0)


class _Question:
    """Which order the rows have in one call of a layer."""

    def __init__(self, name: str, ends: Ends, first: list[Tensor], last: list[Tensor], place: int) -> None:
        self.name, self.ends, self.first, self.last, self.place = name, ends, first, last, place

    def check_calls(self, count: int, samples: int) -> None:
        alone = len(self.first), len(self.last)
        if alone != (count, count):
            _refuse(
                self.name,
                f"it is called {count} times for {samples} samples, and {alone[0]} and {alone[1]} times for "
                "the first and the last of them alone",
            )

    def compared(self, samples: int) -> dict[Order, Tensor]:
        """By order that the shapes allow: its difference."""
        first, last = self.first[self.place], self.last[self.place]
        compared = self.ends.compared(first, last)
        if not compared:
            _refuse(
                self.name,
                f"its input is {list(self.ends.shape)} for {samples} samples, and {list(first.shape)} and "
                f"{list(last.shape)} for the first and the last of them alone, which is no share of it",
            )
        return compared

    def answer(self, ranked: list[tuple[float, Order]], eps: float, samples: int, random: bool) -> Order:
        """One of the orders, which come with their differences, the smallest first."""
        here = f"in its input {list(self.ends.shape)} for {samples} samples"
        best, order = ranked[0]
        if random:
            if len(ranked) > 1:
                _refuse(self.name, f"{here} rows can have two orders, and the model draws random numbers")
        elif best > tolerance(eps):
            _refuse(
                self.name,
                f"{here} the rows that the first and the last sample have alone are in no known order "
                f"(relative difference {best:.2g}, of which rounding explains {tolerance(eps):.2g}); they "
                "are arranged in another way, or samples act on each other before this layer",
            )
        elif len(ranked) > 1 and ranked[1][0] <= CLEARLY * max(best, eps):
            _refuse(self.name, f"{here} the rows of a sample are alike, and so fit two orders")
        return order


def _refuse(name: str, why: str) -> NoReturn:
    raise FisherError(
        f"{name}: the pass cannot tell which rows belong to which sample: {why}. {ways_out(name)}. {OFF}"
    )


def _outputs(output: Any, first: Any, last: Any, samples: int) -> dict[Path, list[Tensor]]:
    """By place in the output: how much samples there differ from the same samples alone."""
    firsts, lasts = dict(tensors(first)), dict(tensors(last))
    compared: dict[Path, list[Tensor]] = {}
    constant = None
    for path, here in tensors(output):
        alone, other = firsts.get(path), lasts.get(path)
        if alone is None or other is None or alone.shape != other.shape or alone.dim() != here.dim():
            continue
        if not here.is_floating_point() or here.numel() == 0 or alone.numel() == 0:
            continue
        grown = [dim for dim in range(here.dim()) if here.shape[dim] != alone.shape[dim]]
        if not grown and here.shape[:1] == (samples,):
            constant = path
        elif grown and all(here.shape[dim] == samples * alone.shape[dim] for dim in grown):
            compared[path] = _output_differences((here, alone, other), grown, samples)
    if constant is not None and not compared:
        raise FisherError(
            f"output{_named(constant)}: has {samples} leading rows for {samples} samples and for one sample "
            f"alone, so that the samples are in another dimension of the batch. Let each tensor of the batch "
            f"have the samples first, or: {OFF}"
        )
    return compared


def _output_differences(
    values: tuple[Tensor, Tensor, Tensor], grown: list[int], samples: int
) -> list[Tensor]:
    if len(grown) > 1:  # similarities between samples
        return [values[0].new_tensor(torch.inf)]
    here, alone, other = (value.detach().movedim(grown[0], 0) for value in values)
    if here.dim() == 1:
        here, alone, other = here[:, None], alone[:, None], other[:, None]
    return list(Ends.of(here, samples).compared(alone, other).values())


def _check_output(path: Path, difference: float, eps: float) -> None:
    if difference > tolerance(eps):
        raise FisherError(
            f"output{_named(path)}: differs for a sample alone from the same sample in its batch (relative "
            f"difference {difference:.2g}, of which rounding explains {tolerance(eps):.2g}): samples act on "
            "each other, as with contrastive logits or statistics of the batch, so that no sample has a "
            f'gradient of its own. Use fisher_mode="batch", or a loader with batches of one sample; {OFF}'
        )


def _named(path: Path) -> str:
    return "".join(f"[{part!r}]" for part in path)


def _values(differences: list[list[Tensor]]) -> list[list[float]]:
    """The same numbers on the host, read at once."""
    flat = list(itertools.chain.from_iterable(differences))
    if not flat:
        return [[] for _ in differences]
    values = iter(torch.stack([d.to(flat[0].device, torch.float32) for d in flat]).tolist())
    return [[next(values) for _ in part] for part in differences]
