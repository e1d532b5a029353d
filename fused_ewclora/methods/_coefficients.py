# SPDX-License-Identifier: Apache-2.0
"""The coefficients of P&M, what they are computed from, and the layers that apply them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..distributed.transaction import canonical_name
from ..errors import ArgumentError, CheckpointError, FisherError
from ..ewc.controller import EWC
from ..ewc.placement import sums_dtype
from ..functional import Adapter, ewc_penalty
from ..layers.adapted import AdaptedLinear, Composer
from ..layers.index import AdapterRef, adapter_refs
from ..layers.slices import AdapterSlice

PREFIX = "gradient."  # of saved tensors


class Scaled(Composer):
    """B diag(s) A of every adapter, perturbed in training, or times the coefficient of its merging."""

    def __init__(self) -> None:
        self.perturbation = 0.0
        self._merged: dict[tuple[AdaptedLinear, str], float] | None = None

    def adapters(self, layer: AdaptedLinear) -> list[Adapter]:
        """What the layer adds to its base."""
        return [
            Adapter(lora_a, lora_b, layer.adapter_scale(piece) * self._factor(layer, piece), piece.rows)
            for piece, lora_a, lora_b in layer.adapter_parameters()
        ]

    def _factor(self, layer: AdaptedLinear, piece: AdapterSlice) -> float:
        if self._merged is not None:
            return self._merged[layer, piece.name]
        return 1.0 + self.perturbation if layer.training else 1.0

    @contextmanager
    def merging(self, coefficients: Mapping[str, float], refs: list[AdapterRef]) -> Iterator[None]:
        """Within the block every adapter counts with its coefficient."""
        self._merged = {(ref.layer, ref.piece.name): coefficients[ref.key] for ref in refs}
        try:
            yield
        finally:
            self._merged = None


class TaskEWC(EWC):
    """`EWC` that shows the Fisher of the running task."""

    def of_task(self) -> tuple[dict[str, Tensor], int]:
        """Sums over samples by adapter, and the number of samples."""
        if self._state.task is None or self._state.task.samples == 0:
            raise FisherError("end_task: the Fisher of this task has no samples")
        return self._state.task.buffers, self._state.task.samples


@dataclass(frozen=True)
class Coefficients:
    """What the task vector of one task was merged with."""

    solution: float  # of all adapters together, before it was limited
    merged: dict[str, float]  # by adapter

    @staticmethod
    def solving(terms: Mapping[str, tuple[float, float]], per_module: bool) -> Coefficients:
        """From the numerator and the denominator of every adapter; 0/0 is 1."""
        total = _ratio(*map(sum, zip(*terms.values(), strict=True)))
        solutions = {key: _ratio(*pair) if per_module else total for key, pair in terms.items()}
        return Coefficients(total, {key: min(max(a, 0.0), 1.0) for key, a in solutions.items()})

    def values(self, device: torch.device) -> Tensor:
        """All numbers."""
        return torch.tensor([self.solution, *self.merged.values()], dtype=torch.float64, device=device)

    def replaced(self, values: Tensor) -> Coefficients:
        """The same of other `values`."""
        solution, *merged = values.tolist()
        return Coefficients(solution, dict(zip(self.merged, merged, strict=True)))

    @staticmethod
    def parsed(saved: Any, tasks: int, keys: list[str]) -> list[Coefficients]:
        """Those of a saved state, `{"solution", "merged"}` per task; raises `CheckpointError`."""
        found = []
        for entry in saved if isinstance(saved, list) else []:
            solution, merged = (entry.get(k) if isinstance(entry, Mapping) else None for k in ENTRIES)
            if isinstance(merged, Mapping) and set(merged) == set(keys):
                numbers = [solution, *(merged[key] for key in keys)]
                if all(isinstance(value, float) and math.isfinite(value) for value in numbers):
                    found.append(Coefficients(numbers[0], dict(zip(keys, numbers[1:], strict=True))))
        if len(found) != tasks:
            raise CheckpointError(
                f"state: coefficients: expected one of every adapter for {tasks} tasks, got {len(found)} such"
            )
        return found


ENTRIES = ("solution", "merged")


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator != 0.0 or numerator != 0.0 else 1.0


class Curvature:
    """G = sum_i F_i (W - W_i) over the tasks that have ended, by adapter: the gradient of what all of them
    have lost, to second order, at the present W. One matrix stands for the W_i of any number of tasks."""

    def __init__(self, refs: list[AdapterRef], gradients: dict[str, Tensor] | None = None) -> None:
        self.refs, self.gradients = refs, gradients or {}

    @staticmethod
    def of(layers: Mapping[str, AdaptedLinear]) -> Curvature:
        """Before the first task."""
        return Curvature(adapter_refs({canonical_name(name): layer for name, layer in layers.items()}))

    def names(self) -> list[str]:
        """The names of the adapters."""
        return [ref.key for ref in self.refs]

    @torch.no_grad()
    def coefficients(
        self, old: Mapping[str, Any], sums: Mapping[str, Tensor], samples: int, per_module: bool
    ) -> Coefficients:
        """Of the adapters as they are now. old: the sum of the Fishers of earlier tasks; sums: the Fisher of
        this task, times its samples. Raises `ArgumentError` when one is not finite."""
        terms: dict[str, tuple[float, float]] = {}
        for ref in self.refs:
            adapter = _adapter(ref)
            own = _quadratic(sums[ref.key], adapter) / samples
            numerator, denominator = own, own
            if ref.key in old:
                numerator = own - _inner(self._gradient(ref), adapter)
                denominator = own + _quadratic(old[ref.key], adapter)
            if not math.isfinite(numerator) or not math.isfinite(denominator):
                raise ArgumentError(
                    f"end_task: {ref.key}: expected a finite task vector B A and finite Fishers, got "
                    f"{numerator} / {denominator} for its coefficient"
                )
            terms[ref.key] = numerator, denominator
        return Coefficients.solving(terms, per_module)

    @torch.no_grad()
    def after(
        self, old: Mapping[str, Any], sums: Mapping[str, Tensor], samples: int, merged: Mapping[str, float]
    ) -> Curvature:
        """That of W + a D: earlier tasks have W further from their W_i by a D, this one by (a - 1) D."""
        gradients = {}
        for ref in self.refs:
            a, new = merged[ref.key], sums[ref.key] * ((merged[ref.key] - 1.0) / samples)
            if ref.key in old:
                new.add_(old[ref.key], alpha=a)
            adapter = _adapter(ref)
            with torch.autocast(new.device.type, enabled=False):
                lora_a, lora_b = adapter.lora_a.to(new.dtype), adapter.lora_b.to(new.dtype)
                new.mul_((lora_b * adapter.scale) @ lora_a)
            if ref.key in self.gradients:
                new.add_(self._gradient(ref))
            gradients[ref.key] = new
        return Curvature(self.refs, gradients)

    def named(self) -> dict[str, Tensor]:
        """G as it is saved."""
        return {PREFIX + key: gradient for key, gradient in self.gradients.items()}

    def parsed(self, tensors: Mapping[str, Tensor], tasks: int) -> tuple[Curvature, dict[str, Tensor]]:
        """The G of a saved state, and its other tensors; raises `CheckpointError`."""
        gradients: dict[str, Tensor] = {}
        rest: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            (gradients if name.startswith(PREFIX) else rest)[name.removeprefix(PREFIX)] = tensor
        expected = set(self.names()) if tasks else set()
        if set(gradients) != expected:
            raise CheckpointError(
                f"state: gradients: expected those of {sorted(expected)[:3]}, got {sorted(gradients)[:3]}"
            )
        copies = {}
        for ref in self.refs if tasks else ():
            value, shape = gradients[ref.key], (ref.piece.row_count, ref.layer.in_features)
            if tuple(value.shape) != shape or not bool(torch.isfinite(value).all()):
                raise CheckpointError(f"state: gradient of {ref.key}: expected finite {list(shape)}")
            like = ref.layer.weight
            copies[ref.key] = value.detach().to(like.device, sums_dtype(ref.layer), copy=True)
        return Curvature(self.refs, copies), rest

    def _gradient(self, ref: AdapterRef) -> Tensor:
        """On the device of the layer."""
        return self.gradients[ref.key].to(ref.layer.weight.device)


def _adapter(ref: AdapterRef) -> Adapter:
    lora_a, lora_b = ref.matrices()
    return Adapter(lora_a.detach(), lora_b.detach(), ref.layer.adapter_scale(ref.piece), ref.piece.rows)


def _quadratic(fisher: Tensor, adapter: Adapter) -> float:
    """<F D, D>."""
    return float(ewc_penalty([fisher], [adapter.lora_a], [adapter.lora_b], [adapter.scale], 2.0))


def _inner(gradient: Tensor, adapter: Adapter) -> float:
    """<G, D>, from an r x d_in product."""
    with torch.autocast(gradient.device.type, enabled=False):
        product = (adapter.lora_b * adapter.scale).T.to(gradient.dtype) @ gradient
        return float((product * adapter.lora_a).sum(dtype=torch.float64))
