# SPDX-License-Identifier: Apache-2.0
"""The adapters of CL-LoRA: shared by all tasks or one per task, their parameters, and which of them a layer
runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..functional import Adapter
from ..layers.adapted import AdaptedLinear, Composer
from ..layers.plain import own_tensors
from ..layers.slices import AdapterSlice

PAST_A, PAST_B, PAST_SCALE = "lora_past_A", "lora_past_B", "lora_past_scale"  # `[tasks, ...]` of each adapter
TEACHER = "lora_teacher_B"


@dataclass(eq=False)
class Choice:
    """Which adapters the layers run: those that are trained, those of the task `task` that has ended, or, of
    shared ones, those of the end of the last task (`teacher`)."""

    task: int | None = None
    teacher: bool = False

    @contextmanager
    def set(self, task: int | None, teacher: bool) -> Iterator[None]:
        """Inside, another choice."""
        before = self.task, self.teacher
        self.task, self.teacher = task, teacher
        try:
            yield
        finally:
            self.task, self.teacher = before


class Shared(Composer):
    """B A with A frozen; the same in all tasks, whose B is trained in each."""

    saved_by = "state_dict() of CLLoRA"  # see checkpoint.py

    def __init__(self, choice: Choice) -> None:
        self.choice = choice

    def adapters(self, layer: AdaptedLinear) -> list[Adapter]:
        """As trained, or as at the end of the last task."""
        table, found = own_tensors(layer), []
        for piece, lora_a, lora_b in layer.adapter_parameters():
            used = table[TEACHER + suffix(piece)] if self.choice.teacher else lora_b
            assert used is not None
            found.append(Adapter(lora_a, used, piece.scaling, piece.rows))
        return found


class Specific(Composer):
    """w B A of one task, w its block weight `lora_scale`."""

    saved_by = Shared.saved_by

    def __init__(self, choice: Choice) -> None:
        self.choice = choice

    def adapters(self, layer: AdaptedLinear) -> list[Adapter]:
        """Of the task that is chosen."""
        task = self.choice.task
        if task is None:
            return [
                Adapter(lora_a, lora_b, layer.adapter_scale(piece), piece.rows)
                for piece, lora_a, lora_b in layer.adapter_parameters()
            ]
        found = []
        for piece in layer.adapter_slices:
            lora_a, lora_b, scale = (tensor[task] for tensor in past(layer, piece))
            found.append(Adapter(lora_a, lora_b, scale * piece.scaling, piece.rows))
        return found


def suffix(piece: AdapterSlice) -> str:
    """What the names of the parameters of a slice end with."""
    return piece.a_name.removeprefix("lora_A")


def past(layer: AdaptedLinear, piece: AdapterSlice) -> tuple[Tensor, Tensor, Tensor]:
    """A `[tasks, r, d_in]`, B `[tasks, rows, r]` and w `[tasks]` of the tasks that have ended."""
    table, end = own_tensors(layer), suffix(piece)
    lora_a, lora_b, scale = (table[name + end] for name in (PAST_A, PAST_B, PAST_SCALE))
    assert lora_a is not None and lora_b is not None and scale is not None
    return lora_a, lora_b, scale


def put(layer: AdaptedLinear, name: str, value: Tensor, trained: bool = False) -> None:
    """Makes a tensor a parameter of the layer, in the place of one of that name."""
    layer.register_parameter(name, nn.Parameter(value.detach(), requires_grad=trained))


def put_past(layer: AdaptedLinear, piece: AdapterSlice, tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    """The inverse of `past`."""
    for name, value in zip((PAST_A, PAST_B, PAST_SCALE), tensors, strict=True):
        put(layer, name + suffix(piece), value)


def with_current(layer: AdaptedLinear, piece: AdapterSlice) -> tuple[Tensor, Tensor, Tensor]:
    """What `past` is when the task ends that is trained."""
    table = own_tensors(layer)
    now = (table[name] for name in (piece.a_name, piece.b_name, piece.scale_name))
    joined = [
        torch.cat([before.detach(), value.detach()[None]])
        for before, value in zip(past(layer, piece), now, strict=True)
        if value is not None
    ]
    lora_a, lora_b, scale = joined
    return lora_a, lora_b, scale


def no_past(layer: AdaptedLinear, piece: AdapterSlice, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `past` is before the first task ends."""
    shapes = ((0, piece.r, layer.in_features), (0, piece.row_count, piece.r), (0,))
    lora_a, lora_b, scale = (like.new_zeros(shape) for shape in shapes)
    return lora_a, lora_b, scale


def orthonormal_rows(lora_a: Tensor, generator: torch.Generator | None) -> Tensor:
    """The Q of random numbers from U(0, 1), transposed, of the shape of `lora_a`; one seed gives the same on
    every device."""
    rank, width = lora_a.shape
    device = None if generator is None else generator.device
    drawn = torch.rand(width, rank, dtype=torch.float64, generator=generator, device=device)
    return torch.linalg.qr(drawn.cpu()).Q.T.to(lora_a.device, lora_a.dtype)
