# SPDX-License-Identifier: Apache-2.0
"""Finds weights that a model reads beside the calls of their adapted layers.

A merge changes what such a reader computes, while an adapter does not. A trial merge would show that to
rounding; here the weights are changed beyond recognition instead, but for the calls of their own layers. The
outputs of a model without such readers then stay the same bit for bit, in every precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.processes import sharded
from ..layers.adapted import AdaptedLinear

Run = Callable[[], list[Tensor]]  # one forward pass, the same every time: what tensors it returns
NOISE = 16  # times the difference of two equal runs, where these differ

# By dtype: integers of its size, and the sign bit together with the lowest bit of the exponent. Flipping
# these bits multiplies a number by -2 or -1/2; flipping them again restores it, whatever it was.
_BITS = {
    torch.float64: (torch.int64, -(2**63) + 2**52),
    torch.float32: (torch.int32, -(2**31) + 2**23),
    torch.float16: (torch.int16, -(2**15) + 2**10),
    torch.bfloat16: (torch.int16, -(2**15) + 2**7),
}


def second_reads(
    model: nn.Module, layers: Mapping[str, AdaptedLinear], run: Run, first: list[Tensor]
) -> list[str]:
    """The names of the layers whose weight `run` reads outside of their calls, so that its tensors depend on
    it. `first` is what `run` returned. Weights that are known to be tied, sharded or quantised are left out.

    The weights are changed in place and restored, bit for bit, also after an exception.
    """
    wanted = _testable(model, layers)
    return list(_found(wanted, run, first, noise=None)) if wanted else []


def _testable(model: nn.Module, layers: Mapping[str, AdaptedLinear]) -> dict[str, AdaptedLinear]:
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    left_out = sharded(layers)
    return {
        name: layer
        for name, layer in layers.items()
        if name not in left_out
        and layer.weight_state() is None
        and users.get(id(layer.weight)) == 1
        and layer.weight.dtype in _BITS
        and layer.weight.layout == torch.strided
        and layer.weight.numel() > 0
        and not layer.weight.is_meta
        and not layer.weight.is_inference()
    }


def _found(
    layers: Mapping[str, AdaptedLinear], run: Run, first: list[Tensor], noise: float | None
) -> Iterator[str]:
    """Halves the layers until those are left that change the outputs on their own."""
    change = _distance(_run_changed([_Trial(layer) for layer in layers.values()], run), first)
    if change == 0.0:
        return
    if noise is None:  # a model may differ from run to run, as with atomic additions or a memory of its own
        noise = max(_distance(run(), first) for _ in range(2))
    if change <= NOISE * noise:
        return
    names = list(layers)
    if len(names) == 1:
        yield names[0]
        return
    for half in (names[: len(names) // 2], names[len(names) // 2 :]):
        yield from _found({name: layers[name] for name in half}, run, first, noise)


def _run_changed(trials: list[_Trial], run: Run) -> list[Tensor]:
    try:
        for trial in trials:
            trial.begin()
        return run()
    finally:
        try:
            _end(trials)
        except BaseException:  # a second interrupt
            _end(trials)
            raise


def _end(trials: list[_Trial]) -> None:
    for trial in trials:
        trial.end()


class _Trial:
    """Between `begin` and `end` the rows with adapters have other values, except during calls of the
    layer."""

    def __init__(self, layer: AdaptedLinear) -> None:
        dtype, self._mask = _BITS[layer.weight.dtype]
        self._parts = [part.view(dtype) for part in _merged_into(layer)]
        self._firsts = [part[(0,) * part.dim()] for part in self._parts]
        self._before = [int(first) for first in self._firsts]
        self._attributes = vars(layer)
        self._own, self._forward = self._attributes.get("forward"), layer.forward

    def begin(self) -> None:
        self._attributes["forward"] = self._call  # no hook, which could change the path that PyTorch takes
        self._flip()

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        self._flip()
        try:
            return self._forward(*args, **kwargs)
        finally:
            self._flip()

    def _flip(self) -> None:
        for part in self._parts:
            part.bitwise_xor_(self._mask)

    def end(self) -> None:
        """Restores everything, wherever an exception came; may be called again."""
        if self._own is None:
            self._attributes.pop("forward", None)
        else:
            self._attributes["forward"] = self._own
        for part, first, before in zip(self._parts, self._firsts, self._before, strict=True):
            if int(first) != before:
                part.bitwise_xor_(self._mask)


def _merged_into(layer: AdaptedLinear) -> list[Tensor]:
    """The rows of the weight that a merge changes, in the memory of the weight; all of it where its rows are
    not views."""
    weight = layer.weight.data  # of which no version is counted, because the values come back
    ranges = [rows for piece in layer.adapter_slices for rows in piece.rows]
    matrix = layer.matrix_of(weight)
    whole = sum(stop - start for start, stop in ranges) == layer.out_features
    if whole or matrix.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
        return [weight]
    return [matrix[start:stop] for start, stop in ranges]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of an output: of sequences, mappings and dataclasses too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from tensors_in(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def _distance(tensors: list[Tensor], others: list[Tensor]) -> float:
    """The largest relative difference of a pair of tensors; 0 if they are equal, and infinite if their shapes
    or the places of their NaN and infinities are not."""
    if len(tensors) != len(others):
        return float("inf")
    return max((_difference(a, b) for a, b in zip(tensors, others, strict=True)), default=0.0)


def _difference(a: Tensor, b: Tensor) -> float:
    if a.is_nested or a.is_quantized or a.layout != torch.strided or torch.equal(a, b):
        return 0.0
    if a.shape != b.shape:
        return float("inf")
    a, b = (value.to(torch.complex128 if value.is_complex() else torch.float64) for value in (a, b))
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    if not bool((a.isfinite() == b.isfinite()).all()):
        return float("inf")
    finite = a.isfinite()
    scale = float(b[finite].abs().square().sum().sqrt())
    return float((a - b)[finite].abs().square().sum().sqrt()) / max(scale, torch.finfo(torch.float64).tiny)
